#!/usr/bin/env bash
# engine_packages.sh ENGINE: an environment in target/ENGINE/venv with what tests/ENGINE names, that engine first of all, and in
# target/ENGINE/beside what its beside.txt names. Prints nothing when all is there. Who comes second waits.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=tests/$1
home=$PWD/target/$1
venv=$home/venv
stamp=$venv/.requirements
mkdir -p "$home"
exec 9>"$home/lock"
flock 9
wanted=$(cat "$tests"/{requirements,overrides,beside}.txt 2>/dev/null || true)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    uv=$(tests/uv.sh)
    [ -x "$venv/bin/python" ] || "$uv" venv --quiet --seed --python "${PYTHON:-python3}" "$venv"
    install=(tests/retry.sh "$uv" pip install --quiet --python "$venv/bin/python")
    export UV_HTTP_TIMEOUT=300
    "${install[@]}" --override "$tests/overrides.txt" --requirement "$tests/requirements.txt"
    if [ -f "$tests/beside.txt" ]; then
        "${install[@]}" --no-deps --target "$home/beside" --requirement "$tests/beside.txt"
    fi
    printf '%s\n' "$wanted" >"$stamp"
fi
