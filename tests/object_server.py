"""A real S3 server on loopback (moto), behind a proxy that injects faults: errors 500, cut and stalled transfers."""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread

import boto3
from moto.server import ThreadedMotoServer

FAULTS = ("500", "cut", "503")
logging.getLogger("werkzeug").setLevel(logging.WARNING)
KEYS = {"AWS_ACCESS_KEY_ID": "loopback", "AWS_SECRET_ACCESS_KEY": "not-a-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}


class FaultProxy:
    """Forwards requests to a server. Every `every`-th read gets the next fault of `faults`; 0 for none. reads: (method, path), in order.

    writes: the keys that were written or deleted, in order; refuses_writes: answers them with 403.
    """

    def __init__(self, host: str, port: int) -> None:
        self.every, self.faults = 0, itertools.cycle(FAULTS)
        self.reads: list[tuple[str, str]] = []
        self.writes: list[tuple[str, str]] = []
        self.refuses_writes = False
        self.injected: list[str] = []
        self.authorizations: list[str] = []
        self.released = Event()
        self._lock, proxy = Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                proxy.forward(self, host, port)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def failing(self, every: int, faults: Sequence[str] = FAULTS) -> Iterator[None]:
        """Inject faults during the block."""
        self.every, self.faults = every, itertools.cycle(faults)
        self.injected.clear()
        self.reads.clear()
        try:
            yield
        finally:
            self.every = 0

    def fault_of(self, method: str, path: str) -> str:
        with self._lock:
            if method not in ("GET", "HEAD"):
                self.writes.append((method, path))
                return "403" if self.refuses_writes else ""
            self.reads.append((method, path))
            if not self.every or len(self.reads) % self.every:
                return ""
            fault = next(self.faults)
            self.injected.append(fault)
            return fault

    def forward(self, request: BaseHTTPRequestHandler, host: str, port: int) -> None:
        self.authorizations.append(request.headers.get("authorization", ""))
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        fault = self.fault_of(request.command, request.path)
        if fault.isdigit():
            request.send_response(int(fault))
            request.send_header("content-length", "0")
            request.end_headers()
            return
        connection = HTTPConnection(host, port, timeout=60)
        connection.request(request.command, request.path, body, dict(request.headers.items()))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        request.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                request.send_header(name, value)
        size = response.getheader("content-length") if request.command == "HEAD" else str(len(data))
        request.send_header("content-length", size or "0")
        request.end_headers()
        if fault and request.command == "GET":
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            if fault == "stall":
                self.released.wait(60)
            request.close_connection = True
            return
        request.wfile.write(data)


class ObjectServer:
    """bucket: an empty bucket `data`; proxy: through which clients reach the server by the environment."""

    def __init__(self) -> None:
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        self.proxy = FaultProxy(host, port)
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": self.proxy.url}
        self.client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        self.client.create_bucket(Bucket="data")

    def put(self, key: str, data: bytes) -> None:
        """Store an object that may be read without credentials, as on a web server."""
        self.client.put_object(Bucket="data", Key=key, Body=data, ACL="public-read")

    def put_folder(self, folder: Path, prefix: str) -> None:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def close(self) -> None:
        self.proxy.close()
        self._moto.stop()
        for name in (*KEYS, "AWS_ENDPOINT_URL"):
            del os.environ[name]
