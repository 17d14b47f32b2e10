"""What a server tells of itself, and whom it answers."""

import asyncio
import json
import logging
import re
import socket
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from serve import server
from serve.app import create_app
from serve.challenge import Challenge
from serve.engine import Engine
from serve.errors import RequestError
from serve.keys import Keys
from serve.limits import OverloadedError


def numbers(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_is_answered_on_a_port_of_its_own(bundle, serving, picture) -> None:
    app = create_app(bundle)
    port = app.state.service.metrics.listen("127.0.0.1", 0)
    with serving(app) as client:
        label = client.post("/v1/predict", content=picture(1)).json()["predictions"][0]["label"]
        client.post("/v1/predict", files=[("f", ("x.jpg", picture(1)))] * 3)
        client.post("/v1/predict", content=b"no picture")
        client.get("/nothing")
        assert client.get("/metrics").status_code == 404
        found = numbers(httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text)
    assert found["refract_requests_total", "ok"] == 2 and found["refract_requests_total", "invalid_image"] == 1
    assert ("refract_requests_total", "not_found") not in found, "of predictions alone"
    assert found["refract_predictions_total", label] == 4 and found["refract_confidence_count",] == 4
    assert found["refract_batch_pictures_sum",] == 4
    assert found["refract_request_seconds_count",] == 2
    assert {found["refract_stage_seconds_count", stage] for stage in ("prepare", "queue", "compute")} == {2}
    assert found["refract_model", bundle.digest[:16], "shapes"] == 1
    assert found["refract_requests_inside",] == found["refract_pictures_waiting",] == 0


def test_requests_have_a_name_and_a_line(bundle, serving, picture, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve.access")
    with serving(create_app(bundle, access_log=True)) as client:
        given = client.post("/v1/predict", content=picture(1), headers={"X-Request-Id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        for odd in ("a b", "x" * 65, 'say "hi"'):
            answer = client.get("/livez", headers={"X-Request-Id": odd})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    lines = [json.loads(record.message) for record in caplog.records if record.name == "serve.access"]
    first = next(line for line in lines if line["id"] == "mine-1")
    assert {"method": "POST", "path": "/v1/predict", "status": 200}.items() <= first.items() and 0 < first[
        "seconds"
    ] < 60
    assert len(lines) == 4


def test_without_a_key_nothing_is_answered_but_probes_and_the_page(bundle, serving, picture, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key  # the camera's\nsecond-key\n")
    with serving(create_app(bundle, keys=Keys(file))) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}, {"X-API-Key": ""}):
            refused = client.post("/v1/predict", content=picture(1), headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/model").status_code == client.get("/v1/status").status_code == 401
        told = client.get("/openapi.json").json()
        assert told["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
        for path, method in (("/v1/predict", "post"), ("/v1/model", "get"), ("/v2/models/{name}/infer", "post")):
            assert told["paths"][path][method]["security"] == [{"HTTPBearer": []}]
        assert [client.get(path).status_code for path in ("/livez", "/readyz", "/")] == [200, 200, 200]
        for headers in ({"Authorization": "Bearer second-key"}, {"X-API-Key": "first-key"}):
            assert client.post("/v1/predict", content=picture(1), headers=headers).status_code == 200


def test_keys_are_rotated_without_a_restart_and_limited_each(tmp_path: Path) -> None:
    now = [0.0]
    file = tmp_path / "keys"
    file.write_text("a\nb\n")
    keys = Keys(file, rate=2, clock=lambda: now[0])

    def ask(key: str) -> None:
        asyncio.run(keys.check(Request({"type": "http", "headers": [(b"x-api-key", key.encode())]})))

    ask("a"), ask("a")
    with pytest.raises(OverloadedError, match="more than 2 requests a second"):
        ask("a")
    ask("b")
    now[0] = 0.6
    ask("a")
    time.sleep(0.01)
    file.write_text("c\n")
    ask("b")  # the file was looked at less than a second ago
    now[0] = 2.0
    ask("c")
    with pytest.raises(RequestError):
        ask("a")
    file.write_text("# none\n")
    now[0] = 4.0
    ask("c")
    with pytest.raises(ValueError, match="holds no key"):
        Keys(file)


def test_a_head_that_does_not_arrive_holds_no_connection(bundle, serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.5)
    with serving(create_app(bundle)) as client:
        address = (client.base_url.host, client.base_url.port)
        for begun in (b"", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(begun)
                assert connection.recv(100) == b"", "closed"
        assert client.get("/livez").status_code == 200
        time.sleep(0.7)
        assert client.get("/livez").status_code == 200, "an idle connection that had its answer is no slow one"


def test_the_dashboard_asks_for_what_there_is(bundle, serving, picture) -> None:
    """All but the GPU's memory, which only a server on a GPU tells."""
    text = (Path(__file__).parents[2] / "deploy" / "grafana.json").read_text()
    queries = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"refract_\w+", query)}
    app = create_app(bundle, challenge=Challenge(Engine(bundle), share=1, answers=False))
    with serving(app) as client:
        client.post("/v1/predict", content=picture(1))
        client.post("/v1/predict", content=b"no picture")
        families = generate_latest(app.state.service.metrics.registry).decode()
    there = {sample.name for family in text_string_to_metric_families(families) for sample in family.samples}
    there |= {family.name + "_total" for family in text_string_to_metric_families(families) if family.type == "counter"}
    assert asked - there == {"refract_gpu_bytes"} and len(asked) > 12
