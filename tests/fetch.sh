#!/usr/bin/env bash
# Fetches what the suites in Python need (12 GB), while `make test` compiles. A suite that needs it before waits; what fails here
# is tried again there, and told there.
cd "$(dirname "$0")/.." || exit
tests/engine_packages.sh vllm
tests/engine_packages.sh sglang
tests/deploy/run.sh --setup
