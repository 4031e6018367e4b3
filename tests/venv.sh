#!/usr/bin/env bash
# venv.sh DIRECTORY REQUIREMENTS: makes a Python environment with the pinned tools of a list, if it is not there.
set -euo pipefail
venv=$1
requirements=$2
stamp=$venv/.requirements
if ! cmp -s "$requirements" "$stamp"; then
    "$(dirname "$0")/system.sh" python3-venv
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$(dirname "$0")/retry.sh" "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
    cp "$requirements" "$stamp"
fi
