#!/usr/bin/env bash
# Makes the certificates of the TLS test anew, good for a hundred years: a test authority, and what it signed.
set -euo pipefail
cd "$(dirname "$0")"
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1-key.pem" 2>/dev/null; }
key ca
openssl req -x509 -key ca-key.pem -days 36500 -subj "/CN=SwiftCache test authority" -out ca.pem
for name in server client; do
    key "$name"
    openssl req -new -key "$name-key.pem" -subj "/CN=$name" \
        | openssl x509 -req -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 36500 \
            -extfile <(printf 'subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n') -out "$name.pem" 2>/dev/null
done
rm -f ca-key.pem ca.srl
