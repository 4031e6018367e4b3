#!/usr/bin/env bash
# Checks deploy/, the protocol's tools, the supply chain and the commands of docs/operations.md. Everything it
# installs goes into target/; what cannot be installed is named, with the reason, and counts as skipped.
# The binaries in target/debug must have been built.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/deploy-venv
requirements=tests/deploy/requirements.txt
stamp=$venv/.requirements
if ! cmp -s "$requirements" "$stamp"; then
    tests/system.sh python3-venv
    "${PYTHON:-python3}" -m venv --clear "$venv"
    tests/retry.sh "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
    cp "$requirements" "$stamp"
fi
"$venv/bin/python" tests/deploy/tools.py
exec "$venv/bin/python" -m pytest -c tests/deploy/pytest.ini --rootdir tests/deploy tests/deploy "$@"
