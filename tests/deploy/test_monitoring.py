"""Checks that promtool accepts the alerts, and that alerts and dashboard use metrics that exist."""

import json
import re

import pytest
import yaml

from tools import ROOT

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
RULES_TEST = ROOT / "deploy" / "prometheus" / "rules_test.yaml"
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "swiftcache.json"
OPERATIONS = ROOT / "docs" / "operations.md"


def rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard_expressions():
    board = json.loads(DASHBOARD.read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])
    yield from (annotation["expr"] for annotation in board["annotations"]["list"])
    yield from (variable["query"]["query"] for variable in board["templating"]["list"]
                if variable["type"] == "query")


def metrics_in(expressions):
    """The names of the metrics in expressions, without the suffixes of a histogram's parts."""
    names = {name for text in expressions for name in re.findall(r"\bswiftcache_\w+", text)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def recorded_in(expressions):
    return {name for text in expressions for name in re.findall(r"\bswiftcache:\w+:\w+", text)}


@pytest.mark.tool("promtool")
def test_rules(tool):
    done = tool("check", "rules", RULES)
    assert done.returncode == 0, done.stderr
    done = tool("check", "config", PROMETHEUS)
    assert done.returncode == 0, done.stderr


@pytest.mark.tool("promtool")
def test_alerts_fire_when_they_should(tool):
    done = tool("test", "rules", RULES_TEST)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules() if "alert" in rule])
@pytest.mark.tool("promtool")
def test_an_alert_that_never_fires_is_noticed(tool, tmp_path, alert):
    """This shows that the rules' tests have, for each alert, a case in which it fires."""
    text = RULES.read_text()
    found = yaml.safe_load(text)
    for rule in found["groups"][0]["rules"]:
        if rule.get("alert") == alert:
            rule["expr"] = f"({rule['expr']}) and on () vector(1) < 0"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(found))
    (tmp_path / "rules_test.yaml").write_text(RULES_TEST.read_text())
    done = tool("test", "rules", tmp_path / "rules_test.yaml")
    assert done.returncode != 0 and alert in done.stdout + done.stderr


@pytest.mark.tool("promtool")
def test_hits_of_the_broker_alone_would_be_noticed(tool, tmp_path):
    """The broker finds nothing for one replica whose cache works: an alert on its lookups is silent when that ends."""
    text = RULES.read_text()
    wrong = text.replace("swiftcache_engine_", "swiftcache_")
    assert wrong != text
    (tmp_path / "rules.yaml").write_text(wrong)
    (tmp_path / "rules_test.yaml").write_text(RULES_TEST.read_text())
    done = tool("test", "rules", tmp_path / "rules_test.yaml")
    assert done.returncode != 0 and "SwiftCacheHitCollapse" in done.stdout + done.stderr


def test_hits_are_those_that_engines_report():
    board = json.loads(DASHBOARD.read_text())
    shares = [target["expr"] for panel in board["panels"] for target in panel["targets"]
              if panel["fieldConfig"]["defaults"]["unit"] == "percentunit" and "hit" in target["expr"]]
    assert shares
    for expression in shares + [rule["expr"] for rule in rules() if "hit" in rule.get("record", "")]:
        assert not re.search(r"swiftcache_(hit|lookup)_blocks_total", expression), expression


def test_every_alert_says_what_and_why():
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_recorded_names_are_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = recorded_in(dashboard_expressions()) | recorded_in(rule["expr"] for rule in rules())
    assert used == recorded


def test_the_dashboard_is_laid_out():
    board = json.loads(DASHBOARD.read_text())
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    identities = [panel["id"] for panel in board["panels"]]
    assert len(identities) == len(set(identities))
