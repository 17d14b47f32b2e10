"""Connections with incomplete, oversized, pipelined or upgraded requests."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys
from refract.serve.http.transport import connection as connections
from refract.serve.http.transport import server

HOST = b"Host: x\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.fixture
def client(bundle, serving) -> Iterator[httpx.Client]:
    with serving(create_app(bundle)) as client:
        yield client


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def answers(client: httpx.Client, *parts: bytes) -> list[bytes]:
    """Send `parts` in turn and a last request that closes the connection; return the statuses of all responses."""
    with connected(client) as connection:
        for part in (*parts, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
            connection.sendall(part)
            time.sleep(0.05)  # so that the parts arrive separately
        return re.findall(rb"HTTP/1\.1 (\d+)", connection.makefile("rb").read())


def post(body: bytes, fields: bytes) -> bytes:
    return b"POST /v1/predict HTTP/1.1\r\n%sContent-Length: %d\r\n%s\r\n" % (HOST, len(body), fields)


@pytest.mark.parametrize("fields", [UPGRADE, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"])
def test_an_upgrade_to_another_protocol_is_ignored(client, make_image, fields: bytes) -> None:
    """`curl --http2 --data-binary` sends this. httptools alone skips the body and parses it as a request."""
    data, inner = make_image(1), b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    head, odd = post(data, fields), post(inner, fields)
    assert answers(client, head + data) == answers(client, head, data) == [b"200", b"200"]
    assert answers(client, head[:70], head[70:] + data[:50], data[50:]) == [b"200", b"200"]
    assert answers(client, odd + inner) == answers(client, odd, inner) == [b"400", b"200"], "no image, and no request"
    assert answers(client, (head + data) * 3) == [b"200"] * 4
    chunked = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + fields + b"\r\n"
    assert answers(client, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)) == [b"200", b"200"]
    assert answers(client, b"GET /livez HTTP/1.1\r\n" + HOST + fields + b"\r\n") == [b"200", b"200"]


def test_connect_is_rejected(client) -> None:
    for target in (b"example.com:80", b"http://x/livez"):
        request = b"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n" % target
        with connected(client) as connection:
            connection.sendall(request)
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1


UNFINISHED = {
    "nothing": (b"", b""),
    "an empty line": (b"", b"\r\n"),
    "a second head": (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /livez HTTP/1.1\r\nX-Slow: "),
    "half a head with a request": (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /li", b""),
    "the body of what was refused": (b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b"b"),
}


@pytest.mark.parametrize("trickle", [b"", b"x"], ids=["silent", "trickling"])
@pytest.mark.parametrize("name", UNFINISHED)
def test_a_connection_without_a_request_is_closed(
    client, monkeypatch: pytest.MonkeyPatch, name: str, trickle: bytes
) -> None:
    """Each byte extends uvicorn's own limit of 5 seconds."""
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 1.0)
    whole, rest = UNFINISHED[name]
    with connected(client) as connection:
        connection.sendall(whole)
        assert not whole or connection.recv(4096).startswith(b"HTTP/1.1 ")
        connection.sendall(rest)
        assert seconds_held(connection, trickle if rest != b"\r\n" else rest) < 3
    assert client.get("/livez").status_code == 200


def test_empty_lines_do_not_change_the_keep_alive_time(bundle, serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 9112, 2.2."""
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setitem(server.Server.__init__.__kwdefaults__, "keep_alive_s", 2)
    with serving(create_app(bundle)) as client, connected(client) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert 1.5 < seconds_held(connection, b"\r\n") < 4


def seconds_held(connection: socket.socket, trickle: bytes) -> float:
    """Send `trickle` repeatedly until the server closes the connection; return the seconds that took."""
    began = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() < began + 10:
        try:
            if trickle:
                connection.sendall(trickle)
            if connection.recv(100) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def refused(client: httpx.Client, *parts: bytes) -> bytes:
    """Send `parts`; return all bytes that the server sends until it closes the connection."""
    with connected(client) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            return connection.makefile("rb").read()
        except ConnectionError:  # closed before everything was sent
            return b""


def test_invalid_heads_are_rejected(client) -> None:
    get, close = b"GET /livez HTTP/1.1\r\n", b"Connection: close\r\n\r\n"
    for head, status in (
        (get + close, b"400"),  # RFC 9112, 3.2
        (get + HOST + HOST + close, b"400"),
        (get + b"Host:\r\n" + close, b"200"),
        (get + b"Host: a b\r\n" + close, b"400"),
        (get + b"Host: a:99999\r\n" + close, b"400"),
        (b"GET /livez HTTP/1.0\r\n\r\n", b"200"),
        (CHUNKED.replace(b"chunked", b"gzip, chunked"), b"501"),  # 6.1
        (
            CHUNKED.replace(b"chunked", b"Chunked ").replace(b"Host", b"Connection: close\r\nHost") + b"0\r\n\r\n",
            b"400",
        ),
    ):
        answer = refused(client, head)
        assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [status] and b"\r\ndate: " in answer
    old = b"POST /v1/predict HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert re.findall(rb"HTTP/1\.1 (\d+)", refused(client, old, b"no")) == [b"400"], "and no 100 (RFC 9110, 10.1.1)"


def test_a_content_length_of_many_digits_is_parsed(client, make_image) -> None:
    data = make_image(1)
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %s%d\r\n\r\n"
    assert refused(client, head % (b"0" * 5000, len(data)) + data).startswith(b"HTTP/1.1 200")


def test_a_broken_body_is_not_a_server_error(client, caplog) -> None:
    request = CHUNKED.replace(b"Host", b"Expect: 100-continue\r\nHost") + b"ZZ\r\n"
    assert re.findall(rb"HTTP/1\.1 (\d+)", refused(client, request)) == [b"400"]
    assert client.get("/livez").status_code == 200  # by now the server parsed the broken body
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_body_of_small_chunks_does_not_block_the_event_loop(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_TURN_BYTES", 1 << 30)
    turns, resume = [], connections.Connection._parse_turn
    monkeypatch.setattr(connections.Connection, "_parse_turn", lambda self: (turns.append(0), resume(self)))
    body = b"1\r\nx\r\n" * 50_000
    closing = CHUNKED.replace(b"Host", b"Connection: close\r\nHost")
    assert refused(client, closing, body + b"0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert len(turns) >= len(body) // connections.MAX_PIECE_BYTES


CHUNKED = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_head_is_bounded_in_fields_and_bytes(client, make_image) -> None:
    first, end = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n", b"\r\n"
    assert refused(client, first, b"a: b\r\n" * 200, end).startswith(b"HTTP/1.1 200")
    assert refused(client, first, b"a: " + b"b" * 60_000 + b"\r\n", end).startswith(b"HTTP/1.1 200")
    answer = refused(client, first + b"a: b\r\n" * 300 + end)
    assert answer.startswith(b"HTTP/1.1 431 ") and b'"code":"head_too_large"' in answer
    for flood in (b"a: b\r\n" * 50_000, b"x" * 300_000):
        with connected(client) as connection:
            connection.sendall(first + b"a: " + flood)
            assert connection.recv(1000).startswith(b"HTTP/1.1 431 "), "while the head has no end"
    assert client.post("/v1/predict", content=make_image(1)).status_code == 200


def test_what_follows_a_chunked_body_is_bounded(client, make_image) -> None:
    data = make_image(1)
    body = CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(data), data)
    assert answers(client, body + b"a: b\r\n" * 100 + b"\r\n") == [b"200", b"200"]
    for endless in (body + b"a: ", CHUNKED + b"1;a="):
        with connected(client) as connection:
            connection.sendall(endless + b"x" * 200_000)
            assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")
    halves = data[:50], data[50:]
    small = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in halves) + b"0\r\n\r\n"
    assert answers(client, CHUNKED + small) == [b"200", b"200"]


def test_few_pipelined_requests_wait_and_none_is_retained(
    client, server_connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, end = [0], connections.Connection.on_response_complete

    def counted(self: connections.Connection) -> None:
        most[0] = max(most[0], len(self.pipeline), len(self._cycles) - 1)
        end(self)

    monkeypatch.setattr(connections.Connection, "on_response_complete", counted)
    one, count = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", 20_000
    with connected(client) as connection, ThreadPoolExecutor(1) as pool:
        sent, response_count = pool.submit(connection.sendall, one * count), 0
        while response_count < count:
            response_count += connection.recv(1 << 20).count(b"HTTP/1.1 200")
        sent.result()
        assert most[0] <= connections.MAX_PIECE_BYTES // len(one) + connections.MAX_PIPELINED + 1
        connection.sendall(one)
        connection.recv(1000)
        assert not server_connections[0]._cycles


def test_complete_requests_are_answered_before_the_rejection(client, make_image) -> None:
    data = make_image(1)
    whole = (post(data, b"") + data) * 5
    for rest, status in (
        (b"\0", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n", b"431"),
        (CHUNKED + b"no number\r\n", b"400"),
        (CHUNKED + b"%x\r\n%s\r\n0\r\na: " % (len(data), data) + b"b" * 200_000, b"431"),
    ):
        for before, answered in ((whole, 5), (b"", 0)):
            got = refused(client, before + rest)
            assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200"] * answered + [status]
            problem = got.rpartition(b"\r\n\r\n")[2]
            assert json.loads(problem)["code"] in ("invalid_http", "head_too_large"), "and none is torn"


def test_the_late_rest_of_a_rejected_body_does_not_close_the_connection(
    client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.5)
    with connected(client) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404")
        connection.sendall(b"x" * 1000)
        time.sleep(1)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("size", [1000, 70_000, 300_000, 3_000_000])
def test_a_body_that_the_application_does_not_read_is_skipped(
    serving, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is rejected before its body arrives; later requests on the connection are answered."""
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 1.0)

    async def refusing(scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            for part in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{part}.complete"})
            return
        await asyncio.sleep(0.1)
        await send({"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(refusing) as client:
        body = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
        assert answers(client, body, body + body) == [b"429"] * 4


def test_trailer_fields_are_not_headers(bundle, serving, make_image, tmp_path: Path) -> None:
    """RFC 9110, 6.5.1: an intermediary may check headers only."""
    (tmp_path / "keys").write_text("some-key-1")
    data = make_image(1)
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys"))) as client:
        body = b"%x\r\n%s\r\n0\r\nX-API-Key: some-key-1\r\n\r\n" % (len(data), data)
        assert answers(client, CHUNKED + body) == [b"401", b"200"]


def test_a_body_may_take_longer_than_a_head(client, make_image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.5)
    data = make_image(1)
    with connected(client) as connection:
        connection.sendall(post(data, b"Connection: close\r\n") + data[:10])
        for part in (data[10:20], data[20:]):
            time.sleep(0.4)
            connection.sendall(part)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_the_keep_alive_time_exceeds_that_of_load_balancers(bundle, client) -> None:
    """uvicorn's default of 5 seconds is shorter than that of every load balancer, and equals that of httpx."""
    with connected(client) as connection:
        for wait in (0.0, 6.5):
            time.sleep(wait)
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.Server(create_app(bundle), on_ready=print).config.timeout_keep_alive > 60
