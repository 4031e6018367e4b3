#!/usr/bin/env bash
# Creates the Python environment with the pinned build and test tools, if it is missing, and prints its path.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$PWD/target/python-venv
tests/venv.sh "$venv" engine-adapter/tests/requirements.txt >&2
echo "$venv"
