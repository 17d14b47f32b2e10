"""Data at http:// and https://: tables and archives on a web server that fails now and then."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from object_server import ObjectServer

from refract.pipeline.data import remote_files, storage
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import load_manifest
from refract.remote import client, web
from refract.remote.client import RemoteError
from refract.remote.web import UNVERSIONED


@pytest.fixture(scope="module")
def server(archives: Path) -> Iterator[ObjectServer]:
    server = ObjectServer()
    server.put_folder(archives / "images", "images")
    server.put("photos.zip", (archives / "photos.zip").read_bytes())
    yield server
    server.close()


@pytest.fixture
def root(server: ObjectServer, new_cache: None) -> str:
    """The URL of the files."""
    return f"{server.proxy.url}/data"


def test_archives_and_tables_give_the_images_while_the_server_fails(
    root: str, server: ObjectServer, archives: Path
) -> None:
    local = load_manifest(archives / "images")
    rows = "\n".join(f"{Path(s.path).relative_to(archives)},{local.labels[s.labels[0]]}" for s in local.samples)
    server.put("m.csv", f"path,label\n{rows}\n".encode())
    for name in ("photos.zip", "m.csv"):
        with server.proxy.failing(3):
            manifest = load_manifest(f"{root}/{name}")
            assert [s.read() for s in manifest.samples] == [s.read() for s in local.samples]
        assert manifest.labels == local.labels
    assert manifest.samples[0].path.startswith(f"{root}/images/")
    server.proxy.reads.clear()
    assert manifest.samples[0].read() and not server.proxy.reads  # from the cache


def test_only_the_archive_of_a_server_with_versions_has_a_state(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = f"{root}/photos.zip"
    member = load_manifest(archive).samples[0].path
    assert storage.state_of(member) is not None
    monkeypatch.setattr(web, "_version", lambda response: UNVERSIONED)  # as without ETag and Last-Modified
    monkeypatch.setattr(remote_files, "_versions", {})
    monkeypatch.setattr(remote_files, "_listed", set())
    load_manifest(archive)
    assert remote_files._versions[archive].version == UNVERSIONED
    assert storage.state_of(member) is None, "another process reads the archive again"


def test_a_changed_file_is_noticed(root: str, server: ObjectServer) -> None:
    server.put("1.png", b"first")
    item = client.info(f"{root}/1.png")
    remote_files._versions[item.url] = item  # as after a first read
    server.put("1.png", b"again")
    with pytest.raises(RemoteError, match=r"1.png: has changed while it was in use"):
        storage.read(item.url)
    remote_files._versions.clear()
    assert storage.read(f"{root}/1.png") == b"again"


def test_credentials_of_netrc_are_sent_and_never_shown(
    root: str, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    server.put("1.png", b"first")
    client._store.cache_clear()
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2secret\n")
    assert storage.read(f"{root}/1.png") == b"first"
    assert server.proxy.authorizations[-1].startswith("Basic ")
    client._store.cache_clear()
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me hunter2secret\n")
    with pytest.raises(RemoteError, match=r".netrc, line \d: is not a valid .netrc") as refused:
        client.info(f"{root}/1.png")
    assert "hunter2" not in str(refused.value)
    client._store.cache_clear()


def test_what_a_web_server_lacks_is_reported(root: str, server: ObjectServer) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read(f"{root}/none.png")
    with pytest.raises(DataError, match=r"none.zip: cannot be read"):
        load_manifest(f"{root}/none.zip")
    with pytest.raises(RemoteError, match=r"images: a web server's folder cannot be listed; name a table"):
        load_manifest(f"{root}/images")
    with (
        server.proxy.failing(1, ["500"]),
        pytest.raises(RemoteError, match=r"m.csv: failed 6 times, at last with .*HTTP 500"),
    ):
        load_manifest(f"{root}/m.csv")
    with (
        server.proxy.failing(1, ["cut"]),
        pytest.raises(RemoteError, match=r"photos.zip: failed 6 times, at last with"),
    ):
        client.read(client.info(f"{root}/photos.zip")._replace(size=10**6))
    with pytest.raises(
        RemoteError, match="http://127.0.0.1:9/a.zip: failed 6 times, at last with ConnectionError: ConnectError"
    ):
        load_manifest("http://127.0.0.1:9/a.zip")


class OddHandler(BaseHTTPRequestHandler):
    """Responses of servers that break the rules of HTTP. Every file claims 2 MiB of zeros at the method HEAD."""

    protocol_version = "HTTP/1.1"
    size = 2 << 20
    sent = 0

    def log_message(self, *_: object) -> None:
        pass

    def respond(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"content_length": str(len(body)), "etag": '"1"', **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with suppress(OSError):  # the client has closed the connection
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        if self.path == "/unmeasured.png":
            self.send_response(200)
            self.send_header("etag", '"1"')
            self.end_headers()
            return
        if self.path == "/signed.png":
            self.respond(302, location="/choices.png?X-Amz-Signature=hunter2secret")
            return
        refused = self.path == "/refused.png"
        self.respond(405 if refused else 200, content_length="0" if refused else str(self.size))

    def do_GET(self) -> None:
        if self.path == "/refused.png":
            self.respond(405, b"<html>not allowed</html>")
        elif self.path == "/choices.png":
            self.respond(300, b"<html>choose</html>")
        elif self.path == "/local.png":
            self.respond(302, location="file:///etc/passwd")
        elif self.path in ("/endless.png", "/unmeasured.png"):
            self.close_connection = True
            self.send_response(200)
            self.send_header("etag", '"1"')
            self.end_headers()
            with suppress(OSError):
                for _ in range(200):
                    self.wfile.write(bytes(1 << 20))
                    OddHandler.sent += 1 << 20
        elif "range" in self.headers:  # another range than the requested one, with the missing length
            start = int(self.headers["range"].removeprefix("bytes=").rstrip("-"))
            self.respond(206, b"1" * (self.size - start), content_range=f"bytes 0-{self.size - start - 1}/{self.size}")
        else:
            self.close_connection = True
            self.respond(200, bytes(self.size * 3 // 4), content_length=str(self.size))


@pytest.fixture
def odd(root: str) -> Iterator[str]:
    """The URL of a server with `OddHandler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), OddHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_responses_that_are_not_the_file_are_never_its_content(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "UNMEASURED", 5 << 20)
    for name, problem in (
        ("refused.png", "HTTP 405; check the URL"),
        ("choices.png", "HTTP 300; check the URL"),
        ("local.png", "redirects to a URL of another kind .*file.*; name a URL of http:// or https://"),
        ("unmeasured.png", "the server names no size and sent more than 5,242,880 bytes; check the URL"),
        ("endless.png", "has changed while it was in use"),
        ("ranges.png", "the server sent 'bytes 0-1048575/2097152' in place of the bytes from 1,048,576 on"),
    ):
        with pytest.raises(RemoteError, match=f"^{odd}/{name}: .*{problem}"):
            storage.read(f"{odd}/{name}")
    assert OddHandler.sent < 100 << 20  # the transfer ends where the file should


def test_the_signature_of_a_redirection_reaches_no_log(odd: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert client.info(f"{odd}/signed.png").size == OddHandler.size
    assert "X-Amz-Signature=***" in caplog.text
    assert "hunter2secret" not in caplog.text
