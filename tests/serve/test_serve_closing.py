"""How connections end: no answer is lost on its way, and each ends, whatever the client does."""

import json
import socket
import struct
import time
from collections.abc import Iterator

import httpx
import pytest

from refract.serve.http.app import create_app
from refract.serve.http.transport import closing
from refract.serve.http.transport import connection as connections
from refract.serve.http.transport.connection import Connection

ASKED = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n%s\r\n"


@pytest.fixture
def client(bundle, serving) -> Iterator[httpx.Client]:
    with serving(create_app(bundle)) as client:
        yield client


def connected(client: httpx.Client, made: list[Connection] | None = None) -> socket.socket:
    """made: for little room on the way."""
    connection = socket.socket()
    connection.settimeout(20)
    if made is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((client.base_url.host, client.base_url.port))
    if made is not None:
        wait_for(lambda: made)
        made[0].transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return connection


def wait_for(happened) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_who_sends_all_before_reading_has_the_refusal(client, version: bytes) -> None:
    """As urllib, which asks for the connection's end. It had a reset."""
    body = b"x" * 5_000_000
    for _ in range(5):
        with connected(client) as connection:
            head = b"POST /none HTTP/%s\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % (version, len(body)))
            time.sleep(0.05)  # the answer is there
            connection.sendall(body)
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 404 ")


def test_who_sends_slowly_has_the_refusal(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with connected(client) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
        for _ in range(30):
            time.sleep(0.05)
            connection.sendall(b"x" * 100_000)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("count", [1, 1000])
def test_who_reads_nothing_is_left(client, made, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Of one answer there waits less than what has asyncio speak of a pause."""
    monkeypatch.setattr(closing, "WRITE_S", 1.0)
    with connected(client, made) as connection:
        connection.sendall(ASKED % b"" * (count - 1) + ASKED % b"Connection: close\r\n")
        wait_for(lambda: made[0].parser is None)
    assert client.get("/livez").status_code == 200


def test_who_reads_nothing_and_will_not_ask_more_is_left(client, made, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio closes by itself then, when all was taken."""
    monkeypatch.setattr(closing, "WRITE_S", 1.0)
    with connected(client, made) as connection:
        connection.sendall(ASKED % b"")
        wait_for(lambda: made[0].cycle is not None and made[0].cycle.response_complete)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: made[0].parser is None)


def test_who_reads_slowly_has_all(client, made, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn was told of room only when nearly all was taken."""
    monkeypatch.setattr(closing, "WRITE_S", 1.0)
    whole, got = client.get("/openapi.json").content, b""
    made.clear()
    with connected(client, made) as connection:
        connection.sendall(ASKED % b"" * 19 + ASKED % b"Connection: close\r\n")
        began = time.monotonic()
        while part := connection.recv(4096):
            got += part
            time.sleep(0.04)
        assert time.monotonic() > began + 2
    assert got.count(whole) == 20


def test_who_only_sends_is_left(client, made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "LONGEST_LINGER_S", 2.0)
    with connected(client) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(200):
                time.sleep(0.05)
                connection.sendall(b"x")
    wait_for(lambda: made[0].parser is None)


def test_the_end_of_the_server_waits_for_nobody_who_only_sends(client, made) -> None:
    with connected(client) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
        made[0].loop.call_soon_threadsafe(made[0].shutdown)
        with pytest.raises(ConnectionError):
            for _ in range(200):
                time.sleep(0.05)
                connection.sendall(b"x")


def test_of_a_connection_that_was_reset_nothing_is_kept(client, made) -> None:
    """The timer for what would be asked next held it, with its body."""
    with connected(client) as connection:
        connection.sendall(b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n" + b"x" * 65000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 405 ")
        wait_for(lambda: made[0].timeout_keep_alive_task is not None or made[0]._timer is not None)
        assert not made[0].cycle.body
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: made[0].parser is None)
    assert made[0].timeout_keep_alive_task is None and made[0]._timer is None


def test_a_body_that_does_not_come_is_not_waited_for_at_the_end(client, made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LEAVE_S", 0.3)
    with connected(client) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        wait_for(lambda: made and made[0].cycle is not None)
        time.sleep(0.1)
        made[0].loop.call_soon_threadsafe(made[0].shutdown)
        head, _, problem = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and json.loads(problem)["code"] == "not_ready"
