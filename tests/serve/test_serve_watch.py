"""Metrics, access log, request ids, API keys and the Grafana dashboard."""

import asyncio
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from refract.serve.errors import RequestError
from refract.serve.http import access_log
from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys
from refract.serve.http.transport import connection as connections
from refract.serve.requests.limits import OverloadedError
from refract.serve.rollout.canary import Challenge
from refract.serve.runtime.engine import Engine


def numbers(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_metrics_are_served_on_a_separate_port(bundle, serving, make_image) -> None:
    app = create_app(bundle)
    port = app.state.service.metrics.listen("127.0.0.1", 0)
    with serving(app) as client:
        label = client.post("/v1/predict", content=make_image(1)).json()["predictions"][0]["label"]
        client.post("/v1/predict", files=[("f", ("x.jpg", make_image(1)))] * 3)
        client.post("/v1/predict", content=b"no image")
        client.get("/nothing"), client.get("/v1/predict"), client.post("/nothing/infer")
        client.post("/v2/models/shapes/infer", json={"inputs": []})
        assert client.get("/metrics").status_code == 404
        metrics = numbers(httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text)
    assert metrics["refract_requests_total", "ok"] == 2 and metrics["refract_requests_total", "invalid_image"] == 1
    assert metrics["refract_requests_total", "invalid_request"] == 1
    others = {("refract_requests_total", code) for code in ("not_found", "method_not_allowed")}
    assert not others & set(metrics), "of predictions alone"
    assert metrics["refract_predictions_total", label] == 4 and metrics["refract_confidence_count",] == 4
    assert metrics["refract_batch_images_sum",] == 4
    assert metrics["refract_request_seconds_count",] == 2
    assert {metrics["refract_stage_seconds_count", stage] for stage in ("prepare", "queue", "compute")} == {2}
    assert metrics["refract_model", bundle.digest[:16], "shapes"] == 1
    assert metrics["refract_requests_in_flight",] == metrics["refract_images_waiting",] == 0


def test_requests_have_an_id_and_a_log_line(bundle, serving, make_image, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "refract.serve.http.access_log")
    with serving(create_app(bundle, access_log=True)) as client:
        given = client.post("/v1/predict", content=make_image(1), headers={"X-Request-Id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        for odd in ("a b", "x" * 65, 'say "hi"'):
            answer = client.get("/livez", headers={"X-Request-Id": odd})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    lines = [json.loads(record.message) for record in caplog.records if record.name == "refract.serve.http.access_log"]
    first = next(line for line in lines if line["id"] == "mine-1")
    assert {"method": "POST", "path": "/v1/predict", "status": 200}.items() <= first.items() and 0 < first[
        "seconds"
    ] < 60
    assert (
        first["model"] == bundle.digest[:16]
        and abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 60
    )
    assert len(lines) == 4 and not {"key", "code"} & set(first)


def test_internal_errors_have_an_id_and_a_log_line(bundle, serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "refract.serve.http.access_log")
    app = create_app(bundle, access_log=True)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("of our insides")

    with serving(app) as client:
        answer = client.get("/broken", headers={"X-Request-Id": "mine-2"})
    assert answer.status_code == 500 and "insides" not in answer.text
    assert answer.headers["x-request-id"] == "mine-2"
    (line,) = [
        json.loads(record.message) for record in caplog.records if record.name == "refract.serve.http.access_log"
    ]
    assert (line["id"], line["status"], line["code"]) == ("mine-2", 500, "internal_error")


def test_the_log_line_has_the_name_of_the_key_and_the_code_but_never_the_key(
    bundle, serving, make_image, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text("secret-1  # camera 4\nsecret-2\n")
    caplog.set_level(logging.INFO, "refract.serve.http.access_log")
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys", rate=1), access_log=True)) as client:
        for key in ("secret-1", "secret-1", "secret-2", "secret-3"):
            answer = client.post("/v1/predict", content=make_image(1), headers={"X-API-Key": key})
        assert answer.status_code == 401
        infer = client.post("/v2/models/shapes/infer", content=b"{}", headers={"X-API-Key": "secret-2"})
        assert infer.status_code == 429
    lines = [json.loads(record.message) for record in caplog.records if record.name == "refract.serve.http.access_log"]
    logged = [(line.get("key"), line.get("code")) for line in lines]
    second = hashlib.sha256(b"secret-2").hexdigest()[:8]
    named, unnamed = [("camera 4", None), ("camera 4", "rate_limited")], [(second, None), (second, "rate_limited")]
    assert logged == [*named, unnamed[0], (None, "unauthorized"), unnamed[1]]
    assert "secret" not in caplog.text


def test_without_a_key_only_probes_and_the_page_respond(bundle, serving, make_image, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key  # the camera's\nsecond-key\n")
    with serving(create_app(bundle, keys=ApiKeys(file))) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}, {"X-API-Key": ""}):
            refused = client.post("/v1/predict", content=make_image(1), headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/model").status_code == client.get("/v1/status").status_code == 401
        document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
        for path, method in (("/v1/predict", "post"), ("/v1/model", "get"), ("/v2/models/{name}/infer", "post")):
            assert document["paths"][path][method]["security"] == [{"HTTPBearer": []}]
        assert [client.get(path).status_code for path in ("/livez", "/readyz", "/")] == [200, 200, 200]
        for headers in ({"Authorization": "Bearer second-key"}, {"X-API-Key": "first-key"}):
            assert client.post("/v1/predict", content=make_image(1), headers=headers).status_code == 200


FIRST, SECOND, THIRD = "first-key", "second-key", "third-key"


def asker(file: Path, rate: float | None = None) -> tuple[Callable[[str], None], list[float]]:
    """(a function that checks a key, the clock as a list of one time)"""
    now = [0.0]
    keys = ApiKeys(file, rate=rate, clock=lambda: now[0])

    def ask(key: str) -> None:
        asyncio.run(keys.check(Request({"type": "http", "headers": [(b"x-api-key", key.encode())]})))

    return ask, now


def rewrite(file: Path, text: str) -> None:
    """Write the file with another modification time, whatever the resolution of the file system's clock."""
    later = file.stat().st_mtime_ns + 1_000_000
    file.write_text(text)
    os.utime(file, ns=(later, later))


def test_keys_are_rotated_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{FIRST}\n{SECOND}\n")
    ask, now = asker(file)
    rewrite(file, f"{THIRD}\n")
    ask(SECOND)  # the file was checked less than a second ago
    now[0] = 2.0
    ask(THIRD)
    with pytest.raises(RequestError):
        ask(FIRST)
    for wrong, message in (
        ("# none\n", "has no API key"),
        (f"{FIRST}\n\nshort  # b\n", "line 3: an API key must have at least 8"),
    ):
        rewrite(file, wrong)
        for _ in range(3):
            now[0] += 2.0
            ask(THIRD)
        assert caplog.text.count(message) == 1, "not silently, and not each second"
        with pytest.raises(ValueError, match=message):
            ApiKeys(file)
    assert "short" not in caplog.text
    rewrite(file, "schlüssel-eins\n")
    with pytest.raises(ValueError, match="line 1: an API key must have ASCII characters only"):
        ApiKeys(file)


def test_a_replaced_key_file_with_the_same_time_is_reread(tmp_path: Path) -> None:
    """`rsync -t` replaces files this way."""
    file, fresh = tmp_path / "keys", tmp_path / "fresh"
    file.write_text(f"{FIRST}\n")
    ask, now = asker(file)
    fresh.write_text(SECOND + " " * (len(FIRST) - len(SECOND)) + "\n")
    os.utime(fresh, ns=(file.stat().st_mtime_ns, file.stat().st_mtime_ns))
    fresh.replace(file)
    now[0] = 2.0
    ask(SECOND)
    with pytest.raises(RequestError, match="the API key is not one of this server's keys"):
        ask(FIRST)
    with pytest.raises(RequestError, match="this server requires an API key"):
        ask("")


def test_each_key_has_its_rate_without_a_burst(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{FIRST}\n{SECOND}\n")
    ask, now = asker(tmp_path / "keys", rate=2)
    for moment, most in ((0.0, 2), (0.6, 1), (100.0, 2)):
        now[0] = moment
        for _ in range(most):
            ask(FIRST)
        with pytest.raises(OverloadedError, match="more than 2 requests per second"):
            ask(FIRST)
        ask(SECOND)


def test_a_rotation_does_not_refill_the_rate_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{FIRST}\n")
    ask, now = asker(file, rate=0.5)
    ask(FIRST)
    rewrite(file, f"{FIRST}\n{SECOND}\n")
    now[0] = 1.1
    with pytest.raises(OverloadedError):
        ask(FIRST)
    ask(SECOND)
    now[0] = 2.1
    ask(FIRST)


def test_comments_start_after_white_space_and_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("\ufeffs#kL9-first\n  # ours\nsecond-key\t#theirs\n".encode())
    ask, _ = asker(file)
    ask("s#kL9-first"), ask("second-key")
    for key in ("s", "", "\ufeffs#kL9-first", "second-key\t#theirs"):
        with pytest.raises(RequestError):
            ask(key)


def test_a_connection_whose_head_does_not_arrive_is_closed(bundle, serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.5)
    with serving(create_app(bundle)) as client:
        address = (client.base_url.host, client.base_url.port)
        for begun in (b"", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(begun)
                assert connection.recv(100) == b"", "closed"
        assert client.get("/livez").status_code == 200
        time.sleep(0.7)
        assert client.get("/livez").status_code == 200, "an idle connection that had its answer is no slow one"


def test_the_dashboard_queries_existing_metrics(bundle, serving, make_image) -> None:
    """All metrics except the GPU memory, which only a server on a GPU reports, and an accuracy that this bundle does not state."""
    text = (Path(__file__).parents[2] / "deploy" / "grafana.json").read_text()
    queries = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    queried = {name for query in queries for name in re.findall(r"refract_\w+", query)}
    app = create_app(bundle, challenge=Challenge(Engine(bundle), fraction=1, answers=False))
    with serving(app) as client:
        response = client.post("/v1/predict", content=make_image(1))
        client.post("/v1/feedback", json={"id": response.headers["x-request-id"], "labels": [bundle.info.labels[0]]})
        client.post("/v1/predict", content=b"no image")
        families = generate_latest(app.state.service.metrics.registry).decode()
    exported = {sample.name for family in text_string_to_metric_families(families) for sample in family.samples}
    exported |= {
        family.name + "_total" for family in text_string_to_metric_families(families) if family.type == "counter"
    }
    assert queried - exported == {"refract_gpu_bytes", "refract_test_accuracy"} and len(queried) > 20


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of one page, which holds the lines of a few requests."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    os.close(reading)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("refract.serve.http.access_log", logging.INFO, "", 0, text, None, None)


def read_lines(descriptor: int, wanted: int) -> list[dict]:
    """Read until the log accounts for `wanted` lines, lost ones included."""
    data, deadline = b"", time.monotonic() + 20
    while time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.1)[0]:
            data += os.read(descriptor, 1 << 16)
        lines = [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
        if sum(line.get("lost", 1) for line in lines) >= wanted:
            return lines
    raise AssertionError(data)


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_without_a_reader_are_counted(pipe, monkeypatch: pytest.MonkeyPatch, blocking: bool) -> None:
    monkeypatch.setattr(access_log, "MAX_WAITING", 50)
    os.set_blocking(pipe[1], blocking)
    lines = access_log.AccessLogWriter(pipe[1])
    for number in range(500):
        lines.emit(record(json.dumps({"number": number, "more": "x" * 100})))
    time.sleep(0.2)
    entries = read_lines(pipe[0], 500)
    assert sum(line.get("lost", 0) for line in entries) > 300
    numbers = [line["number"] for line in entries if "number" in line]
    assert numbers == list(range(len(numbers))), "in their order, the first of them"


def test_waiting_lines_are_written_before_the_process_ends(pipe) -> None:
    lines = access_log.AccessLogWriter(pipe[1])
    lines.emit(record('{"number": 1}'))
    lines.flush()
    os.set_blocking(pipe[0], False)
    assert os.read(pipe[0], 1000) == b'{"number": 1}\n'


def test_a_torn_line_does_not_damage_the_next(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """A full disk that has free space again behaves like this."""
    room, written = [10], bytearray()

    def write(_: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(room[0], len(data))
        room[0] -= count
        written.extend(data[:count])
        return count

    monkeypatch.setattr(access_log.os, "write", write)
    lines = access_log.AccessLogWriter(99)
    for number in range(5):
        lines.emit(record(json.dumps({"number": number})))
    lines.flush()
    room[0] = 10_000
    lines.emit(record(json.dumps({"number": 5})))
    lines.flush()
    first, *others = bytes(written).split(b"\n")
    assert first == b'{"number":' and next(json.loads(line) for line in others if line) == {"number": 5}
    assert json.loads(others[1])["lost"] == 5 and caplog.text.count("the access log cannot be written: No space") == 1
