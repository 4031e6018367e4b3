#!/usr/bin/env bash
# Real vLLM on GPUs of this machine: tokens of loaded KV against local prefix hits (identity), SIGKILL of everybody under load
# (kills), contexts larger than local HBM (context), time to the first token by where the prefix comes from (bench), what an
# engine that lends notices of it (lender), where the time to the first token goes (timeline), and four GPUs: two ranks that borrow
# from an engine and a donor, two borrowers and two donors, links side by side (four, which runs by itself where there are four).
#
#     tests/gpu/vllm/run.sh SITE PROGRAMS REPORT [SCRIPT [ITS ARGUMENTS]]
#
# bench --methods says what an engine does for a turn, part by part; with --few several engines and a donor fit on one GPU.
# With four GPUs, too: kills --ranks 2, and context --ranks 2 --donors 2 --part speed, and longest.
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
scripts="identity kills context bench lender timeline"
[ "$what" != four ] && [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -lt 4 ] || scripts="$scripts four"
for script in $scripts; do
    if [ "$what" = "$script" ] || [ "$what" = all ]; then
        python3 "$here/$script.py" "$programs" "$report" "$@" || status=1
    fi
done
exit $status
