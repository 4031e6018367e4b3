#!/usr/bin/env bash
# Makes an archive of the built programs, for people without a compiler: `make package`, and the release workflow.
#   package.sh BUILT OUT    BUILT has the programs; the archive and its checksum go to OUT.
set -euo pipefail
built=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
name=swiftcache-$version-$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
new=$(mktemp -d "$out/.package.XXXXXX")
trap 'rm -rf "$new"' EXIT
mkdir -p "$new/$name"/{bin,systemd,man}
install -m 0755 "$built/swiftcache-broker" "$built/swiftcache" "$new/$name/bin/"
install -m 0644 deploy/systemd/* "$new/$name/systemd/"
install -m 0644 LICENSE README.md CHANGELOG.md "$new/$name/"
"$built/swiftcache" man >"$new/$name/man/swiftcache.1"
python3 deploy/supply-chain/sbom.py "$new/$name/swiftcache.cdx.json"
# The same programs make the same archive, whoever packs them and when.
tar --create --gzip --file "$new/$name.tar.gz" --directory "$new" --sort=name --owner=0 --group=0 --numeric-owner \
    --mtime="@${SOURCE_DATE_EPOCH:-0}" "$name"
(cd "$new" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
mv "$new/$name.tar.gz" "$new/$name.tar.gz.sha256" "$out/"
echo "$out/$name.tar.gz"
