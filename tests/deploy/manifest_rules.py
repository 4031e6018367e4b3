"""Rules for what SwiftCache's pods may ask of a node."""

import yaml


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def pod_specs(found):
    """(name, pod spec) of every object that creates pods."""
    for document in found:
        name = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "Pod":
            yield name, document["spec"]
        elif "template" in document.get("spec", {}):
            yield name, document["spec"]["template"]["spec"]


def containers(spec):
    return spec.get("initContainers", []) + spec["containers"]


def faults(found, host_pid_allowed=False):
    """Everything that the pods ask for and must not have, one line for each."""
    problems = []
    for name, spec in pod_specs(found):
        for key in ("hostIPC", "hostNetwork"):
            if spec.get(key):
                problems.append(f"{name}: {key}")
        if spec.get("hostPID") and not host_pid_allowed:
            problems.append(f"{name}: hostPID without deathWatch.hostPID")
        if spec.get("hostPID") and spec.get("shareProcessNamespace"):
            problems.append(f"{name}: hostPID and shareProcessNamespace exclude each other")
        if spec.get("runtimeClassName") != "nvidia":
            problems.append(f"{name}: runtimeClassName is {spec.get('runtimeClassName')}")
        for volume in spec.get("volumes", []):
            path = volume.get("hostPath", {}).get("path")
            kind = volume.get("hostPath", {}).get("type")
            if path and path != "/dev/null" and kind not in ("Directory", "DirectoryOrCreate"):
                problems.append(f"{name}: hostPath {path} is of type {kind}: mount directories")
        for container in containers(spec):
            problems += container_faults(f"{name}: {container['name']}", container, spec)
    return problems


def container_faults(name, container, spec):
    security = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
    if security.get("privileged"):
        yield f"{name}: privileged"
    if security.get("allowPrivilegeEscalation", True):
        yield f"{name}: allowPrivilegeEscalation"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: no seccomp profile"
    capabilities = security.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"]:
        yield f"{name}: does not drop all capabilities"
    # The containers that prepare directories are root, but all they can do as root is change owners.
    preparing = container["name"] in ("prepare", "prepare-disk")
    allowed = {"CHOWN", "FOWNER"} if preparing else set()
    # The runtime's seccomp profile lets mbind through with it.
    if container["name"].startswith("host-memory-"):
        allowed = {"SYS_NICE"}
    if extra := set(capabilities.get("add", [])) - allowed:
        yield f"{name}: adds {sorted(extra)}"
    if not preparing and (not security.get("runAsNonRoot") or security.get("runAsUser") == 0):
        yield f"{name}: may run as root"
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        if "memory" not in resources.get(kind, {}):
            yield f"{name}: no memory {kind}"
        if any("nvidia.com" in resource for resource in resources.get(kind, {})):
            yield f"{name}: claims a GPU of the device plugin"
    if "memory" in resources.get("limits", {}) and "cpu" in resources["limits"]:
        yield f"{name}: a CPU limit throttles"
