#!/usr/bin/env bash
# Makes the certificates of the TLS test anew: a test authority and what it signed, good for a hundred years, and two
# certificates that were good for a day long ago.
set -euo pipefail
cd "$(dirname "$0")"
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1-key.pem" 2>/dev/null; }
ca=$(mktemp -d)
trap 'rm -rf "$ca"' EXIT
touch "$ca/index"
cat > "$ca/ca.conf" <<CONF
[ca]
default_ca = test
[test]
database = $ca/index
new_certs_dir = $ca
rand_serial = yes
unique_subject = no
default_md = sha256
policy = any
x509_extensions = leaf
[any]
commonName = supplied
[leaf]
subjectAltName = DNS:localhost
basicConstraints = CA:FALSE
CONF
key ca
openssl req -x509 -key ca-key.pem -days 36500 -subj "/CN=SwiftCache test authority" -out ca.pem
# The name of the certificate, the key, and the first and the last moment at which it is good.
sign() {
    openssl req -new -key "$2-key.pem" -subj "/CN=$2" -out "$ca/request.pem"
    openssl ca -batch -notext -config "$ca/ca.conf" -cert ca.pem -keyfile ca-key.pem -in "$ca/request.pem" -out "$1.pem" \
        -startdate "$3" -enddate "$4" 2>/dev/null
}
for name in server client; do
    key "$name"
    sign "$name" "$name" 20250101000000Z 21250101000000Z
    sign "expired-$name" "$name" 20200101000000Z 20200102000000Z
done
rm -f ca-key.pem
