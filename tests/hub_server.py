"""A server on loopback with the part of the Hugging Face Hub's HTTP interface that the Hub's own library calls here."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_REVISION = r"refs/pr/\d+|a/branch|[^/]+"

TOKEN = "hf_not_a_real_token"


class Hub:
    """One repository, which needs the token. files: path → content on the branch main; large ones are stored by LFS."""

    def __init__(self, repository: str) -> None:
        """repository: such as `datasets/acme/photos`, or `acme/flowers` for a model."""
        self.files: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.failures = 0
        self._repository = repository
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._respond(self)

            def do_POST(self) -> None:
                hub._respond(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self) -> str:
        """Store the present files as a commit. Returns its name."""
        content = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.files.items())})
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = dict(self.files)
        return name

    def _respond(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(path)
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _send(request, 401, b'{"error": "Invalid credentials"}', {"x-error-code": "RepoNotFound"})
        if self.failures:
            self.failures -= 1
            return _send(request, 502, b"")
        kind = self._repository if self._repository.startswith("datasets/") else f"models/{self._repository}"
        if path == f"/api/{kind}":
            path = f"{path}/revision/main"
        if match := re.fullmatch(rf"/api/{kind}/(tree|paths-info|revision)/({_REVISION})/?(.*)", path):
            action, revision, prefix = match.groups()
            if (files := self._files(revision)) is not None:
                names = parse_qs(body.decode()).get("paths", [])
                content: object = {
                    "tree": [_entry(name, data) for name, data in files.items() if f"/{name}".startswith(f"/{prefix}")],
                    "paths-info": [_entry(name, files[name]) for name in names if name in files],
                    "revision": {"id": self._repository, "sha": self.commit()},
                }[action]
                return _send(request, 200, json.dumps(content).encode())
            return _send(request, 404, b'{"error": "not found"}', {"x-error-code": "RevisionNotFound"})
        if match := re.fullmatch(rf"/{self._repository}/resolve/({_REVISION})/(.*)", path):
            files = self._files(match[1])
            if files is not None and match[2] in files:
                return _send(request, 200, files[match[2]])
        return _send(request, 404, b'{"error": "not found"}', {"x-error-code": "RepoNotFound"})

    def _files(self, revision: str) -> dict[str, bytes] | None:
        return self.files if revision == "main" else self.commits.get(revision)


def _entry(path: str, data: bytes) -> dict[str, object]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    large = {"lfs": lfs} if len(data) > 2000 else {}
    return {"type": "file", "path": path, "size": len(data), "oid": git, **large}


def _send(request: BaseHTTPRequestHandler, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(code)
    sent = {"content-length": str(len(data)), "content-type": "application/json", **(headers or {})}
    for name, value in sent.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(data)
