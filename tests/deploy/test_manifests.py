"""Checks the Kubernetes manifests and the chart that they are rendered from."""

import copy
import json
import os
import re
import shutil
import subprocess
import tomllib

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

import monitoring_schema
from manifest_rules import containers, documents, faults, pod_specs
from tools import ROOT

DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart" / "swiftcache"
FILES = sorted([*DEPLOY.glob("manifests/*.yaml"), *DEPLOY.glob("examples/*.yaml")])
PLAIN = [path for path in FILES if path.name != "monitoring.yaml"]
# The three Kubernetes versions that are supported at a time, oldest first.
VERSIONS = sorted(
    {utils.major_minor(version) for version in utils.all_versions()},
    key=lambda version: tuple(map(int, version.split("."))),
)[-3:]
KUBERNETES_VERSION = VERSIONS[-1]
MONITORING = [
    "--set", "metrics.podMonitor.enabled=true", "--set", "metrics.prometheusRule.enabled=true",
    "--set", "metrics.grafanaDashboard.enabled=true",
]


def daemonset(found):
    return next(document for document in found if document["kind"] == "DaemonSet")


def committed():
    return documents((DEPLOY / "manifests" / "swiftcache.yaml").read_text())


def render(helm, *arguments):
    done = helm("template", "swiftcache", CHART, "--namespace", "swiftcache",
                "--kube-version", f"{KUBERNETES_VERSION}.0", *arguments)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def schema_faults(found, version):
    problems = []
    for document in found:
        if document["apiVersion"].startswith("monitoring.coreos.com/"):
            problems += monitoring_schema.faults(document)
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as problem:
            problems.append(f"{document['kind']} {'.'.join(map(str, problem.path))}: {problem.message}")
    return problems


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.tool("kubernetes-validate")
def test_schema(path, version):
    assert schema_faults(documents(path.read_text()), version) == []


@pytest.mark.tool("kubernetes-validate")
def test_schema_faults_are_noticed():
    found = copy.deepcopy(committed())
    spec = daemonset(found)["spec"]["template"]["spec"]
    spec["hostIPCs"] = True
    spec["containers"][0]["resources"]["limits"]["memory"] = ["8Gi"]
    assert len(schema_faults(found, KUBERNETES_VERSION)) == 1, "the validator stops at the first of a document"
    del spec["hostIPCs"]
    assert "memory" in schema_faults(found, KUBERNETES_VERSION)[0]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.name)
def test_pods_ask_for_little(path):
    assert faults(documents(path.read_text())) == []


@pytest.mark.parametrize("change, expected", [
    (lambda spec: spec.update(hostIPC=True), "hostIPC"),
    (lambda spec: spec.update(hostNetwork=True), "hostNetwork"),
    (lambda spec: spec.update(hostPID=True), "hostPID without"),
    (lambda spec: spec.update(runtimeClassName="runc"), "runtimeClassName"),
    (lambda spec: spec["volumes"][1]["hostPath"].update(type="Socket"), "of type Socket"),
    (lambda spec: spec["containers"][0]["securityContext"].update(privileged=True), "privileged"),
    (lambda spec: spec["containers"][0]["securityContext"].update(runAsUser=0), "may run as root"),
    (lambda spec: spec["containers"][0]["securityContext"].update(capabilities={"drop": ["NET_RAW"]}), "drop all"),
    (lambda spec: spec["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]), "SYS_PTRACE"),
    (lambda spec: spec["initContainers"][0]["securityContext"]["capabilities"].update(add=["CHOWN", "SYS_ADMIN"]),
     "SYS_ADMIN"),
    (lambda spec: spec["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": 1}), "device plugin"),
    (lambda spec: spec["containers"][0]["resources"].pop("limits"), "no memory limits"),
    (lambda spec: spec["securityContext"].pop("seccompProfile"), "seccomp"),
])
def test_pods_that_ask_for_more_are_noticed(change, expected):
    found = copy.deepcopy(committed())
    change(daemonset(found)["spec"]["template"]["spec"])
    assert any(expected in fault for fault in faults(found)), faults(found)


def test_engines_can_use_the_sockets():
    """The example engine is in the group that owns the sockets' directory, and the paths agree."""
    [(_, node)] = pod_specs(committed())
    prepare, broker = node["initContainers"]
    [(_, engine)] = pod_specs(documents((DEPLOY / "examples" / "vllm-pod.yaml").read_text()))
    group = engine["securityContext"]["supplementalGroups"][0]
    assert f"--group={group}" in prepare["command"]
    assert broker["securityContext"]["runAsGroup"] == group
    path = next(volume["hostPath"]["path"] for volume in node["volumes"] if volume["name"] == "sockets")
    for spec in (node, engine):
        for container in containers(spec):
            socket = {entry["name"]: entry["value"] for entry in container.get("env", [])}.get("SWIFTCACHE_SOCKET")
            if container["name"] != "prepare":
                assert socket == f"{path}/broker.sock"
                assert path in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert engine["securityContext"]["runAsUser"] != broker["securityContext"]["runAsUser"]


def test_engines_have_every_device_node_and_enumerate_one_gpu():
    """Memory is lent by descriptor: it opens where its GPU's node is, whatever CUDA enumerates."""
    [(_, engine)] = pod_specs(documents((DEPLOY / "examples" / "vllm-pod.yaml").read_text()))
    [container] = containers(engine)
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment["CUDA_VISIBLE_DEVICES"].isdigit(), "one GPU, the engine's own"
    resources = container["resources"]
    assert not any("gpu" in name for kind in resources.values() for name in kind), "a claim would hide the other nodes"


def test_the_donor_stops_before_the_broker():
    """A sidecar ends after the pod's other containers, so the donor can still give its regions back."""
    spec = daemonset(committed())["spec"]["template"]["spec"]
    broker = spec["initContainers"][1]
    assert (broker["name"], broker["restartPolicy"]) == ("broker", "Always")
    assert [container["name"] for container in spec["containers"]] == ["donor"]
    settings = broker_config(committed())
    assert spec["terminationGracePeriodSeconds"] * 1000 > settings["drain_ms"] + settings["shutdown_ms"]


def broker_config(found):
    config = next(document for document in found if document["kind"] == "ConfigMap")
    return tomllib.loads(config["data"]["broker.toml"])


@pytest.mark.tool("helm")
def test_lint(tool):
    done = tool("lint", "--strict", "--kube-version", f"{KUBERNETES_VERSION}.0", CHART)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tool("helm")
def test_the_manifests_are_the_charts(tool, tmp_path):
    done = subprocess.run(
        [DEPLOY / "manifests" / "render.sh", tmp_path], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HELM": tool.path, "KUBE_VERSION": f"{KUBERNETES_VERSION}.0"},
    )
    assert done.returncode == 0, done.stderr
    for name in ("swiftcache.yaml", "monitoring.yaml"):
        rendered = (tmp_path / name).read_text()
        assert rendered == (DEPLOY / "manifests" / name).read_text(), f"run deploy/manifests/render.sh: {name}"


@pytest.mark.tool("helm")
def test_the_hold_is_off_unless_asked_for_and_fits_an_engines_pod(tool):
    def holds(found):
        return [document for document in found if document["metadata"]["name"] == "swiftcache-hold"]

    assert not holds(render(tool))
    [config] = holds(render(tool, "--set", "hold.enabled=true", "--set", "hold.args={--device=2,--free=9GiB}"))
    container = yaml.safe_load(config["data"]["init-container.yaml"])
    assert container["command"] + container["args"] == ["swiftcache", "hold", "--device=2", "--free=9GiB"]
    pod = documents((DEPLOY / "examples" / "vllm-pod.yaml").read_text())
    pod[0]["spec"]["initContainers"] = [container]
    assert faults(pod) == []
    for version in VERSIONS:
        assert schema_faults(pod, version) == []


@pytest.mark.tool("helm")
def test_a_disk_runs_as_the_engines_user_and_keeps_its_file_on_the_node(tool):
    [(_, engine)] = pod_specs(documents((DEPLOY / "examples" / "vllm-pod.yaml").read_text()))
    uid = engine["securityContext"]["runAsUser"]
    more = ["--set", "disk.args={--buffered}", "--set-json", "disk.bytes=7000000000"]
    spec = daemonset(render(tool, *DISK, "--set", f"disk.uid={uid}", *more))
    spec = spec["spec"]["template"]["spec"]
    named = {container["name"]: container for container in containers(spec)}
    disk, prepare = named["disk"], named["prepare-disk"]
    assert disk["securityContext"]["runAsUser"] == uid, "the uid decides whose blocks it serves"
    assert disk["securityContext"]["runAsGroup"] == named["broker"]["securityContext"]["runAsGroup"]
    assert disk["command"] == ["swiftcache", "donate"]
    path = "/var/lib/swiftcache-disk"
    assert disk["args"] == ["--device=DISK-0", f"--path={path}", "--bytes=7000000000", "--memory=1GiB", "--buffered"]
    [volume] = [volume for volume in spec["volumes"] if volume["name"] == "disk"]
    assert volume["hostPath"] == {"path": path, "type": "DirectoryOrCreate"}
    assert {"name": "disk", "mountPath": path} in disk["volumeMounts"]
    assert f"--owner={uid}" in prepare["command"] and path in prepare["command"]
    # The twin: without it there is nothing of it.
    spec = daemonset(render(tool))["spec"]["template"]["spec"]
    assert not any("disk" in part["name"] for part in containers(spec) + spec["volumes"])


@pytest.mark.tool("helm")
def test_host_memory_is_lent_by_numa_node_and_fits_its_limit(tool):
    spec = daemonset(render(tool, "--set", "hostMemory.nodes={0,1}"))["spec"]["template"]["spec"]
    lending = [container for container in spec["containers"] if container["name"].startswith("host-memory-")]
    assert [container["args"][0] for container in lending] == ["--device=HOST-0", "--device=HOST-1"]
    for container in lending:
        [lent] = [flag for flag in container["args"] if flag.startswith("--bytes=")]
        limit = container["resources"]["limits"]["memory"]
        assert int(re.fullmatch(r"--bytes=(\d+)GiB", lent)[1]) < int(re.fullmatch(r"(\d+)Gi", limit)[1])


DISK = ["--set", "disk.enabled=true"]
CHOICES = {
    "defaults": [],
    "no network policy": ["--set", "networkPolicy.enabled=false"],
    "older kernels": ["--set", "deathWatch.hostPID=true"],
    "engines donate": ["--set", "donor.enabled=false"],
    "gpus by mounts": ["--set", "gpu.exposure=mounts"],
    "prepared hosts": ["--set", "paths.prepare=false"],
    "prepared, engines donate": ["--set", "paths.prepare=false", "--set", "donor.enabled=false"],
    "host memory": ["--set", "hostMemory.nodes={0,1}"],
    "a disk": [*DISK, "--set", "disk.uid=20001"],
    "no donor but a disk": [*DISK, "--set", "disk.uid=20001", "--set", "donor.enabled=false", "--set", "paths.prepare=false"],
    "no metrics": ["--set", "metrics.enabled=false", "--set", "networkPolicy.metricsFrom=null"],
    "monitoring": MONITORING,
}


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.replace(" ", "-").replace(",", ""))
@pytest.mark.tool("helm")
def test_every_choice_renders_soundly(tool, choice):
    found = render(tool, *CHOICES[choice])
    assert faults(found, host_pid_allowed=choice == "older kernels") == []
    for version in VERSIONS:
        assert schema_faults(found, version) == []
    spec = daemonset(found)["spec"]["template"]["spec"]
    assert [c["name"] for c in containers(spec)].count("broker") == 1
    assert spec["hostPID"] == (choice == "older kernels")
    assert ("NetworkPolicy" in {document["kind"] for document in found}) == (choice != "no network policy")
    broker = next(container for container in containers(spec) if container["name"] == "broker")
    assert ("restartPolicy" in broker) == ("engines donate" not in choice)


@pytest.mark.parametrize("arguments, expected", [
    (["--set", "identity.uid=0"], "minimum"),
    (["--set", "gpu.exposure=cdi"], "exposure"),
    (["--set", "broker.config.socket=/elsewhere"], "socket"),
    (["--set", "metrics.prot=1"], "prot"),
    (["--set", "metrics.port=80"], "/metrics/port"),
    (["--set", "broker.config.drain_ms=abc"], "drain_ms"),
    (["--set", "broker.config.drain_ms=0"], "drain_ms"),
    (["--set", "broker.config.drian_ms=2000"], "drian_ms"),
    (["--set", "broker.config.probe=simulated,broker.config.topology=hgx-9"], "topology"),
    (["--set", "broker.config.topology=hgx-8"], "broker"),
    (["--set", "broker.config.admin_group=no such group"], "admin_group"),
    (["--set", "broker.config.admin_group=admins"], "admin_group"),
    (["--set", "broker.config.listen_tcp=here"], "listen_tcp"),
    (["--set", "broker.config.tls_cert=/cert.pem"], "broker"),
    (["--set", "broker.config.tenant_weights=1000"], "tenant_weights"),
    (["--set", "broker.config.listen_tcp=0.0.0.0:9478"], "tls.secretName"),
    (["--set", "broker.tls.secretName=certificates"], "listen_tcp"),
    (["--set", "disk.enabled=true"], "disk.uid: set it to the user that the engines run as"),
    (["--set", "disk.enabled=true", "--set", "disk.uid=0"], "/disk/uid"),
    (["--set", "disk.bytes=much"], "/disk/bytes"),
    (["--set", "disk.path=here"], "/disk/path"),
    (["--set", "hostMemory.bytes=0"], "/hostMemory/bytes"),
    (["--set", "hostMemory.nodes={-1}"], "/hostMemory/nodes"),
    (["--set", "seLinuxOptions.typ=spc_t"], "typ"),
    (["--kube-version", "1.30.0"], "kubeVersion"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
@pytest.mark.tool("helm")
def test_bad_values_are_refused(tool, arguments, expected):
    kube = [] if "--kube-version" in arguments else ["--kube-version", f"{KUBERNETES_VERSION}.0"]
    done = tool("template", "swiftcache", CHART, *kube, *arguments)
    assert done.returncode != 0
    assert expected in done.stderr, done.stderr


def schema_of_settings():
    schema = json.loads((CHART / "values.schema.json").read_text())
    return schema["properties"]["broker"]["properties"]["config"]["properties"]


def test_the_schema_knows_every_setting_and_its_bounds(tmp_path):
    """Chart and broker refuse the same: every setting of the broker that the chart does not set itself is in the schema, with
    the broker's own bounds."""
    broker = ROOT / "target" / "debug" / "swiftcache-broker"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SWIFTCACHE_")}

    def run(*arguments):
        return subprocess.run([broker, *arguments], capture_output=True, text=True, timeout=120, env=clean)

    settings = schema_of_settings()
    flags = set(re.findall(r"^ +(?:-\w, )?--([a-z-]+)", run("--help").stdout, re.MULTILINE))
    flags -= {"config", "print-config", "check-config", "help", "version"}
    own = {"socket", "fd_socket", "socket_group", "state_dir", "metrics_listen"}
    assert {flag.replace("-", "_") for flag in flags} == set(settings) | own

    def accepts(key, value):
        path = tmp_path / "broker.toml"
        path.write_text(f"{key} = {value}\n")
        return run("--config", path, "--check-config").returncode == 0

    for key, rule in settings.items():
        if rule.get("type") == "integer" and "maximum" in rule:
            inside, outside = (rule["minimum"], rule["maximum"]), (rule["minimum"] - 1, rule["maximum"] + 1)
            assert [accepts(key, value) for value in inside + outside] == [True, True, False, False], key


@pytest.mark.tool("helm")
def test_certificates_come_from_a_secret_and_clients_are_let_in(tool, tmp_path):
    arguments = ["--set", "broker.tls.secretName=certificates", "--set", "broker.config.listen_tcp=0.0.0.0:9478",
                 "--set-json", 'networkPolicy.adminFrom=[{"ipBlock": {"cidr": "10.0.0.0/8"}}]']
    found = render(tool, *arguments)
    assert faults(found) == []
    for version in VERSIONS:
        assert schema_faults(found, version) == []
    spec = daemonset(found)["spec"]["template"]["spec"]
    mounting = {c["name"]: [m["mountPath"] for m in c["volumeMounts"] if m["name"] == "tls"] for c in containers(spec)}
    [directory] = mounting.pop("broker")
    assert not any(mounting.values()), "nobody but the broker has the key"
    [secret] = [volume["secret"] for volume in spec["volumes"] if "secret" in volume]
    assert secret == {"secretName": "certificates", "defaultMode": 0o444}
    settings = broker_config(found)
    files = [settings[key] for key in ("tls_cert", "tls_key", "tls_client_ca")]
    assert files == [f"{directory}/{name}" for name in ("tls.crt", "tls.key", "ca.crt")]
    policy = next(document for document in found if document["kind"] == "NetworkPolicy")["spec"]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == [9477, 9478]
    # The broker starts with them.
    tls = ROOT / "broker" / "tests" / "broker" / "tls"
    text = next(d for d in found if d["kind"] == "ConfigMap")["data"]["broker.toml"]
    for ours, theirs in (("tls.crt", "server.pem"), ("tls.key", "server-key.pem"), ("ca.crt", "ca.pem")):
        text = text.replace(f"{directory}/{ours}", str(tls / theirs))
    (tmp_path / "broker.toml").write_text(text)
    done = subprocess.run([ROOT / "target/debug/swiftcache-broker", "--config", tmp_path / "broker.toml", "--check-config"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.tool("helm")
def test_selinux_options_reach_the_pod(tool):
    found = render(tool, "--set", "seLinuxOptions.type=spc_t")
    assert daemonset(found)["spec"]["template"]["spec"]["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}
    for version in VERSIONS:
        assert schema_faults(found, version) == []
    assert "seLinuxOptions" not in daemonset(render(tool))["spec"]["template"]["spec"]["securityContext"]


@pytest.mark.tool("helm")
def test_notes_tell_what_stops_newcomers(tool, tmp_path):
    # helm shows notes only where there is a cluster. So they become an object of a copy of the chart.
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    text = (chart / "templates" / "NOTES.txt").read_text()
    head = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: notes\ndata:\n  notes: |\n"
    lines = [f"    {line}" for line in text.splitlines()]
    (chart / "templates" / "notes.yaml").write_text(head + "\n".join(lines) + "\n")

    def notes(*arguments):
        done = tool("template", "swiftcache", chart, "--namespace", "swiftcache", "--show-only", "templates/notes.yaml",
                    "--kube-version", f"{KUBERNETES_VERSION}.0", *arguments)
        assert done.returncode == 0, done.stderr
        return documents(done.stdout)[0]["data"]["notes"]

    shown = notes()
    for part in ("without a registry", "pod-security.kubernetes.io/enforce=privileged", "nvidia.com/gpu: 1",
                 "by\ndescriptor", '"lend"', "seLinuxOptions", "--explain"):
        assert part in shown, (part, shown)
    shown = notes("--set", "image.repository=registry.example/swiftcache", "--set", "donor.enabled=false",
                  "--set", "seLinuxOptions.type=spc_t")
    for part in ("without a registry", "--explain", "set seLinuxOptions"):
        assert part not in shown, part


def test_images_of_the_manifests_are_pulled_from_somewhere():
    """A name without a registry is Docker Hub's library, which has no such image. The manifests say what to replace."""
    for path in PLAIN:
        text = path.read_text()
        for _, spec in pod_specs(documents(text)):
            for container in containers(spec):
                assert container["image"].startswith("registry.example/"), (path.name, container["image"])
                assert "# registry.example stands for" in text, path.name


@pytest.mark.tool("helm")
def test_rendering_replaces_all_manifests_or_none(tool, tmp_path):
    """Also when helm fails at the last of them, or in the middle of one."""
    out = tmp_path / "out"
    out.mkdir()
    before = {name: f"{name} of before\n" for name in ("swiftcache.yaml", "monitoring.yaml")}
    for name, text in before.items():
        (out / name).write_text(text)
    failing = tmp_path / "helm"
    failing.write_text(f"#!/bin/sh\ncase \"$*\" in *monitoring.yaml*) echo half; echo no >&2; exit 1;; esac\n"
                       f"exec {tool.path} \"$@\"\n")
    failing.chmod(0o755)

    def render_with(helm):
        return subprocess.run([DEPLOY / "manifests" / "render.sh", out], capture_output=True, text=True, timeout=120,
                              env={**os.environ, "HELM": str(helm), "KUBE_VERSION": f"{KUBERNETES_VERSION}.0"})

    done = render_with(failing)
    assert done.returncode != 0 and "no" in done.stderr
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    # The twin: with a helm that works, both are new, and nothing else is left.
    assert render_with(tool.path).returncode == 0
    after = {path.name: path.read_text() for path in out.iterdir()}
    assert set(after) == set(before) and not any(after[name] == before[name] for name in before)


@pytest.mark.parametrize("kind, change", [
    ("PrometheusRule", lambda found: found.update(spec="files/rules.yaml")),
    ("PrometheusRule", lambda found: found["spec"]["groups"][0]["rules"][0].pop("expr")),
    ("PrometheusRule", lambda found: found["spec"]["groups"][0].update(rule=[])),
    ("PodMonitor", lambda found: found["spec"].update(podMetricsEndpoints={"port": "metrics"})),
    ("PodMonitor", lambda found: found["spec"]["podMetricsEndpoints"][0].update(port=9400)),
    ("PodMonitor", lambda found: found["spec"].pop("selector")),
], ids=["a-string", "no-expression", "unknown-field", "no-list", "port-by-number", "no-selector"])
@pytest.mark.tool("own schema of the Prometheus operator's objects")
def test_unsound_monitoring_objects_are_noticed(kind, change):
    found = copy.deepcopy(documents((DEPLOY / "manifests" / "monitoring.yaml").read_text()))
    assert schema_faults(found, KUBERNETES_VERSION) == []
    changed = next(document for document in found if document["kind"] == kind)
    change(changed)
    assert len(schema_faults(found, KUBERNETES_VERSION)) == 1


LINKED = {"rules.yaml": DEPLOY / "prometheus" / "rules.yaml", "swiftcache.json": DEPLOY / "grafana" / "swiftcache.json"}


def test_the_charts_files_are_the_originals():
    """They are links to the only copy. A checkout without links would deploy files that contain only a path."""
    files = CHART / "files"
    assert {path.name for path in files.iterdir()} == set(LINKED)
    for name, original in LINKED.items():
        assert (files / name).is_symlink() and (files / name).resolve(strict=True) == original, name
    found = {document["kind"]: document for document in documents((DEPLOY / "manifests/monitoring.yaml").read_text())}
    assert found["PrometheusRule"]["spec"] == yaml.safe_load(LINKED["rules.yaml"].read_text())
    assert json.loads(found["ConfigMap"]["data"]["swiftcache.json"]) == json.loads(LINKED["swiftcache.json"].read_text())


@pytest.mark.tool("helm")
def test_monitoring_objects(tool):
    found = {document["kind"]: document for document in render(tool, *MONITORING)
             if document["kind"] in ("PodMonitor", "PrometheusRule")}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
    assert found["PrometheusRule"]["spec"] == rules
    monitor = found["PodMonitor"]["spec"]
    labels = daemonset(committed())["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    broker = daemonset(committed())["spec"]["template"]["spec"]["initContainers"][1]
    assert monitor["podMetricsEndpoints"][0]["port"] in [port["name"] for port in broker["ports"]]
    assert {rule["targetLabel"] for rule in monitor["podMetricsEndpoints"][0]["relabelings"]} == {"node", "job"}


@pytest.mark.tool("helm")
def test_traces_may_leave_when_the_values_say_so(tool):
    rule = {"to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}], "ports": [{"port": 4317, "protocol": "TCP"}]}
    found = render(tool, "--set-json", f"networkPolicy.egress=[{json.dumps(rule)}]",
                   "--set", "broker.config.otlp_endpoint=http://10.0.0.7:4317")
    assert schema_faults(found, KUBERNETES_VERSION) == []
    policy = next(document for document in found if document["kind"] == "NetworkPolicy")["spec"]
    assert policy["egress"] == [rule]
    assert broker_config(found)["otlp_endpoint"] == "http://10.0.0.7:4317"


def test_only_prometheus_may_call():
    policy = next(document for document in committed() if document["kind"] == "NetworkPolicy")["spec"]
    assert policy["egress"] == [] and sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    ports = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    broker = daemonset(committed())["spec"]["template"]["spec"]["initContainers"][1]
    assert ports == [port["containerPort"] for port in broker["ports"]]
    assert broker_config(committed())["metrics_listen"].endswith(f":{ports[0]}")
