"""The alerts and the dashboard in `deploy/` use metrics of the server, and the alerts fire as expected."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from refract.serve.http.app import create_app

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_every_alert_uses_metrics_of_the_server(bundle, serving, make_image) -> None:
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text("utf-8"))["groups"][0]["rules"]
    used = {name for rule in rules for name in re.findall(r"refract_\w+", rule["expr"])}
    named = {name for rule in rules for name in re.findall(r"refract_\w+", str(rule["annotations"]))}
    info = dataclasses.replace(bundle.info, metrics={"accuracy": 0.9})
    app = create_app(dataclasses.replace(bundle, info=info))
    with serving(app) as client:
        response = client.post("/v1/predict", content=make_image(1))
        label = response.json()["predictions"][0]["label"]
        client.post("/v1/feedback", json={"id": response.headers["x-request-id"], "labels": [label]})
        exported = set(
            re.findall(r"^(\w+)", generate_latest(app.state.service.metrics.registry).decode(), re.MULTILINE)
        )
    assert used <= exported and len(used) > 8
    assert {name for name in named if not exported & {name, f"{name}_count"}} == set()
    alerts = {rule["alert"] for rule in rules}
    tested = yaml.safe_load((DEPLOY / "alerts_test.yaml").read_text("utf-8"))["tests"]
    fired = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == alerts, "each alert has a test in which it fires"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)")
def test_the_alerts_fire_as_their_unit_tests_expect() -> None:
    for arguments in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_shows_the_live_accuracy_next_to_the_test_accuracy() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))["panels"]
    queries = [" ".join(target["expr"] for target in panel["targets"]) for panel in panels]
    (live,) = [query for query in queries if "refract_live_accuracy_low" in query]
    assert "refract_test_accuracy" in live and "refract_live_accuracy_high" in live


def test_the_dashboard_shows_the_alerts_that_fire() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))["panels"]
    (query,) = [target["expr"] for panel in panels for target in panel["targets"] if "ALERTS" in target["expr"]]
    (pattern,) = re.findall(r'alertname=~"([^"]+)"', query)
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text("utf-8"))["groups"][0]["rules"]
    assert all(re.fullmatch(pattern, rule["alert"]) for rule in rules) and 'alertstate="firing"' in query
    assert len({panel["id"] for panel in panels}) == len(panels)
