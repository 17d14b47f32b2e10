"""Forms with every standard encoding of part names, and every variant of base64."""

import base64
from urllib.parse import quote

import pytest

FILES = [
    'name="file"; filename="a.png"',
    "name=\"file\"; filename*=UTF-8''%e2%82%ac.png",
    "name=file; filename*=utf-8'en'%E2%82%AC%20rates.png",
    'name="file"; filename="EURO.png"; filename*=utf-8\'\'%e2%82%ac.png',
    "name=\"file\"; FileName*=iso-8859-1''%A3.png",
    'name="file"; filename*0="a"; filename*1=".png"',
    "name=\"file\"; filename*0*=UTF-8''%e2%82%ac; filename*1=.png",
    'name="file"; filename="a;b\\"c.png"',
    'name="text"; filename="a.png"',
    "filename*=UTF-8''a.png",
]
TEXTS = ['name="a"', "name=\"filename*=UTF-8''a.png\"", 'name="a; filename=b.png"', "name*=utf-8''a", ""]


def form(client, disposition: str, data: bytes):
    body = b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n--x--\r\n" % (disposition.encode(), data)
    return client.post("/v1/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})


@pytest.mark.parametrize("disposition", FILES)
def test_a_part_with_a_file_name_in_any_encoding_is_a_file(running, make_image, disposition: str) -> None:
    answer = form(running, disposition, make_image(1))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("disposition", TEXTS)
def test_a_part_without_a_file_name_is_not_a_file(running, make_image, disposition: str) -> None:
    answer = form(running, disposition, make_image(1))
    assert (answer.status_code, answer.json()["code"]) == (400, "no_files")


def test_the_field_text_is_recognised_in_every_encoding(running) -> None:
    for disposition in ('name="text"', "name*=utf-8''text", 'name*0=te; name*1="xt"'):
        answer = form(running, disposition, b"hello")
        assert answer.status_code == 422 and "reads no texts" in answer.json()["detail"], answer.text


def encodings(data: bytes) -> dict[str, str]:
    plain, safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    return {
        "standard": plain,
        "lines": base64.encodebytes(data).decode(),
        "without padding": plain.rstrip("="),
        "URL-safe": safe,
        "URL-safe without padding": safe.rstrip("="),
        "data URI": f"data:image/jpeg;base64,{plain}",
        "data URI in capitals": f"DATA:image/jpeg;charset=x;BASE64,{safe.rstrip('=')}",
        "data URI with escapes": f"data:image/jpeg;base64,{quote(plain, safe='')}",
        "data URI without base64": f"data:image/jpeg,{quote(data)}",
        "data URI without a type": f"data:,{plain}",
    }


@pytest.mark.parametrize("name", encodings(b""))
def test_base64_is_decoded_in_either_alphabet_and_from_data_uris(running, make_image, name: str) -> None:
    data = next(make_image(seed) for seed in range(9) if len(make_image(seed)) % 3 and b"\xff" in make_image(seed))
    text = encodings(data)[name]
    plain = running.post("/v1/predict", content=data).json()["predictions"]
    assert running.post("/v1/predict", json={"image": text}).json()["predictions"] == plain
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [text]}
    assert running.post("/v2/models/shapes/infer", json={"inputs": [tensor]}).status_code == 200


@pytest.mark.parametrize(
    "text", ["abcde", "ab=d", "ab$d", "abc==", "aGVsbG8==", "data:image/png;base64", "data:,%ff", "é"]
)
def test_invalid_base64_is_rejected(running, text: str) -> None:
    code = "invalid_image" if text == "data:,%ff" else "invalid_base64"
    assert running.post("/v1/predict", json={"image": text}).json()["code"] == code
