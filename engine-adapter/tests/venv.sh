#!/usr/bin/env bash
# Makes the Python environment with the pinned build and test tools, if it is not there, and prints where it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$PWD/target/python-venv
requirements=engine-adapter/tests/requirements.txt
stamp=$venv/.requirements
if ! cmp -s "$requirements" "$stamp"; then
    tests/system.sh python3-venv
    "${PYTHON:-python3}" -m venv --clear "$venv" >&2
    tests/retry.sh "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements" >&2
    cp "$requirements" "$stamp"
fi
echo "$venv"
