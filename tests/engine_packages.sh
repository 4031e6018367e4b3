#!/usr/bin/env bash
# engine_packages.sh ENGINE: an environment in target/ENGINE/venv with what tests/ENGINE names, that engine first of all. Prints
# nothing when all is there. Who comes second waits.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=tests/$1
home=$PWD/target/$1
venv=$home/venv
stamp=$venv/.requirements
mkdir -p "$home"
exec 9>"$home/lock"
flock 9
wanted=$(cat "$tests/requirements.txt" "$tests/overrides.txt")
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    uv=$(tests/uv.sh)
    [ -x "$venv/bin/python" ] || "$uv" venv --quiet --seed --python "${PYTHON:-python3}" "$venv"
    UV_HTTP_TIMEOUT=300 tests/retry.sh "$uv" pip install --quiet --python "$venv/bin/python" \
        --override "$tests/overrides.txt" --requirement "$tests/requirements.txt"
    printf '%s\n' "$wanted" >"$stamp"
fi
