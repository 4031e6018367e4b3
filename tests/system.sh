#!/usr/bin/env bash
# Sees to it that Debian packages are there, by what they are needed for: installs those that are missing if it may,
# else names them. Prints nothing when all is there.
set -euo pipefail
python=${PYTHON:-python3}

is_there() {
    case $1 in
        python3-venv) "$python" -c 'import ensurepip, venv' ;;
        python3-dev) "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' ;;
        libnuma1) "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' ;;
        g++) command -v g++ ;;
        libssl-dev) echo '#include <openssl/sha.h>' | "${CC:-cc}" -E -x c - ;;
    esac >/dev/null 2>&1
}

missing() {
    for package in "$@"; do
        is_there "$package" || printf '%s ' "$package"
    done
}

lacking=$(missing "$@")
[ "$lacking" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    {
        "$(dirname "$0")/retry.sh" apt-get -qq update
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive "$(dirname "$0")/retry.sh" \
            apt-get -qq --yes --no-install-recommends install $lacking
    } >&2
    lacking=$(missing "$@")
fi
if [ "$lacking" ]; then
    echo "install what Debian calls: $lacking" >&2
    exit 1
fi
