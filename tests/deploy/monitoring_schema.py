"""A schema of the Prometheus operator's objects. It has only the fields that our objects use. The operator ignores
unknown fields silently; this schema refuses them."""

import jsonschema

TEXT = {"type": "string", "minLength": 1}
DURATION = {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required, optional=()):
    """The schema of an object with these fields and no others."""
    return {
        "type": "object", "additionalProperties": False,
        "required": list(required), "properties": {**required, **dict(optional)},
    }


def some(items):
    return {"type": "array", "minItems": 1, "items": items}


RULE = {"oneOf": [
    closed({"record": TEXT, "expr": TEXT}, {"labels": TEXTS}),
    closed({"alert": TEXT, "expr": TEXT},
           {"for": DURATION, "keep_firing_for": DURATION, "labels": TEXTS, "annotations": TEXTS}),
]}
RELABELING = closed({}, {
    "sourceLabels": some(TEXT), "separator": {"type": "string"}, "targetLabel": TEXT, "regex": TEXT,
    "replacement": {"type": "string"}, "action": TEXT,
})
ENDPOINT = closed({"port": TEXT}, {
    "path": {"type": "string", "pattern": "^/"}, "interval": DURATION, "scrapeTimeout": DURATION,
    "relabelings": some(RELABELING),
})
SPECS = {
    "PrometheusRule": closed({"groups": some(closed({"name": TEXT, "rules": some(RULE)}, {"interval": DURATION}))}),
    "PodMonitor": closed({
        "selector": closed({"matchLabels": {**TEXTS, "minProperties": 1}}),
        "podMetricsEndpoints": some(ENDPOINT),
    }),
}


def faults(document):
    """The faults of a document, one line for each."""
    kind = document["kind"]
    if kind not in SPECS:
        return [f"{kind}: this test has no schema for it"]
    schema = closed({"apiVersion": {"const": "monitoring.coreos.com/v1"}, "kind": {"const": kind},
                     "metadata": {"type": "object", "required": ["name", "namespace"]}, "spec": SPECS[kind]})
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{kind} {error.json_path}: {error.message[:200]}" for error in found]
