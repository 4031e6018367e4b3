#!/usr/bin/env bash
# engine_venv.sh ENGINE: sets up what tests/ENGINE needs: an environment with that engine in target/ENGINE/venv, the
# programs, and the native module. Prints nothing when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/target/$1/venv
tests/engine_packages.sh "$1"
for program in swiftcache-broker swiftcache; do
    if [ ! -x "target/debug/$program" ]; then
        "${CARGO:-cargo}" build --workspace --all-targets --locked
    fi
done
env -u CONDA_PREFIX VIRTUAL_ENV="$venv" "$venv/bin/maturin" develop --quiet --skip-install --locked \
    --manifest-path engine-adapter/Cargo.toml
