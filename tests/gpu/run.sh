#!/bin/sh
# Checks and measures the CUDA backend on this machine's GPU. Builds nothing: it runs swiftcache-gpu-check, which
# was built elsewhere by `cargo build --release -p swiftcache-gpu-tests`.
#
#     tests/gpu/run.sh [PROGRAM [DIRECTORY FOR THE REPORT]]
#
# With SWIFTCACHE_REQUIRE_GPU=1 a machine without a GPU is a failure; otherwise it is skipped, and says so.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
program=${1:-$root/target/release/swiftcache-gpu-check}
report=${2:-.}

if ! "$program" open cuda; then
    [ "${SWIFTCACHE_REQUIRE_GPU:-0}" = 1 ] && exit 1
    echo "skipped: no GPU here (SWIFTCACHE_REQUIRE_GPU=1 makes that a failure)"
    exit 0
fi

status=0
echo "== conformance: two processes, both handle kinds, kill -9 of each party, every byte verified"
"$program" conformance || status=1

echo "== equal PID values in separate PID namespaces"
if unshare --pid --fork --mount-proc true 2>/dev/null; then
    unshare --pid --fork --mount-proc --kill-child "$program" pid-collision || status=1
else
    echo "not run: PID namespaces need privileges that this user lacks"
fi

echo "== benchmarks"
"$program" bench --json "$report/gpu-bench.json" || status=1
exit $status
