"""A real Prometheus scrapes a real broker. Every metric that the rules, the dashboard and the document name exists."""

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
import yaml

from conftest import on_a_free_port
from test_monitoring import OPERATIONS, PROMETHEUS, RULES, dashboard_expressions, metrics_in, rules

# Lines in the text of a scrape.
TYPE = re.compile(r"^# TYPE (\w+) (\w+)$", re.MULTILINE)
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ", re.MULTILINE)


def fetch(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture(scope="session")
def scrape(broker, lent):
    return fetch(f"http://127.0.0.1:{broker.metrics_port}/metrics")


def labels_of(scrape):
    found = {}
    for metric, labels in SAMPLE.findall(scrape):
        metric = re.sub(r"_(bucket|sum|count)$", "", metric)
        found.setdefault(metric, set()).update(re.findall(r'(\w+)="', labels))
    return {metric: labels - {"le"} for metric, labels in found.items()}


@pytest.mark.tool("promtool")
def test_promtool_likes_the_metrics(tool, scrape):
    done = tool("check", "metrics", input=scrape)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tool("promtool")
def test_promtool_dislikes_others(tool):
    bad = "# HELP swiftcache_lookups Lookups.\n# TYPE swiftcache_lookups counter\nswiftcache_lookups 1\n"
    assert tool("check", "metrics", input=bad).returncode != 0


def missing(names, scrape):
    return sorted(set(names) - {metric for metric, _ in TYPE.findall(scrape)})


def test_rules_and_dashboard_name_metrics_that_exist(scrape):
    named = metrics_in(dashboard_expressions()) | metrics_in(rule["expr"] for rule in rules())
    assert len(named) > 15
    assert missing(named, scrape) == []
    assert missing(["swiftcache_no_such_total"], scrape) == ["swiftcache_no_such_total"]


def test_the_document_lists_every_metric_with_its_kind_and_labels(scrape):
    rows = re.findall(r"^\| `(swiftcache_\w+)` \| (\w+) \| (.*?) \|", OPERATIONS.read_text(), re.MULTILINE)
    documented = {metric: (kind, set(re.findall(r"`(\w+)`", labels))) for metric, kind, labels in rows}
    labels = labels_of(scrape)
    actual = {metric: (kind, labels.get(metric, set())) for metric, kind in TYPE.findall(scrape)}
    assert documented == actual


def test_the_accounts_are_in_the_scrape(scrape, lent):
    states = re.findall(r'^swiftcache_offered_bytes\{.*device="(.*?)".*state="([\w-]+)".*\} (\d+)$', scrape, re.MULTILINE)
    of_device = {state: int(value) for device, state, value in states if device == lent.device}
    assert set(of_device) == {"free", "drained", "leased", "working-set", "estate", "draining", "zombie", "scrubbing"}
    assert sum(of_device.values()) > 0


class RunningPrometheus:
    """A Prometheus that scrapes one broker every 2 s, with the committed rules."""

    def __init__(self, program, directory, target):
        settings = yaml.safe_load(PROMETHEUS.read_text())
        settings["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"}
        settings["rule_files"] = [str(RULES)]
        settings["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(settings))
        self.command = [program, f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data"]
        self.log = directory / "log"
        on_a_free_port(self.start, self.log)

    def start(self, port):
        self.base = f"http://127.0.0.1:{port}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*self.command, f"--web.listen-address=127.0.0.1:{port}"],
                                            stdout=log, stderr=log)
        try:
            self.until(lambda: fetch(f"{self.base}/-/ready"), "Prometheus")
        except AssertionError:
            self.process.kill()
            self.process.wait()
            raise

    def query(self, expression):
        query = urllib.parse.urlencode({"query": expression})
        return json.loads(fetch(f"{self.base}/api/v1/query?{query}"))["data"]["result"]

    def until(self, condition, what):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"{what} never came:\n{self.log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def prometheus(tools, broker, lent, tmp_path_factory):
    if "problem" in tools["prometheus"]:
        pytest.skip(f"prometheus NOT RUN: {tools['prometheus']['problem']}")
    running = RunningPrometheus(tools["prometheus"]["path"], tmp_path_factory.mktemp("prometheus"),
                                f"127.0.0.1:{broker.metrics_port}")
    yield running
    running.process.terminate()
    running.process.wait(timeout=120)


@pytest.mark.tool("prometheus")
def test_prometheus_scrapes_the_broker(prometheus):
    prometheus.until(lambda: prometheus.query('up{job="swiftcache"} == 1'), "the target")
    result = prometheus.until(lambda: prometheus.query("sum(swiftcache_offered_bytes)"), "a sample")
    assert int(result[0]["value"][1]) > 0


@pytest.mark.tool("prometheus")
def test_prometheus_evaluates_every_rule(prometheus):
    def groups():
        data = json.loads(fetch(f"{prometheus.base}/api/v1/rules"))["data"]["groups"]
        evaluated = [rule for group in data for rule in group["rules"] if rule["health"] != "unknown"]
        return evaluated if len(evaluated) == len(rules()) else None
    for rule in prometheus.until(groups, "the rules"):
        assert rule["health"] == "ok", rule
    assert prometheus.query("swiftcache:revoke_seconds:p99_5m") is not None


@pytest.mark.tool("prometheus")
def test_prometheus_answers_every_panel(prometheus):
    """Sends the queries that Grafana would send, with its variables filled in. A rate needs two scrapes."""
    prometheus.until(lambda: prometheus.query("rate(swiftcache_lookups_total[1m]) >= 0"), "a rate")
    for text in dashboard_expressions():
        if text.startswith("label_values"):
            continue
        filled = text.replace("$__rate_interval", "1m").replace("$node", ".*")
        # On an idle node, ratios and quantiles have no sample.
        idle = re.search(r"swiftcache:|/|changes\(", filled)
        prometheus.until(lambda: prometheus.query(filled) or idle, filled)
