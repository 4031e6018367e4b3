#!/usr/bin/env bash
# Real SGLang on a GPU of this machine; next_turn.py says what it does.
#
#     tests/gpu/sglang/run.sh SITE PROGRAMS REPORT [ARGUMENTS OF next_turn.py]
#
# SITE: a folder of `site.sh`, or empty ("") where SGLang and SwiftCache's wheel are installed. PROGRAMS: the directory of
# swiftcache-broker and swiftcache.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
site=$1 programs=$2 report=$3
shift 3
. "$here/../../bytecode.sh"
if [ -n "$site" ]; then
    export PYTHONPATH=$site TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/torch_extensions}
    export PATH=$site/bin:$PATH CPATH=$site/openssl/include LIBRARY_PATH=$site/openssl/lib
    libraries=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia
    for name in cu13 cudnn nccl cusparselt nvshmem; do
        LD_LIBRARY_PATH=$libraries/$name/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    done
    export LD_LIBRARY_PATH=$site/nvidia/nccl/lib:$site/openssl/lib:$LD_LIBRARY_PATH
fi
exec python3 "$here/next_turn.py" "$programs" "$report" "$@"
