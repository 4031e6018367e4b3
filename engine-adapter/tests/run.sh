#!/usr/bin/env bash
# Builds the Python module (debug) and tests it against real processes: a broker and donors, on shared memory.
# It installs everything into target/, uses the programs in target/debug, and builds them if they are missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$(engine-adapter/tests/venv.sh)
for program in swiftcache-broker swiftcache; do
    if [ ! -x "target/debug/$program" ]; then
        "${CARGO:-cargo}" build --workspace --all-targets --locked
    fi
done
env -u CONDA_PREFIX VIRTUAL_ENV="$venv" "$venv/bin/maturin" develop --quiet --locked --manifest-path engine-adapter/Cargo.toml
. tests/bytecode.sh
exec "$venv/bin/python" -m pytest -c engine-adapter/tests/pytest.ini \
    --rootdir engine-adapter/tests engine-adapter/tests "$@"
