#!/usr/bin/env bash
# Tests the connector on the real engine: vLLM's CPU build, real brokers and donors on simulated devices. Everything it
# installs (6 GB) goes into target/vllm and stays there. Arguments go to pytest; --setup only installs and builds,
# --bench measures instead of testing.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/vllm/venv
# vLLM's library needs the first, the configuration that it compiles the others.
tests/system.sh libnuma1 g++ python3-dev
tests/engine_venv.sh vllm
export PYTHONPATH=$PWD/engine-adapter/python
. tests/bytecode.sh
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
