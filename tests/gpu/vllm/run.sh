#!/usr/bin/env bash
# Real vLLM on GPUs of this machine: tokens of loaded KV against local prefix hits (identity), SIGKILL of everybody under load
# (kills), contexts larger than local HBM (context), time to the first token by where the prefix comes from (bench), what an
# engine that lends notices of it (lender), and where the time to the first token goes (timeline).
#
#     tests/gpu/vllm/run.sh SITE PROGRAMS REPORT [SCRIPT [ITS ARGUMENTS]]
#
# With one GPU, the memory that is lent is on the engine's own: tokens are proven, but no link is measured.
#
# SITE: a folder of `site.sh`, or empty ("") where vLLM and SwiftCache's wheel are installed. PROGRAMS: the directory of
# swiftcache-broker and swiftcache. REPORT gets a JSON file of each script, bench.svg,
# context.svg and logs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
site=$1 programs=$2 report=$3
what=${4:-all}
shift $(($# < 4 ? $# : 4))
. "$here/../../bytecode.sh"
if [ -n "$site" ]; then
    export PYTHONPATH=$site
    libraries=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia
    for name in cu13 cudnn nccl cusparselt nvshmem; do
        LD_LIBRARY_PATH=$libraries/$name/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    done
    export LD_LIBRARY_PATH=$site/nvidia/nccl/lib:$LD_LIBRARY_PATH
fi
status=0
for script in identity kills context bench lender timeline; do
    if [ "$what" = "$script" ] || [ "$what" = all ]; then
        python3 "$here/$script.py" "$programs" "$report" "$@" || status=1
    fi
done
exit $status
