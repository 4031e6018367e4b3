#!/usr/bin/env bash
# Tests the connector on the real engine: vLLM's CPU build, real brokers and donors on simulated devices. Everything it
# installs (6 GB) goes into target/vllm and stays there. Arguments go to pytest; --setup only installs and builds,
# --bench measures instead of testing.
set -euo pipefail
cd "$(dirname "$0")/../.."
home=target/vllm
venv=$home/venv
stamp=$venv/.requirements
wanted=$(cat tests/vllm/requirements.txt tests/vllm/overrides.txt)
mkdir -p "$home"
# vLLM's library needs the first, the configuration that it compiles the others.
tests/system.sh libnuma1 g++ python3-dev
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    uv=$(tests/uv.sh)
    [ -x "$venv/bin/python" ] || "$uv" venv --quiet --seed --python "${PYTHON:-python3}" "$venv"
    UV_HTTP_TIMEOUT=300 tests/retry.sh "$uv" pip install --quiet --python "$venv/bin/python" \
        --override tests/vllm/overrides.txt --requirement tests/vllm/requirements.txt
    printf '%s\n' "$wanted" >"$stamp"
fi
for program in swiftcache-broker swiftcache; do
    if [ ! -x "target/debug/$program" ]; then
        "${CARGO:-cargo}" build --workspace --bins --locked
    fi
done
env -u CONDA_PREFIX VIRTUAL_ENV="$PWD/$venv" "$venv/bin/maturin" develop --quiet --skip-install --locked \
    --manifest-path engine-adapter/Cargo.toml
export PYTHONPATH=$PWD/engine-adapter/python PYTHONDONTWRITEBYTECODE=1
checked=(engine-adapter/python/swiftcache/{engine,vllm} tests/{vllm,gpu,harness})
"$venv/bin/ruff" check --quiet --config tests/vllm/ruff.toml "${checked[@]}"
"$venv/bin/ruff" format --check --quiet --config tests/vllm/ruff.toml "${checked[@]}"
if [ "${1-}" = --setup ]; then
    exit
fi
if [ "${1-}" = --bench ]; then
    shift
    exec "$venv/bin/python" tests/vllm/bench.py "$@"
fi
exec "$venv/bin/python" -m pytest -c tests/vllm/pytest.ini --rootdir tests/vllm tests/vllm "$@"
