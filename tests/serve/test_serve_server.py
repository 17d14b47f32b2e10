"""What goes over a connection beside whole requests: heads without an end, headers of other protocols."""

import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from serve import server
from serve.app import create_app

HOST = b"Host: x\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.fixture
def client(bundle, serving) -> Iterator[httpx.Client]:
    with serving(create_app(bundle)) as client:
        yield client


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def answers(client: httpx.Client, *parts: bytes) -> list[bytes]:
    """The statuses of all answers to `parts`, sent one after the other, and to a request that closes the connection."""
    with connected(client) as connection:
        for part in (*parts, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
            connection.sendall(part)
            time.sleep(0.05)  # else the parts would come as one
        return re.findall(rb"HTTP/1\.1 (\d+)", connection.makefile("rb").read())


def post(body: bytes, fields: bytes) -> bytes:
    return b"POST /v1/predict HTTP/1.1\r\n%sContent-Length: %d\r\n%s\r\n" % (HOST, len(body), fields)


@pytest.mark.parametrize("fields", [UPGRADE, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"])
def test_who_would_speak_another_protocol_is_answered_in_this_one(client, picture, fields: bytes) -> None:
    """As `curl --http2 --data-binary` asks. By itself httptools leaves the body out, and takes it for a request."""
    data, inner = picture(1), b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    head, odd = post(data, fields), post(inner, fields)
    assert answers(client, head + data) == answers(client, head, data) == [b"200", b"200"]
    assert answers(client, head[:70], head[70:] + data[:50], data[50:]) == [b"200", b"200"]
    assert answers(client, odd + inner) == answers(client, odd, inner) == [b"400", b"200"], "no picture, and no request"
    assert answers(client, (head + data) * 3) == [b"200"] * 4
    chunked = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + fields + b"\r\n"
    assert answers(client, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)) == [b"200", b"200"]
    assert answers(client, b"GET /livez HTTP/1.1\r\n" + HOST + fields + b"\r\n") == [b"200", b"200"]


def test_this_is_no_proxy(client) -> None:
    for target in (b"example.com:80", b"http://x/livez"):
        asked = b"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n" % target
        with connected(client) as connection:
            connection.sendall(asked)
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1


UNFINISHED = {
    "nothing": (b"", b""),
    "an empty line after an answer": (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
    "a second head": (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /livez HTTP/1.1\r\nX-Slow: "),
    "the body of what was refused": (b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b"b"),
}


@pytest.mark.parametrize("trickle", [b"", b"x"], ids=["silent", "trickling"])
@pytest.mark.parametrize("name", UNFINISHED)
def test_what_begins_no_request_holds_no_connection(
    client, monkeypatch: pytest.MonkeyPatch, name: str, trickle: bytes
) -> None:
    """uvicorn's own limit of 5 seconds is put off by each byte."""
    monkeypatch.setattr(server, "HEAD_S", 1.0)
    whole, rest = UNFINISHED[name]
    with connected(client) as connection:
        connection.sendall(whole)
        assert not whole or connection.recv(4096).startswith(b"HTTP/1.1 ")
        connection.sendall(rest)
        assert seconds_held(connection, trickle if rest != b"\r\n" else rest) < 3
    assert client.get("/livez").status_code == 200


def seconds_held(connection: socket.socket, trickle: bytes) -> float:
    """Until the server closes the connection, `trickle` being sent now and then."""
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
