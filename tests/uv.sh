#!/usr/bin/env bash
# Prints where uv is: on this machine, or installed into target/vllm/uv, where all suites look for it.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v uv; then
    exit
fi
home=$PWD/target/vllm/uv
if [ ! -x "$home/bin/uv" ]; then
    {
        tests/system.sh python3-venv
        "${PYTHON:-python3}" -m venv "$home"
        tests/retry.sh "$home/bin/pip" install --quiet --disable-pip-version-check uv
    } >&2
fi
echo "$home/bin/uv"
