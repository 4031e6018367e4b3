#!/usr/bin/env bash
# engine_venv.sh ENGINE: sets up what tests/ENGINE needs: an environment with that engine in target/ENGINE/venv, the
# programs, and the native module. Prints nothing when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=tests/$1
home=$PWD/target/$1
venv=$home/venv
stamp=$venv/.requirements
wanted=$(cat "$tests/requirements.txt" "$tests/overrides.txt")
mkdir -p "$home"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    uv=$(tests/uv.sh)
    [ -x "$venv/bin/python" ] || "$uv" venv --quiet --seed --python "${PYTHON:-python3}" "$venv"
    UV_HTTP_TIMEOUT=300 tests/retry.sh "$uv" pip install --quiet --python "$venv/bin/python" \
        --override "$tests/overrides.txt" --requirement "$tests/requirements.txt"
    printf '%s\n' "$wanted" >"$stamp"
fi
for program in swiftcache-broker swiftcache; do
    if [ ! -x "target/debug/$program" ]; then
        "${CARGO:-cargo}" build --workspace --all-targets --locked
    fi
done
env -u CONDA_PREFIX VIRTUAL_ENV="$venv" "$venv/bin/maturin" develop --quiet --skip-install --locked \
    --manifest-path engine-adapter/Cargo.toml
