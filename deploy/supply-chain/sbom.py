#!/usr/bin/env python3
"""Writes the bill of materials of the two programs (CycloneDX 1.6, JSON) from `cargo metadata`: the crates that are
linked into swiftcache-broker and swiftcache on x86-64 Linux. Crates that only tests or build scripts use are not
shipped, and not listed. `sbom.py FILE` writes a file; without FILE it writes to standard output."""

import json
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = "x86_64-unknown-linux-gnu"
SHIPPED = ("swiftcache-broker", "swiftcache-cli")


def metadata():
    done = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", TARGET],
        stdout=subprocess.PIPE, check=True, cwd=ROOT,
    )
    return json.loads(done.stdout)


def package(metadata, identity):
    return next(found for found in metadata["packages"] if found["id"] == identity)


def shipped(metadata):
    """The nodes of the resolved graph that are linked into the programs, by id."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    waiting = [found["id"] for found in metadata["packages"] if found["name"] in SHIPPED and not found["source"]]
    reached = {}
    while waiting:
        identity = waiting.pop()
        if identity not in reached:
            reached[identity] = nodes[identity]
            waiting += links(nodes[identity])
    return reached


def links(node):
    return [dep["pkg"] for dep in node["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])]


def bill(metadata):
    checksums = {
        (found["name"], found["version"]): found.get("checksum")
        for found in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    }
    version = next(found["version"] for found in metadata["packages"] if found["name"] == SHIPPED[0])
    graph = shipped(metadata)
    packages = {identity: package(metadata, identity) for identity in graph}
    references = {identity: f"pkg:cargo/{found['name']}@{found['version']}" for identity, found in packages.items()}

    components = []
    for identity, found in packages.items():
        component = {
            "type": "library",
            "bom-ref": references[identity],
            "name": found["name"],
            "version": found["version"],
            "purl": references[identity],
        }
        if found["license"]:
            component["licenses"] = [{"expression": found["license"].replace(" / ", " OR ").replace("/", " OR ")}]
        if checksum := checksums[found["name"], found["version"]]:
            component["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        components.append(component)
    dependencies = [
        {"ref": references[identity], "dependsOn": sorted(references[dep] for dep in links(node))}
        for identity, node in graph.items()
    ]
    roots = [references[identity] for identity, found in packages.items() if found["name"] in SHIPPED]
    product = {"type": "application", "bom-ref": "swiftcache", "name": "swiftcache", "version": version}
    dependencies.append({"ref": "swiftcache", "dependsOn": sorted(roots)})
    body = {
        "metadata": {"component": product},
        "components": sorted(components, key=lambda component: component["purl"]),
        "dependencies": sorted(dependencies, key=lambda dependency: dependency["ref"]),
    }
    # The serial number is made from the content, so that the same lock file always gives the same bill.
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(body, sort_keys=True))
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{serial}", "version": 1, **body}


def main():
    text = json.dumps(bill(metadata()), indent=2) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
