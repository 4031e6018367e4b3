#!/usr/bin/env bash
# Checks deploy/, the protocol's tools, the supply chain and the commands of docs/operations.md. It installs everything
# into target/. If a tool cannot be installed, the summary says why, and its checks count as skipped. The binaries in
# target/debug must be built before. Arguments go to pytest; --setup only installs.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/deploy-venv
mkdir -p target
(
    # Who comes second waits.
    flock 9
    tests/venv.sh "$venv" tests/deploy/requirements.txt
    "$venv/bin/python" tests/deploy/tools.py
) 9>target/deploy.lock
if [ "${1-}" = --setup ]; then
    exit
fi
exec "$venv/bin/python" -m pytest -c tests/deploy/pytest.ini --rootdir tests/deploy tests/deploy "$@"
