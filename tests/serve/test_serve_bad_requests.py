"""Untrusted input: a 4xx with a JSON problem that says what to change, without internals of the server."""

import base64
import socket
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg

from refract.serve.http.app import create_app
from refract.serve.requests.limits import Limits

BODY_LIMIT = 200_000


@pytest.fixture(scope="module")
def client(bundle, serving):
    limits = Limits(max_body_bytes=BODY_LIMIT, max_pixels=1_000_000, max_images=3)
    with serving(create_app(bundle, limits=limits)) as client:
        yield client


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of about 60 bytes whose header declares `width` × `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def check(answer, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    error = answer.json()
    assert set(error) - {"error"} == {"type", "title", "status", "detail", "code"}
    assert (error["status"], error["code"]) == (status, code)
    for inside in ("Traceback", 'File "', "site-packages", "simplejpeg", "PIL", "pydantic", "Error", "object at 0x"):
        assert inside not in error["detail"]
    return error["detail"]


RAW = {
    "text as jpeg": (b"hello, this is not an image", "image/jpeg", 400, "invalid_image"),
    "zeros": (b"\0" * 500, "image/png", 400, "invalid_image"),
    "one byte": (b"\xff", "image/jpeg", 400, "invalid_image"),
    "empty": (b"", "image/jpeg", 400, "empty_body"),
    "large header": (png_header(1_001, 1_000), "image/png", 413, "image_too_large"),
    "header bomb": (png_header(60_000, 60_000), "image/png", 413, "image_too_large"),
    "header without pixels": (png_header(32, 32), "image/png", 400, "invalid_image"),
    "too large": (b"\0" * (BODY_LIMIT + 1), "image/jpeg", 413, "body_too_large"),
    "text": (b"hello", "text/plain", 422, "invalid_request"),
    "html": (b"hello", "text/html", 415, "unsupported_media_type"),
    "urlencoded": (b"image=abc", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    "strange type": (b"hello", "%$;;=\"", 415, "unsupported_media_type"),
    "no boundary": (b"hello", "multipart/form-data", 400, "invalid_form"),
    "long boundary": (b"hello", "multipart/form-data; boundary=" + "x" * 1000, 400, "invalid_form"),
    "not a form": (b"hello", "multipart/form-data; boundary=x", 400, "invalid_form"),
    "unfinished form": (b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nabc',
                        "multipart/form-data; boundary=x", 400, "invalid_form"),
    "form of text": (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nabc\r\n--x--\r\n',
                     "multipart/form-data; boundary=x", 400, "no_files"),
    "empty form": (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "no_files"),
    "not JSON": (b'{"image": ', "application/json", 400, "invalid_json"),
    "null": (b"null", "application/json", 422, "invalid_request"),
    "not UTF-8": (b'{"image": "\xff\xfe"}', "application/json", 400, "invalid_json"),
    "deep JSON": (b"[" * 100_000, "application/json", 413, "json_too_large"),
    "huge number": (b"1" * 10_000, "application/json", 400, "invalid_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_bad_body(client, name, caplog):
    body, media_type, status, code = RAW[name]
    check(client.post("/v1/predict", content=body, headers={"content-type": media_type}), status, code)
    assert not [record for record in caplog.records if record.levelname != "INFO"], "clients write no log"


JSON = {
    "list": ([], 422, "invalid_request"),
    "number": ({"image": 5}, 422, "invalid_request"),
    "unknown key": ({"photo": "abcd"}, 422, "invalid_request"),
    "both": ({"image": "abcd", "images": ["abcd"]}, 422, "invalid_request"),
    "text for list": ({"images": "abcd"}, 422, "invalid_request"),
    "no images": ({"images": []}, 422, "invalid_request"),
    "number in list": ({"images": ["aGVsbG8=", 1]}, 422, "invalid_request"),
    "bad base64": ({"image": "ab$d"}, 400, "invalid_base64"),
    "bad padding": ({"image": "abcde"}, 400, "invalid_base64"),
    "not ASCII": ({"image": "äöü="}, 400, "invalid_base64"),
    "empty text": ({"image": ""}, 400, "invalid_image"),
    "not an image": ({"image": "aGVsbG8="}, 400, "invalid_image"),
    "too many": ({"images": ["aGVsbG8="] * 4}, 413, "too_many_images"),
}


@pytest.mark.parametrize("name", JSON)
def test_bad_json(client, name):
    document, status, code = JSON[name]
    check(client.post("/v1/predict", json=document), status, code)


def test_truncated_jpeg(client, make_image):
    data = make_image(1, size=(400, 300))
    for end in (3, 20, 300, len(data) // 2):
        check(client.post("/v1/predict", content=data[:end]), 400, "invalid_image")


def test_the_error_names_the_unreadable_image_of_several(client, make_image):
    good, bad = make_image(1), b"hello, this is not an image"
    message = check(
        client.post("/v1/predict", files=[("f", ("a", data)) for data in (good, bad, good)]), 400, "invalid_image"
    )
    assert message.startswith("image 1: ")
    texts = [base64.b64encode(data).decode() for data in (good, good, bad)]
    assert "image 2" in check(client.post("/v1/predict", json={"images": texts}), 400, "invalid_image")
    assert "image 1" in check(client.post("/v1/predict", json={"images": [texts[0], "$"]}), 400, "invalid_base64")


def test_too_many_files_and_parts(client, make_image):
    files = [("f", ("a.jpg", make_image(1)))] * 4
    check(client.post("/v1/predict", files=files), 413, "too_many_images")
    parts = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 500 + b"--x--\r\n"
    answer = client.post("/v1/predict", content=parts, headers={"content-type": "multipart/form-data; boundary=x"})
    message = check(answer, 413, "too_many_images")
    assert message == "the form has more than 67 parts; at most 3 images and 64 other parts are allowed"


def test_a_chunked_body_above_the_limit_is_rejected(client):
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(40):
            sent += 16_384
            yield b"\0" * 16_384

    check(client.post("/v1/predict", content=chunks(), headers={"content-type": "image/jpeg"}), 413, "body_too_large")
    assert sent > BODY_LIMIT
    assert client.get("/livez").status_code == 200


def test_a_content_length_above_the_limit_is_rejected_before_the_body(client):
    """curl sends Expect: 100-continue: the error must arrive before any of the body is sent."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("top", ["0", "-1", "x", "", "1.5"])
def test_top_out_of_range(client, make_image, top):
    misspelt = check(client.post("/v1/predict?topk=3", content=make_image(1)), 422, "invalid_parameter")
    assert misspelt.startswith("query topk: unknown parameter; known: ") and "top" in misspelt.split("known: ")[1]
    message = check(client.post(f"/v1/predict?top={top}", content=make_image(1)), 422, "invalid_parameter")
    assert "top" in message


def test_the_error_explains_curls_default_content_type(client, make_image):
    kind = {"content-type": "application/x-www-form-urlencoded"}
    detail = check(client.post("/v1/predict", content=make_image(1), headers=kind), 415, "unsupported_media_type")
    assert "add -H 'Content-Type: image/jpeg'" in detail
    assert "an empty list" in check(client.post("/v1/predict", json={"images": []}), 422, "invalid_request")


def test_unusual_paths(client, make_image):
    assert client.post("/v1/predict%0A", content=make_image(1)).status_code == 200
    assert "/v1/predict/" in check(client.post("/v1/predict/", content=make_image(1)), 404, "not_found")
    assert "with --keys FILE or --admin-keys FILE" in check(client.post("/admin/rollback"), 404, "not_found")
    for probe in ("/livez", "/readyz"):
        answer = client.head(probe)
        assert (answer.status_code, answer.content) == (200, b"")


def test_unknown_path_and_method(client):
    detail = check(client.get("/v2/nothing"), 404, "not_found")
    assert client.get("/v2/nothing").json()["error"] == detail, "the member that the Open Inference Protocol defines"
    answer = client.get("/v1/predict")
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "OPTIONS, POST"
    check(client.post("/livez"), 405, "method_not_allowed")


def test_the_total_pixels_of_a_request_are_limited(bundle, serving) -> None:
    limits = Limits(max_pixels=1_000_000, max_total_pixels=1_500_000)
    files = [("file", ("a.png", png_header(1_000, 800), "image/png"))] * 2
    with serving(create_app(bundle, limits=limits)) as client:
        message = check(client.post("/v1/predict", files=files), 413, "images_too_large")
    assert "1,600,000 pixels together; a request may have at most 1,500,000" in message


def test_the_default_limits_reject_oversized_requests(bundle, serving) -> None:
    with serving(create_app(bundle)) as client:
        for width, height in ((10_000, 6_000), (60_000, 60_000)):
            headers = {"content-type": "image/png"}
            check(
                client.post("/v1/predict", content=png_header(width, height), headers=headers), 413, "image_too_large"
            )


def test_a_jpeg_of_thousands_of_scans_is_rejected_at_once(client) -> None:
    data = simplejpeg.encode_jpeg(np.full((64, 64, 3), 90, np.uint8))
    bomb = data[:-2] + b"\xff\xda\x00\x02" * 500 + data[-2:]
    message = check(
        client.post("/v1/predict", content=bomb, headers={"content-type": "image/jpeg"}), 400, "invalid_image"
    )
    assert "scans" in message


def test_incomplete_bodies_share_one_limit_and_are_released(bundle, serving) -> None:
    limits = Limits(max_body_bytes=100_000, max_held_bytes=250_000)
    half = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 90_000
    good = simplejpeg.encode_jpeg(np.full((64, 64, 3), 90, np.uint8))
    with serving(create_app(bundle, limits=limits)) as client:
        address = (client.base_url.host, client.base_url.port)
        held = [socket.create_connection(address, timeout=10) for _ in range(2)]
        for connection in held:
            connection.sendall(half)
        wait_until(lambda: client.post("/v1/predict", content=b"y" * 80_000).status_code == 429)
        message = check(client.post("/v1/predict", content=b"y" * 80_000), 429, "overloaded")
        assert "try again" in message
        for connection in held:
            connection.close()
        wait_until(lambda: client.post("/v1/predict", content=good + b"\0" * 80_000).status_code == 200)


def test_a_body_that_does_not_arrive_times_out(bundle, serving) -> None:
    with serving(create_app(bundle, limits=Limits(body_seconds=1))) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab")
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert client.get("/livez").status_code == 200


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
