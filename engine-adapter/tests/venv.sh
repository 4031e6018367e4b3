#!/usr/bin/env bash
# Makes the Python environment with the pinned build and test tools, if it is not there, and prints where it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$PWD/target/python-venv
tests/venv.sh "$venv" engine-adapter/tests/requirements.txt >&2
echo "$venv"
