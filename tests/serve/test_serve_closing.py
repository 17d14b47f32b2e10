"""Closing of connections: no response is lost, and each connection closes, whatever the client does."""

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


def connected(client: httpx.Client, server_connections: list[Connection] | None = None) -> socket.socket:
    """Connect with small socket buffers. server_connections: the server's connections."""
    connection = socket.socket()
    connection.settimeout(20)
    if server_connections is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((client.base_url.host, client.base_url.port))
    if server_connections is not None:
        wait_for(lambda: server_connections)
        server_connections[0].transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return connection


def wait_for(happened) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_sends_everything_first_receives_the_rejection(client, version: bytes) -> None:
    """urllib sends `Connection: close` and used to receive a reset."""
    body = b"x" * 5_000_000
    for _ in range(5):
        with connected(client) as connection:
            head = b"POST /none HTTP/%s\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % (version, len(body)))
            time.sleep(0.05)  # the response has arrived
            connection.sendall(body)
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 404 ")


def test_a_slow_sender_receives_the_rejection(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    with connected(client) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
        for _ in range(30):
            time.sleep(0.05)
            connection.sendall(b"x" * 100_000)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("count", [1, 1000])
def test_a_client_that_reads_nothing_is_disconnected(
    client, server_connections, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A single response is too small for asyncio to call `pause_writing`."""
    monkeypatch.setattr(closing, "WRITE_TIMEOUT_S", 1.0)
    with connected(client, server_connections) as connection:
        connection.sendall(ASKED % b"" * (count - 1) + ASKED % b"Connection: close\r\n")
        wait_for(lambda: server_connections[0].parser is None)
    assert client.get("/livez").status_code == 200


def test_a_client_that_reads_nothing_is_disconnected_after_its_last_request(
    client, server_connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio itself closes the connection once everything is read."""
    monkeypatch.setattr(closing, "WRITE_TIMEOUT_S", 1.0)
    with connected(client, server_connections) as connection:
        connection.sendall(ASKED % b"")
        wait_for(lambda: server_connections[0].cycle is not None and server_connections[0].cycle.response_complete)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: server_connections[0].parser is None)


def test_a_slow_reader_receives_every_response(client, server_connections, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio calls `resume_writing` only when the buffer is nearly empty."""
    monkeypatch.setattr(closing, "WRITE_TIMEOUT_S", 1.0)
    whole, got = client.get("/openapi.json").content, b""
    server_connections.clear()
    with connected(client, server_connections) as connection:
        connection.sendall(ASKED % b"" * 19 + ASKED % b"Connection: close\r\n")
        began = time.monotonic()
        while part := connection.recv(4096):
            got += part
            time.sleep(0.04)
        assert time.monotonic() > began + 2
    assert got.count(whole) == 20


def test_a_client_that_only_sends_is_disconnected(client, server_connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "MAX_LINGER_S", 2.0)
    with connected(client) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(200):
                time.sleep(0.05)
                connection.sendall(b"x")
    wait_for(lambda: server_connections[0].parser is None)


def test_the_shutdown_does_not_wait_for_a_client_that_only_sends(client, server_connections) -> None:
    with connected(client) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
        server_connections[0].loop.call_soon_threadsafe(server_connections[0].shutdown)
        with pytest.raises(ConnectionError):
            for _ in range(200):
                time.sleep(0.05)
                connection.sendall(b"x")


def test_a_reset_connection_retains_nothing(client, server_connections) -> None:
    """The keep-alive timer used to retain the connection and its body."""
    with connected(client) as connection:
        connection.sendall(b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n" + b"x" * 65000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 405 ")
        wait_for(
            lambda: (
                server_connections[0].timeout_keep_alive_task is not None or server_connections[0]._timer is not None
            )
        )
        assert not server_connections[0].cycle.body
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: server_connections[0].parser is None)
    assert server_connections[0].timeout_keep_alive_task is None and server_connections[0]._timer is None


def test_the_shutdown_does_not_wait_for_a_missing_body(
    client, server_connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BODY_SHUTDOWN_S", 0.3)
    with connected(client) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        wait_for(lambda: server_connections and server_connections[0].cycle is not None)
        time.sleep(0.1)
        server_connections[0].loop.call_soon_threadsafe(server_connections[0].shutdown)
        head, _, problem = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and json.loads(problem)["code"] == "not_ready"
