"""Bodies with a Content-Encoding are decoded within the body limit, or rejected with the coding's name."""

import base64
import gzip
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as triton

LIMIT = 1_000_000


def bare(data: bytes) -> bytes:
    """Compress to deflate without zlib's header, as some clients do."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def post(client, content, *codings: str, kind: str = "image/jpeg", path: str = "/v1/predict"):
    headers = [("Content-Type", kind), *(("Content-Encoding", coding) for coding in codings)]
    return client.post(path, content=content, headers=headers)


DECODED = {
    "gzip": (gzip.compress, ["gzip"]),
    "x-gzip in capitals": (gzip.compress, ["X-GZip"]),
    "two members": (lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]), ["gzip"]),
    "deflate": (zlib.compress, ["deflate"]),
    "deflate without a header": (bare, ["deflate"]),
    "identity": (bytes, ["identity"]),
    "nothing": (bytes, [""]),
    "identity and gzip": (gzip.compress, ["identity, gzip"]),
    "two in one field": (lambda data: gzip.compress(zlib.compress(data)), ["deflate, gzip"]),
    "two fields": (lambda data: gzip.compress(zlib.compress(data)), ["deflate", "gzip"]),
}


@pytest.mark.parametrize("name", DECODED)
def test_a_known_coding_is_decoded(running, make_image, name: str) -> None:
    encode, codings = DECODED[name]
    plain = running.post("/v1/predict", content=make_image(1)).json()
    answer = post(running, encode(make_image(1)), *codings)
    assert (answer.status_code, answer.json()) == (200, plain), answer.text


def test_a_body_in_small_chunks_a_form_and_json_are_decoded(running, make_image) -> None:
    plain = running.post("/v1/predict", content=make_image(1)).json()
    data = gzip.compress(make_image(1))
    assert post(running, (data[i : i + 7] for i in range(0, len(data), 7)), "gzip").json() == plain
    document = json.dumps({"image": base64.b64encode(make_image(1)).decode()}).encode()
    assert post(running, gzip.compress(document), "gzip", kind="application/json").json() == plain
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n%s\r\n--x--\r\n' % make_image(1)
    assert post(running, zlib.compress(form), "deflate", kind="multipart/form-data; boundary=x").json() == plain


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_may_compress(running, make_image, coding: str, binary: bool) -> None:
    given = make_image(1) if binary else base64.b64encode(make_image(1))
    encoded = triton.InferInput("encoded", [1], "BYTES")
    encoded.set_data_from_numpy(np.array([given], dtype=object), binary_data=binary)
    with triton.InferenceServerClient(f"{running.base_url.host}:{running.base_url.port}") as client:
        plain, compressed = (
            client.infer("shapes", [encoded], request_compression_algorithm=algorithm).as_numpy("probabilities")
            for algorithm in (None, coding)
        )
    np.testing.assert_array_equal(compressed, plain)


HELLO = gzip.compress(b"hello" * 100)
REFUSED = {
    "not gzip": (b"hello", ["gzip"], 400, "gzip"),
    "damaged": (HELLO[:-8] + b"\0" * 8, ["gzip"], 400, "damaged"),
    "cut": (HELLO[:-1], ["gzip"], 400, "truncated"),
    "bytes after gzip": (HELLO + b"x", ["gzip"], 400, "extra bytes after its end"),
    "bytes after deflate": (zlib.compress(b"x") + b"x", ["deflate"], 400, "extra bytes after its end"),
    "one byte of deflate": (b"x", ["deflate"], 400, "truncated"),
    "not deflate": (b"hello", ["deflate"], 400, "deflate"),
    "members without end": (gzip.compress(b"") * 10_001, ["gzip"], 400, "members"),
    "gzip inside is not gzip": (gzip.compress(b"hello"), ["gzip", "gzip"], 400, "gzip"),
    "nothing inside": (gzip.compress(b""), ["gzip"], 400, "no body"),
    "nothing": (b"", ["gzip"], 400, "no body"),
    "bomb": (gzip.compress(bytes(LIMIT + 1)), ["gzip"], 413, "decoded body"),
    "bomb in a bomb": (gzip.compress(gzip.compress(bytes(300 * LIMIT), 1), 1), ["gzip, gzip"], 413, "decoded body"),
    "large as sent": (b"\0" * (LIMIT + 1), ["gzip"], 413, "larger than"),
    "br": (b"hello", ["br"], 415, "'br'"),
    "zstd": (b"hello", ["zstd"], 415, "'zstd'"),
    "gzip and br": (HELLO, ["gzip, br"], 415, "'br'"),
    "three": (HELLO, ["gzip, gzip", "gzip"], 415, "at most 2"),
}


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/shapes/infer"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_or_unknown_coding_is_rejected_by_name(running, name: str, path: str) -> None:
    content, codings, status, says = REFUSED[name]
    answer = post(running, content, *codings, path=path)
    assert answer.status_code == status and says in answer.json()["detail"], answer.text
    if status == 415:
        assert "Content-Encoding" in answer.json()["detail"]
        assert answer.headers["accept-encoding"] == "gzip, deflate, identity"  # RFC 9110, 12.5.3


def test_an_unsupported_media_type_has_no_accept_encoding(running) -> None:
    answer = post(running, b"hello", kind="text/html")
    assert answer.status_code == 415 and "accept-encoding" not in answer.headers


def test_a_body_that_decodes_to_exactly_the_limit_is_accepted(running, make_image) -> None:
    data = make_image(1) + bytes(LIMIT - len(make_image(1)))
    assert post(running, gzip.compress(data), "gzip").status_code == 200
    assert post(running, gzip.compress(data + b"\0"), "gzip").status_code == 413
