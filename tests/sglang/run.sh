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
# SGLang compiles the hash of its pages when it starts.
tests/system.sh g++ python3-dev libssl-dev
tests/engine_venv.sh sglang
# Its ninja, for what SGLang compiles.
export PATH=$venv/bin:$PATH TORCH_EXTENSIONS_DIR=$home/cache
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
. tests/bytecode.sh
export PYTHONPATH=$PWD/tests/sglang/stubs:$PWD/tests/sglang:$PWD/engine-adapter/python
ruff check --quiet --config tests/vllm/ruff.toml engine-adapter/python/swiftcache/sglang tests/sglang
ruff format --check --quiet --config tests/vllm/ruff.toml engine-adapter/python/swiftcache/sglang tests/sglang
case ${1-} in
--setup) exit ;;
--nursery) exec python tests/sglang/serve.py "$2" </dev/null ;;
esac
exec python -m pytest -c tests/sglang/pytest.ini --rootdir tests/sglang tests/sglang "$@"
