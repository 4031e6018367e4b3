#!/usr/bin/env bash
# Checks deploy/, the protocol's tools, the supply chain and the commands of docs/operations.md. It installs everything
# into target/. If a tool cannot be installed, the summary says why, and its checks count as skipped. The binaries in
# target/debug must be built before.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/deploy-venv
tests/venv.sh "$venv" tests/deploy/requirements.txt
"$venv/bin/python" tests/deploy/tools.py
exec "$venv/bin/python" -m pytest -c tests/deploy/pytest.ini --rootdir tests/deploy tests/deploy "$@"
