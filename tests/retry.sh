#!/usr/bin/env bash
# Runs a command that downloads: up to three times, since networks fail.
set -uo pipefail
for pause in 5 20; do
    "$@" && exit
    echo "failed, and tried again in $pause s: $*" >&2
    sleep "$pause"
done
exec "$@"
