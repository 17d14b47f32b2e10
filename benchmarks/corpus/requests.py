"""Damaged and hostile requests: JSON, forms, content types, the Open Inference Protocol, queries and paths."""

import base64
import gzip
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.corpus.case import PREDICT, Case, changed, encoded, part, random_image


def cases(rng: np.random.Generator) -> Iterator[Case]:
    for make in (_json, _forms, _kinds, _v2, _queries):
        yield from make(rng)


def _json(rng: np.random.Generator) -> Iterator[Case]:
    good = base64.b64encode(encoded(random_image(rng), "JPEG")).decode()
    values: list[object] = [
        None,
        True,
        0,
        -1.5,
        10**400,
        "",
        "!",
        "é",
        "\ud800",
        "a" * 5,
        good[:-1],
        good + "=",
        "=" + good,
        " " + good[:50],
        [],
        {},
        [[]],
        [good],
        {"a": good},
        "http://127.0.0.1:1/x",
        "data:image/jpeg;base64," + good,
        "../../etc/passwd",
    ]
    documents = [
        shape(value)
        for value in values
        for shape in (
            lambda v: v,
            lambda v: {"image": v},
            lambda v: {"images": v},
            lambda v: {"images": [v]},
            lambda v: {"image": v, "x": 1},
            lambda v: {"images": [v] * 70},
        )
    ]
    for k, document in enumerate(documents):
        if document != {"image": good} and document != {"images": [good]}:
            yield Case(f"json {k} {str(document)[:40]}", json.dumps(document).encode(), "application/json")
    for k, text in enumerate(
        (
            b"",
            b"{",
            b"}",
            b"[" * 100_000,
            b'{"image":' * 5_000,
            b'{"image": NaN}',
            b'{"image": "a", "image": "b"}',
            b"\xff\xfe{}",
            "{}".encode("utf-16"),
            b'{"image": "\\u0000"}',
            b"1" * 100_000,
            b'"' + b"\\" * 999,
            b"\0",
            b"null",
            b"// x",
            b"{'image': 'a'}",
        )
    ):
        yield Case(f"no json {k}", text, "application/json")
    for k in range(60):
        text = changed(rng, json.dumps({"image": good}).encode(), 1 + k % 5)
        yield Case(f"json with changed bytes {k}", text, "application/json")


def _forms(rng: np.random.Generator) -> Iterator[Case]:
    data, kind = encoded(random_image(rng), "JPEG"), "multipart/form-data; boundary=b"
    good = part("file", data) + b"--b--\r\n"
    nested = part("file", good, "Content-Type: multipart/mixed; boundary=c\r\n") + b"--b--\r\n"
    bodies = {
        "nested": nested,
        "without an end": part("file", data),
        "without parts": b"--b--\r\n",
        "empty file": part("f", b"") + b"--b--\r\n",
        "no blank line": good.replace(b"\r\n\r\n", b"\r\n", 1),
        "bare newlines": good.replace(b"\r\n", b"\n"),
        "only a preamble": b"hello",
        "a field": b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n',
        "long header": part("f", data, f"X: {'y' * 70_000}\r\n") + b"--b--\r\n",
        "many headers": part("f", data, "".join(f"X{i}: y\r\n" for i in range(5_000))) + b"--b--\r\n",
        "odd name": part('a"; drop', data) + b"--b--\r\n",
        "zero in a name": part("a\0b", data) + b"--b--\r\n",
        "encoded": part("f", base64.b64encode(data), "Content-Transfer-Encoding: base64\r\n") + b"--b--\r\n",
    }
    for name, body in bodies.items():
        yield Case(f"form {name}", body, kind)
    for boundary in ("", "=", '="', "=b; boundary=c", '="b', "=" + "b" * 3_000, "=\u00e9", "=b c"):
        yield Case(
            f"boundary {boundary[:12]!r}",
            good,
            f"multipart/form-data; boundary{boundary}".encode("latin-1").decode("latin-1"),
        )
    for k in range(100):
        yield Case(f"form with changed bytes {k}", changed(rng, good, 1 + k % 6, None if k % 2 else 90), kind)
    for k in range(60):
        cut = int(rng.integers(len(good)))
        yield Case(f"form cut at {cut} {k}", good[:cut], kind)


def _kinds(rng: np.random.Generator) -> Iterator[Case]:
    data = encoded(random_image(rng), "PNG")
    for kind in (
        "text/plain",
        "text/html",
        "application/xml",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=b",
        "application/zip",
        "video/mp4",
        "*/*",
        "x",
        "application/jsonp",
        "a/b/c",
    ):
        yield Case(f"content type {kind}", data, kind, statuses=(415, 400, 422))
    for kind in (
        "image/png",
        "image/jpeg",
        "image/x-unknown",
        "IMAGE/PNG",
        "image/png; charset=utf-8",
        "application/octet-stream",
        "image/svg+xml",
    ):
        yield Case(f"a png as {kind}", data, kind, statuses=(200,))
    bomb = gzip.compress(bytes(64 << 20))
    for encoding, body, status in (
        ("gzip", data, 400),
        ("deflate", data, 400),
        ("br", data, 415),
        ("nonsense", data, 415),
        ("gzip", bomb, 413),
        ("gzip, gzip", gzip.compress(bomb), 413),
        ("deflate", gzip.compress(data), 400),
        ("gzip", gzip.compress(data), 200),
        ("gzip", gzip.compress(data)[:-3], 400),
    ):
        headers = {"Content-Encoding": encoding}
        yield Case(f"content encoding {encoding} {status}", body, "image/png", headers=headers, statuses=(status,))
    for name, value in (
        ("Expect", "200-ok"),
        ("X-Request-Id", "a" * 5_000),
        ("traceparent", "00-zz"),
        ("Authorization", "Bearer " + "k" * 3_000),
        ("Range", "bytes=0-1"),
        ("Accept", "nothing/x"),
        ("inference-header-content-length", "-1"),
    ):
        yield Case(f"header {name}", data, "image/png", headers={name: value})


def _v2(rng: np.random.Generator) -> Iterator[Case]:
    path, pixels = "/v2/models/MODEL/infer", random_image(rng, 8, 8)
    good = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": pixels.ravel().tolist()}
    yield Case("v2 tensor", json.dumps({"inputs": [good]}).encode(), "application/json", path, statuses=(200,))
    changes: list[dict[str, Any]] = [
        *(
            {"shape": shape}
            for shape in (
                [],
                [1],
                [1, 8, 8, 4],
                [2, 8, 8, 3],
                [-1, 8, 8, 3],
                [0, 0, 0, 3],
                [1, 2**40, 2**40, 3],
                [1, 8, 8, 3.0],
                ["1", 8, 8, 3],
                None,
                "x",
                [1, 8, 8, True],
                [10**9, 1, 1, 3],
            )
        ),
        *(
            {"data": data}
            for data in (
                None,
                [],
                [256] * 192,
                [-1] * 192,
                [1.5] * 192,
                ["a"] * 192,
                [[1], [2, 3]],
                "x",
                [None] * 192,
                [10**30] * 192,
                [True] * 192,
            )
        ),
        *({"datatype": kind} for kind in ("FP32", "BYTES", "", None, 3, "uint8")),
        *({"name": name} for name in ("", "encoded", None, 5, "x" * 9_999)),
        *({"parameters": {"binary_data_size": size}} for size in (0, 5, -1, 2**70, "x", None)),
    ]
    for k, change in enumerate(changes):
        document = {"inputs": [{**good, **change}]}
        yield Case(f"v2 {k} {str(change)[:40]}", json.dumps(document).encode(), "application/json", path)
    documents: list[Any] = [
        {},
        {"inputs": []},
        {"inputs": {}},
        {"inputs": [good, good]},
        {"inputs": [None]},
        {"inputs": [good], "outputs": 3},
        {"inputs": [good], "outputs": [None, {"name": 3}]},
        {"inputs": [good], "id": ["x"]},
        [],
        None,
        "x",
    ]
    for k, whole in enumerate(documents):
        yield Case(f"v2 document {k}", json.dumps(whole).encode(), "application/json", path)
    file = encoded(pixels, "PNG")
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "encoded",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": len(file) + 4},
                }
            ]
        }
    ).encode()
    binary = struct.pack("<I", len(file)) + file
    yield Case(
        "v2 binary",
        head + binary,
        path=path,
        headers={"inference-header-content-length": str(len(head))},
        statuses=(200,),
    )
    for k in range(80):
        yield Case(
            f"v2 binary with changed bytes {k}",
            changed(rng, head + binary, 1 + k % 4, None if k % 2 else len(head) + 8),
            path=path,
            headers={"inference-header-content-length": str(len(head))},
        )
    for length in ("0", "1", "999999", "-1", "x", "1e3", ""):
        yield Case(
            f"v2 header length {length!r}",
            head + binary,
            path=path,
            headers={"inference-header-content-length": length},
        )
    for name in ("nobody", "%2e%2e%2fx", "a" * 2_000, "%00", "é".encode().hex()):
        yield Case(f"v2 model {name[:10]}", head, "application/json", f"/v2/models/{name}/infer", statuses=(404,))


def _queries(rng: np.random.Generator) -> Iterator[Case]:
    data = encoded(random_image(rng), "PNG")
    for query in (
        "top=0",
        "top=-1",
        "top=1e9",
        "top=x",
        "top=",
        "threshold=2",
        "threshold=nan",
        "threshold=inf",
        "threshold=x",
        "tta=turn",
        "explain=maybe",
        "tta=",
        "top=1&top=x",
        "unknown=1",
        "%00=1",
        "a" * 5_000,
    ):
        yield Case(f"query {query[:30]}", data, "image/png", f"{PREDICT}?{query}", statuses=(422,))
    for query in (
        "top=1",
        "top=99999999999999999999",
        "threshold=0",
        "threshold=1",
        "tta=flip",
        "explain=true",
        "top=1&tta=flip&explain=1",
    ):
        yield Case(f"query {query[:30]}", data, "image/png", f"{PREDICT}?{query}", statuses=(200,))
    for path in (
        "/v1",
        "/v1/predict/",
        "/..",
        "/%2e%2e/etc/passwd",
        "//v1/predict",
        "/v1/predict%00",
        "/admin/rollback",
        "/docs/x",
        "/" + "a" * 8_000,
    ):
        yield Case(f"path {path[:30]}", data, "image/png", path)
