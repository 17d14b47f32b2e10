"""Request methods: HEAD for every GET route, OPTIONS everywhere, 405 and 501 for others; heads that are not HTTP/1.1."""

import re
import socket
import subprocess

import httpx
import pytest

from refract.serve.http.transport.connection import MAX_HEAD_BYTES
from refract.serve.metrics import Metrics

GET = [
    "/", "/livez", "/readyz", "/v1/model", "/v1/status", "/docs", "/redoc", "/openapi.json", "/static-offline-docs/favicon.png",
    "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/shapes", "/v2/models/shapes/ready", "/none", "/v2/models/other",
]  # fmt: skip
LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def raw(client: httpx.Client, *parts: bytes) -> bytes:
    """Send each of `parts` separately; return all bytes that the server sends until it closes the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for part in parts:
                connection.sendall(part)
        except ConnectionError:  # rejected before everything was sent
            pass
        return connection.makefile("rb").read()


def statuses(client: httpx.Client, *parts: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", raw(client, *parts))]


@pytest.mark.parametrize("path", GET)
def test_head_has_the_headers_of_get_and_no_body(running, path: str) -> None:
    def headers(answer: httpx.Response) -> dict[str, str]:
        return {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}

    get, head = running.get(path), running.head(path)
    assert (head.status_code, headers(head)) == (get.status_code, headers(get))
    assert int(head.headers["content-length"]) == len(get.content) > 0 and head.content == b""
    request = f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert raw(running, request, LIVE).count(b"\r\n\r\n") == 2, "the next answer follows the head at once"
    assert running.options(path).headers.get("allow", "GET, HEAD, OPTIONS") == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize(
    ("path", "methods"),
    [("/livez", "GET, HEAD, OPTIONS"), ("/v1/predict", "OPTIONS, POST"), ("/v2/models/shapes/infer", "OPTIONS, POST")],
)
def test_a_method_that_a_path_does_not_allow(running, path: str, methods: str, method: str) -> None:
    answer = running.request(method, path)
    if method in methods:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 405 and answer.headers["allow"] == methods
        assert method == "HEAD" or methods in answer.json()["detail"]


def test_options_of_a_path_and_of_the_server(running) -> None:
    answer = running.options("/v1/predict")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, "OPTIONS, POST", b"")
    assert running.options("/none").status_code == 404
    for version in (b"1.1", b"1.0"):
        response = raw(running, b"OPTIONS * HTTP/%s\r\nHost: x\r\nConnection: close\r\n\r\n" % version)
        assert response.startswith(b"HTTP/1.1 204 ") and b"\r\nallow: GET, HEAD, OPTIONS, POST\r\n" in response
    assert raw(running, LIVE.replace(b"/livez", b"*")).startswith(b"HTTP/1.1 400 ")


def test_curl_sends_head_and_options(running) -> None:
    for arguments, says in (
        (["-I"], b"200"),
        (["-X", "OPTIONS", "--request-target", "*"], b"204"),
        (["-X", "FLY"], b"501"),
    ):
        command = ["curl", "-s", "-i", "--max-time", "20", *arguments, f"{running.base_url}/livez"]
        assert subprocess.run(command, capture_output=True, check=True).stdout.startswith(b"HTTP/1.1 " + says)


def test_the_metrics_port_answers_head() -> None:
    port = Metrics().listen("127.0.0.1", 0)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        get, head = client.get("/metrics"), client.head("/metrics")
        assert (
            head.status_code == 200
            and head.content == b""
            and head.headers["content-type"] == get.headers["content-type"]
        )
        assert int(head.headers["content-length"]) > 0 and b"refract_requests" in get.content
        assert (
            client.options("/metrics").headers["allow"]
            == client.put("/metrics").headers["allow"]
            == "GET, HEAD, OPTIONS"
        )


LINES = {
    b"FLY /livez HTTP/1.1": 501,
    b"PROPFIND /livez HTTP/1.1": 501,
    b"M-SEARCH * HTTP/1.1": 501,
    b"get /livez HTTP/1.1": 501,
    b"GETX /livez HTTP/1.0": 501,
    b"DESCRIBE /livez HTTP/1.1": 501,
    b"GET /livez": 400,  # HTTP/0.9
    b"GET /livez HTTP/0.9": 400,
    b"GET /livez HTTP/2.0": 400,
    b"GET /livez HTTP/1.2": 400,
    b"GET /livez http/1.1": 400,
    b"GET /livez RTSP/1.0": 400,
    b"DESCRIBE /livez RTSP/1.0": 400,
    b"SOURCE /livez ICE/1.0": 400,
    b"PRI * HTTP/2.0": 400,
    b"GET /livez HTTP/1.1 ": 400,
    b"GET /a b HTTP/1.1": 400,
    b"GET livez HTTP/1.1": 400,
    b"GET\t/livez HTTP/1.1": 400,
    b"\x16\x03\x01\x02\x00\x01\x00": 400,
    b"GET http://x/livez HTTP/1.1": 200,
    b"GET http://x HTTP/1.1": 200,
    b"GET http://x?a=b HTTP/1.1": 200,
    b"GET //livez HTTP/1.1": 404,
}


@pytest.mark.parametrize("line", LINES)
def test_the_request_line(running, line: bytes) -> None:
    """The line arrives alone, in two parts, and after another request on the same connection."""
    request, status = line + b"\r\nHost: x\r\nConnection: close\r\n\r\n", LINES[line]
    assert statuses(running, request) == statuses(running, request[:3], request[3:]) == [status]
    first = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    assert statuses(running, first + b"\r\n" + request) == statuses(running, first, request) == [200, status]
    assert b'"code":"unknown_method"' in raw(running, request) or status != 501


HOSTS = {
    **dict.fromkeys([b"", b"x", b"x:80", b"x:", b"a_b.example", b"127.0.0.1:8000", b"[::1]", b"[::1]:80", b"%41"], 200),
    **dict.fromkeys([b"a b", b"x/y", b"http://x", b"u@x", b"x:y", b"x:80:80", b"x:65536", b"[::1", b"[x]", b"%4", b"x?", b"\xc3\xa9"], 400),
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_the_host(running, host: bytes) -> None:
    for version in (b"1.1", b"1.0"):
        request = LIVE.replace(b"1.1", version).replace(b"Host: x", b"Host: " + host)
        assert statuses(running, request) == [HOSTS[host]]
    assert statuses(running, LIVE.replace(b"Host: x\r\n", b"")) == [400]
    assert statuses(running, LIVE.replace(b"Host: x", b"Host: x\r\nHost: x").replace(b"1.1", b"1.0")) == [400]


@pytest.mark.parametrize(
    "before", [b"", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n\r\n"], ids=["first", "second", "empty lines"]
)
@pytest.mark.parametrize("where", ["a field", "the target"])
def test_a_head_of_the_limit_is_accepted_and_one_byte_more_is_rejected(running, where: str, before: bytes) -> None:
    def head(size: int) -> bytes:
        fill = b"b" * (size - len(LIVE) - len(b"a: \r\n" if where == "a field" else b"?"))
        return (
            LIVE.replace(b"Host", b"a: %s\r\nHost" % fill)
            if where == "a field"
            else LIVE.replace(b"livez", b"livez?" + fill)
        )

    assert len(head(MAX_HEAD_BYTES)) == MAX_HEAD_BYTES == 64 << 10
    earlier = [200] * before.count(b"GET")
    for split in (MAX_HEAD_BYTES, 100, MAX_HEAD_BYTES - 2):
        whole, large = head(MAX_HEAD_BYTES), head(MAX_HEAD_BYTES + 1)
        assert statuses(running, before + whole[:split], whole[split:]) == [*earlier, 200]
        assert statuses(running, before + large[:split], large[split:]) == [*earlier, 431]


def test_the_fields_of_a_head_are_counted_exactly(running) -> None:
    for count, status in ((254, 200), (255, 431)):  # and Host and Connection
        assert statuses(running, LIVE.replace(b"Host", b"a: b\r\n" * count + b"Host")) == [status]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 16_384, 70_000])
def test_a_body_of_empty_lines_is_delimited_correctly(running, size: int) -> None:
    """Bytes inside a body that look like the end of a head, or a request line, are body."""
    body = (b"\r\n\r\nFLY / RTSP/1.0\r\n\r\n" * (size // 10 + 1))[:size]
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"
    sized = head + b"Content-Length: %d\r\n\r\n" % size + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    for request in (sized, chunked):
        assert statuses(running, request * 3 + LIVE) == [400, 400, 400, 200]
        assert statuses(running, *(bytes([one]) for one in (request + LIVE)[:2_000]), (request + LIVE)[2_000:]) == [
            400,
            200,
        ]
