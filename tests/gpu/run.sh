#!/bin/sh
# Checks and measures the CUDA backend on this machine's GPUs. It builds nothing: it runs swiftcache-gpu-check, which
# `cargo build --release -p swiftcache-gpu-tests` builds elsewhere. If swiftcache-broker, swiftcache and
# swiftcache-test-borrower are beside it, the full stack runs too.
#
#     tests/gpu/run.sh [--only peers|pairs] [PROGRAM [DIRECTORY FOR THE REPORT]]
#
# If python3 has PyTorch and the wheel of `make wheel`, the Python module is checked and measured under PyTorch. This
# needs tests/gpu/torch_engine and tests/harness too.
#
# --only peers: runs only what needs two GPUs, in about six minutes.
# --only pairs: the conformance checks of a peer's memory, for each GPU and each other one. Only with more than two GPUs does that
# show more than the rest.
# Without a GPU, everything is skipped with a message; with SWIFTCACHE_REQUIRE_GPU=1 this is a failure. If no GPU reaches
# the memory of another, the peers are skipped; with SWIFTCACHE_REQUIRE_PEERS=1 this is a failure.
set -u
only=
if [ "${1:-}" = --only ]; then
    only=${2:-}
    [ "$only" = peers ] || [ "$only" = pairs ] || { echo "--only takes peers or pairs, not \"$only\"" >&2; exit 2; }
    shift 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
program=${1:-$root/target/release/swiftcache-gpu-check}
report=${2:-.}

if ! "$program" open cuda; then
    [ "${SWIFTCACHE_REQUIRE_GPU:-0}" = 1 ] && exit 1
    echo "skipped: no GPU here (SWIFTCACHE_REQUIRE_GPU=1 makes that a failure)"
    exit 0
fi

status=0

# step SECONDS NAME ARGUMENTS: runs a step with a time limit, so that a step that hangs does not take the others' time.
step() {
    limit=$1
    echo "== $2"
    shift 2
    start=$(date +%s)
    timeout --kill-after=5 "$limit" "$program" "$@"
    code=$?
    [ $code = 124 ] && echo "FAILED: not done after $limit s"
    [ $code = 0 ] || status=1
    echo "== took $(($(date +%s) - start)) s"
}

if [ "$only" = pairs ]; then
    gpus=$(nvidia-smi -L | wc -l)
    own=0
    while [ "$own" -lt "$gpus" ]; do
        peer=0
        while [ "$peer" -lt "$gpus" ]; do
            if [ "$peer" != "$own" ]; then
                export CUDA_VISIBLE_DEVICES="$own,$peer"
                step 90 "conformance: GPU $own, and the memory of GPU $peer" conformance --only "peer device"
            fi
            peer=$((peer + 1))
        done
        own=$((own + 1))
    done
    exit $status
fi

step 30 "links: CUDA's view and NVML's" links
if [ "$only" = peers ]; then
    step 90 "conformance: memory of a process on another GPU" conformance --only "peer device"
else
    step 600 "conformance: two processes, both handle kinds, kill -9 of each party, every byte verified" conformance

    echo "== equal PID values in separate PID namespaces"
    if unshare --pid --fork --mount-proc true 2>/dev/null; then
        unshare --pid --fork --mount-proc --kill-child "$program" pid-collision || status=1
    else
        echo "not run: PID namespaces need privileges that this user lacks"
    fi
fi

beside=$(dirname "$program")
if [ -x "$beside/swiftcache-broker" ] && [ -x "$beside/swiftcache" ] && [ -x "$beside/swiftcache-test-borrower" ]; then
    step 90 "full stack: broker over NVML, swiftcache donate, borrower" full-stack
    step 90 "full stack, each process enumerates its own GPU only (CUDA_VISIBLE_DEVICES)" full-stack --apart
    step 90 "a CUDA graph, captured in global mode while a borrower leases, stores and gives back" graph-capture
    step 120 "a stitched pool: its slabs taken back and overwritten three times, every byte verified" stitched
else
    echo "== full stack: not run, swiftcache-broker, swiftcache and swiftcache-test-borrower are not in $beside"
fi

python=${PYTHON:-python3}
if "$python" -c 'import torch, swiftcache' 2>/dev/null; then
    # script SECONDS NAME SCRIPT ARGUMENTS
    script() {
        limit=$1
        echo "== $2"
        file=$root/tests/gpu/torch_engine/$3
        shift 3
        timeout --kill-after=5 "$limit" "$python" "$file" --programs "$beside" "$@" || status=1
    }
    script 300 "PyTorch: blocks behind its kernels, a replica, parts of its pool lent" check.py
    script 600 "PyTorch: time to the first token of a next turn" ttft.py --json "$report/gpu-ttft.json"
    script 300 "PyTorch: what the donor's neighbour notices" neighbour.py --json "$report/gpu-neighbour.json"
else
    echo "== PyTorch: not run, $python has no torch or not the wheel of \`make wheel\`"
fi

if [ "$only" = peers ]; then
    step 150 "benchmarks between GPUs" bench --only peers --json "$report/gpu-peers.json"
else
    step 1200 "benchmarks" bench --json "$report/gpu-bench.json"
fi
step 120 "tuning of copies between GPUs" tune --json "$report/gpu-tune.json"
exit $status
