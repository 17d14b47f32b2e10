"""Data at hf://, on a server with the Hub's HTTP interface: listing, paths, files."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refract.pipeline.data import storage
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import load_manifest
from refract.remote.client import RemoteError

TOKEN = "hf_not_a_real_token"


class Hub:
    """The dataset `acme/photos`, which needs the token. files: path → content; large ones are stored by LFS."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.failures = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def entry(self, path: str) -> dict[str, object]:
        data = self.files[path]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": git,
            **({"lfs": lfs} if len(data) > 2000 else {}),
        }

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.send(request, 401, b'{"error": "Invalid credentials"}', {"x-error-code": "RepoNotFound"})
        if self.failures:
            self.failures -= 1
            return self.send(request, 502, b"")
        api = "/api/datasets/acme/photos/"
        if path.startswith(f"{api}tree/main"):
            prefix = path.removeprefix(f"{api}tree/main").strip("/")
            found = [self.entry(name) for name in self.files if f"/{name}".startswith(f"/{prefix}")]
            return self.send(request, 200, json.dumps(found).encode())
        if path.startswith(f"{api}paths-info/"):
            names = parse_qs(body.decode()).get("paths", [])
            return self.send(request, 200, json.dumps([self.entry(n) for n in names if n in self.files]).encode())
        name = path.removeprefix("/datasets/acme/photos/resolve/main/")
        if name in self.files:
            return self.send(request, 200, self.files[name])
        return self.send(request, 404, b'{"error": "not found"}', {"x-error-code": "RepoNotFound"})

    def send(
        self, request: BaseHTTPRequestHandler, code: int, data: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(code)
        for name, value in {
            "content-length": str(len(data)),
            "content-type": "application/json",
            **(headers or {}),
        }.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture
def hub(new_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()


ROOT = "hf://datasets/acme/photos"


def test_a_dataset_of_the_hub_gives_its_images_labels_and_splits(hub: Hub, archives: Path) -> None:
    local = load_manifest(archives / "images")
    features = {"image": {"_type": "Image"}, "label": {"names": list(local.labels), "_type": "ClassLabel"}}
    table = pa.table({
        "image": [{"bytes": sample.read(), "path": None} for sample in local.samples],
        "label": [sample.labels[0] for sample in local.samples],
    }).replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})  # fmt: skip
    for split, part in (("test", table.slice(0, 10)), ("train", table.slice(10))):
        file = io.BytesIO()
        pq.write_table(part, file)
        hub.files[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
    hub.files |= {"README.md": b"about", ".gitattributes": b"*"}
    hub.failures = 2
    manifest = load_manifest(ROOT)
    assert [sample.read() for sample in manifest.samples] == [sample.read() for sample in local.samples]
    assert manifest.labels == local.labels and {s.split for s in manifest.samples[10:]} == {"train"}
    assert len(load_manifest(f"{ROOT}/data/train-00000-of-00001.parquet").samples) == 20


def test_class_folders_on_the_hub_are_read_and_changes_noticed(hub: Hub, archives: Path) -> None:
    local = load_manifest(archives / "images")
    hub.files |= {str(Path(s.path).relative_to(archives / "images")): s.read() for s in local.samples}
    hub.files["large/1.png"] = bytes(5000)
    manifest = load_manifest(f"{ROOT}@main")
    images = [sample for sample in manifest.samples if "large/" not in sample.path]
    assert [sample.read() for sample in images] == [sample.read() for sample in local.samples]
    for name in ("large/1.png", "green/000.png"):
        sample = next(sample for sample in load_manifest(ROOT).samples if sample.path.endswith(name))
        before, hub.files[name] = hub.files[name], hub.files[name][:-1] + b"?"
        with pytest.raises(RemoteError, match=f"{name}: has changed while it was in use"):
            sample.read()
        hub.files[name] = before
        assert sample.read() == before


def test_what_the_hub_refuses_is_reported_without_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=f"{ROOT}/none.zip: cannot be read"):
        load_manifest(f"{ROOT}/none.zip")
    with pytest.raises(
        RemoteError, match="hf://datasets/acme/others: refused by the Hub .*; check the name, and HF_TOKEN"
    ):
        load_manifest("hf://datasets/acme/others")
    with pytest.raises(RemoteError, match="hf://photos: is not a complete URL; write hf://datasets/OWNER/NAME/PATH"):
        load_manifest("hf://photos")
    monkeypatch.setenv("HF_TOKEN", "hf_some_other_token")
    with pytest.raises(RemoteError, match="refused by the Hub") as refused:
        storage.read(f"{ROOT}/README.md")
    assert "hf_some" not in str(refused.value)
