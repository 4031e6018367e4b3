#!/usr/bin/env bash
# Tests the linker on the real engine: SGLang's CPU engine, real brokers and donors on simulated devices. Everything it
# installs (5 GB, of which 4 are the very files that tests/vllm installs) goes into target/sglang and stays there.
# Arguments go to pytest; --setup only installs and builds.
#
# Importing SGLang takes longest. To do it once for many runs, leave this running (from the repository's root), and set
# SWIFTCACHE_NURSERY to the socket:  tests/sglang/run.sh --nursery /tmp/nursery.sock
set -euo pipefail
cd "$(dirname "$0")/../.."
home=$PWD/target/sglang
venv=$home/venv
stamp=$venv/.requirements
wanted=$(cat tests/sglang/requirements.txt tests/sglang/overrides.txt)
mkdir -p "$home"
# SGLang compiles the hash of its pages when it starts.
tests/system.sh g++ python3-dev libssl-dev
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    uv=$(tests/uv.sh)
    [ -x "$venv/bin/python" ] || "$uv" venv --quiet --seed --python "${PYTHON:-python3}" "$venv"
    UV_HTTP_TIMEOUT=300 tests/retry.sh "$uv" pip install --quiet --python "$venv/bin/python" \
        --override tests/sglang/overrides.txt --requirement tests/sglang/requirements.txt
    printf '%s\n' "$wanted" >"$stamp"
fi
for program in swiftcache-broker swiftcache; do
    if [ ! -x "target/debug/$program" ]; then
        "${CARGO:-cargo}" build --workspace --bins --locked
    fi
done
env -u CONDA_PREFIX VIRTUAL_ENV="$venv" "$venv/bin/maturin" develop --quiet --skip-install --locked \
    --manifest-path engine-adapter/Cargo.toml
# Its ninja, for what SGLang compiles.
export PATH=$venv/bin:$PATH TORCH_EXTENSIONS_DIR=$home/cache
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$PWD/tests/sglang/stubs:$PWD/tests/sglang:$PWD/engine-adapter/python
ruff check --quiet --config tests/vllm/ruff.toml engine-adapter/python/swiftcache/sglang tests/sglang
ruff format --check --quiet --config tests/vllm/ruff.toml engine-adapter/python/swiftcache/sglang tests/sglang
case ${1-} in
--setup) exit ;;
--nursery) exec python tests/sglang/serve.py "$2" </dev/null ;;
esac
exec python -m pytest -c tests/sglang/pytest.ini --rootdir tests/sglang tests/sglang "$@"
