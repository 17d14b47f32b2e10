"""Requests that strangers send, damaged and hostile ones. Made from a seed, nothing is stored."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, PngImagePlugin

PREDICT = "/v1/predict"


@dataclass(frozen=True)
class Case:
    """A request, and what may come of it. statuses: of HTTP; None for anything below 500. label_of: a picture (uint8 H×W×3) whose likeliest
    label it must get; gap: how far its probability may lie from that picture's."""

    name: str
    body: bytes
    kind: str = "application/octet-stream"
    path: str = PREDICT
    headers: dict[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] | None = None
    label_of: np.ndarray | None = None
    gap: float = 0.02


def cases(seed: int = 0) -> list[Case]:
    """Some two and a half thousand."""
    rng = np.random.default_rng(seed)
    makers = (
        _truncated,
        _flipped,
        _spliced,
        _garbage,
        _announced,
        _bombs,
        _polyglots,
        _json,
        _forms,
        _kinds,
        _v2,
        _queries,
    )
    return [case for make in makers for case in make(rng)]


def picture(rng: np.random.Generator, height: int = 60, width: int = 90) -> np.ndarray:
    """Smooth colours, so that JPEG changes little."""
    coarse = Image.fromarray(rng.integers(20, 236, (4, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, form: str, **options: object) -> bytes:
    """The bytes of a file."""
    return saved(Image.fromarray(pixels), form, **options)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _files(rng: np.random.Generator) -> dict[str, bytes]:
    pixels = picture(rng)
    return {
        "jpeg": encoded(pixels, "JPEG", quality=90),
        "progressive": encoded(pixels, "JPEG", progressive=True),
        "png": encoded(pixels, "PNG"),
        "webp": encoded(pixels, "WEBP"),
        "gif": encoded(pixels, "GIF"),
        "tiff": encoded(pixels, "TIFF", compression="tiff_lzw"),
        "bmp": encoded(pixels, "BMP"),
    }


def _truncated(rng: np.random.Generator) -> Iterator[Case]:
    for form, data in _files(rng).items():
        for cut in sorted({int(c) for c in np.geomspace(1, len(data) - 1, 40)}):
            yield Case(f"{form} cut at {cut}", data[:cut])


def _flipped(rng: np.random.Generator) -> Iterator[Case]:
    for form, data in _files(rng).items():
        for k in range(120):
            damaged = bytearray(data)
            # Half of them in the header, where the sizes and tables stand.
            end = len(data) if k % 2 else min(len(data), 300)
            for place in rng.integers(0, end, 1 + k % 8):
                damaged[place] ^= 1 << int(rng.integers(8))
            yield Case(f"{form} with flipped bits {k}", bytes(damaged))


def _spliced(rng: np.random.Generator) -> Iterator[Case]:
    files = list(_files(rng).items())
    for k in range(210):
        (form, data), (other, more) = files[k % len(files)], files[int(rng.integers(len(files)))]
        place = int(rng.integers(len(data)))
        match k % 3:
            case 0:
                made = data[:place] + more + data[place:]
            case 1:
                made = data[:place] + rng.bytes(int(rng.integers(1, 64))) + data[place + 8 :]
            case _:
                made = data[:place] + more[int(rng.integers(len(more))) :]
        yield Case(f"{form} spliced with {other} {k}", made)


def _garbage(rng: np.random.Generator) -> Iterator[Case]:
    for k in range(120):
        yield Case(f"noise {k}", rng.bytes(int(rng.integers(1, 5_000))), statuses=(400,))
    for length in (1, 7, 100, 100_000):
        yield Case(f"{length} zero bytes", bytes(length), statuses=(400,))
    yield Case("nothing", b"", statuses=(400,))
    for magic in (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"MM\0*",
        b"BM",
        b"\0\0\0\x0cftypavif",
    ):
        for length in (0, 1, 12, 300):
            yield Case(f"{magic!r} and {length} bytes", magic + rng.bytes(length))


def _announced(rng: np.random.Generator) -> Iterator[Case]:
    """Headers that announce far more pixels than follow."""
    files = _files(rng)
    for width, height in (
        (65_535, 65_535),
        (50_000, 50_000),
        (1, 65_535),
        (65_535, 1),
        (0, 0),
        (0, 5),
        (2**31 - 1, 2**31 - 1),
    ):
        jpeg = bytearray(files["jpeg"])
        frame = jpeg.index(b"\xff\xc0") + 5
        jpeg[frame : frame + 4] = struct.pack(">HH", min(height, 65_535), min(width, 65_535))
        png = bytearray(files["png"])
        png[16:24] = struct.pack(">II", width, height)
        png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
        gif = bytearray(files["gif"])
        gif[6:10] = struct.pack("<HH", min(width, 65_535), min(height, 65_535))
        bmp = bytearray(files["bmp"])
        bmp[18:26] = struct.pack("<ii", width, height)
        for form, data in (("jpeg", jpeg), ("png", png), ("gif", gif), ("bmp", bmp)):
            yield Case(f"{form} that announces {width} × {height}", bytes(data))


def _bombs(rng: np.random.Generator) -> Iterator[Case]:
    for side in (20_000, 30_000, 60_000):
        yield Case(f"png bomb of {side}²", _flat_png(side, side), statuses=(413,))
    yield Case("a line of 10,000,000 × 4", _flat_png(10_000_000, 4))
    yield Case("a column of 4 × 10,000,000", _flat_png(4, 10_000_000))
    frames = [Image.new("P", (8, 8), k % 256) for k in range(400)]
    yield Case("gif of 400 frames", saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    data = encoded(picture(rng), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : data.rindex(b"\xff\xd9")]
    for count in (10, 100, 1_000):
        yield Case(f"jpeg of {count} times its scans", data[:-2] + scan * count + b"\xff\xd9")
    yield Case("jpeg with 3 MB of comments", data[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 48 + data[2:])
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 5_000_000, zip=True)
    yield Case("png with an inflating text", encoded(picture(rng), "PNG", pnginfo=text))
    yield Case("png whose icc profile inflates", _with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(30_000_000), 9)))
    for count in (65, 500):
        form = b"".join(_part(f"f{i}", b"x") for i in range(count)) + b"--b--\r\n"
        yield Case(f"form of {count} files", form, "multipart/form-data; boundary=b", statuses=(413,))
    yield Case("body of 25 MB", bytes(25 * 2**20), statuses=(413,))


def _flat_png(width: int, height: int) -> bytes:
    """One bit a pixel, all 0: a few kilobytes."""
    row = bytes(1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    packed = (
        b"".join(packer.compress(row) for _ in range(height)) if height * len(row) < 10**8 else packer.compress(row * 8)
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", packed + packer.flush()),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _with_chunk(kind: bytes, data: bytes) -> bytes:
    png = encoded(np.full((20, 20, 3), 90, np.uint8), "PNG")
    return png[:33] + _chunk(kind, data) + png[33:]


def _polyglots(rng: np.random.Generator) -> Iterator[Case]:
    files = _files(rng)
    tails = {
        "zip": b"PK\x03\x04" + rng.bytes(200),
        "html": b"<script>alert(1)</script>" * 20,
        "pdf": b"%PDF-1.7\n" + rng.bytes(100),
        "elf": b"\x7fELF" + rng.bytes(400),
    }
    for form, data in files.items():
        for other, tail in tails.items():
            yield Case(f"{form} before {other}", data + tail)
            yield Case(f"{other} before {form}", tail + data)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/x"/></svg>'
    for name, data in {
        "svg": svg,
        "xml bomb": b'<!DOCTYPE a [<!ENTITY b "bbb">]><a>&b;</a>',
        "python": b"import os",
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "url": b"http://127.0.0.1:1/x.jpg",
    }.items():
        yield Case(name, data, statuses=(400,))


def _json(rng: np.random.Generator) -> Iterator[Case]:
    good = base64.b64encode(encoded(picture(rng), "JPEG")).decode()
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
        text = bytearray(json.dumps({"image": good}).encode())
        for place in rng.integers(0, len(text), 1 + k % 5):
            text[place] = int(rng.integers(256))
        yield Case(f"json with changed bytes {k}", bytes(text), "application/json")


def _part(name: str, data: bytes, headers: str = "") -> bytes:
    return (
        f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x.jpg"\r\n{headers}\r\n'.encode()
        + data
        + b"\r\n"
    )


def _forms(rng: np.random.Generator) -> Iterator[Case]:
    data, kind = encoded(picture(rng), "JPEG"), "multipart/form-data; boundary=b"
    good = _part("file", data) + b"--b--\r\n"
    nested = _part("file", good, "Content-Type: multipart/mixed; boundary=c\r\n") + b"--b--\r\n"
    bodies = {
        "nested": nested,
        "without an end": _part("file", data),
        "without parts": b"--b--\r\n",
        "empty file": _part("f", b"") + b"--b--\r\n",
        "no blank line": good.replace(b"\r\n\r\n", b"\r\n", 1),
        "bare newlines": good.replace(b"\r\n", b"\n"),
        "only a preamble": b"hello",
        "a field": b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n',
        "long header": _part("f", data, f"X: {'y' * 70_000}\r\n") + b"--b--\r\n",
        "many headers": _part("f", data, "".join(f"X{i}: y\r\n" for i in range(5_000))) + b"--b--\r\n",
        "odd name": _part('a"; drop', data) + b"--b--\r\n",
        "zero in a name": _part("a\0b", data) + b"--b--\r\n",
        "encoded": _part("f", base64.b64encode(data), "Content-Transfer-Encoding: base64\r\n") + b"--b--\r\n",
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
        body = bytearray(good)
        for place in rng.integers(0, len(body) if k % 2 else 90, 1 + k % 6):
            body[place] = int(rng.integers(256))
        yield Case(f"form with changed bytes {k}", bytes(body), kind)
    for k in range(60):
        cut = int(rng.integers(len(good)))
        yield Case(f"form cut at {cut} {k}", good[:cut], kind)


def _kinds(rng: np.random.Generator) -> Iterator[Case]:
    data = encoded(picture(rng), "PNG")
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
        yield Case(f"content type {kind}", data, kind, statuses=(415, 400))
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
    for encoding in ("gzip", "br", "deflate", "nonsense"):
        yield Case(f"content encoding {encoding}", data, "image/png", headers={"Content-Encoding": encoding})
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
    path, pixels = "/v2/models/MODEL/infer", picture(rng, 8, 8)
    good = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": pixels.ravel().tolist()}
    yield Case("v2 tensor", json.dumps({"inputs": [good]}).encode(), "application/json", path, statuses=(200,))
    changes: list[dict[str, object]] = [
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
    for k, document in enumerate(
        (
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
        )
    ):
        yield Case(f"v2 document {k}", json.dumps(document).encode(), "application/json", path)
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
        body = bytearray(head + binary)
        for place in rng.integers(0, len(body) if k % 2 else len(head) + 8, 1 + k % 4):
            body[place] = int(rng.integers(256))
        yield Case(
            f"v2 binary with changed bytes {k}",
            bytes(body),
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
    data = encoded(picture(rng), "PNG")
    for query in (
        "top=0",
        "top=-1",
        "top=1e9",
        "top=x",
        "top=",
        "top=99999999999999999999",
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
