"""`refract serve SOURCE`: from the command line to a running server, and back to an exit code.

Nothing heavy is imported up here: --help and a mistyped option are answered at once.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from refract.models.allocator import keep_freed_memory
from refract.serve.cli.home import ensure_home
from refract.serve.cli.options import parse
from refract.serve.runtime.cores import cores, quota
from refract.serve.runtime.garbage_collection import spared

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.trace import TracerProvider

    from refract.models.bundle.bundle import Bundle
    from refract.serve.http.auth import ApiKeys
    from refract.serve.rollout.canary import Challenge
    from refract.serve.rollout.data_capture import DataCapture
    from refract.serve.rollout.registry_watcher import Build

logger = logging.getLogger(__name__)

FAILED, REFUSED = 1, 2

KEPT = 1 << 30
"""Bytes of freed memory that the server keeps for the next batch."""


class RefusedError(Exception):
    """What was asked cannot work: a bad source, bundle, device or address."""


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after a graceful end, 1 after a failure, 2 if it cannot serve that."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("refract.serve").setLevel(logging.INFO)
    ensure_home()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
    # resnet18 in float32 on two cores, one connection: 41 images a second, 28 without it.
    keep_freed_memory(at_most=KEPT)
    if quota():  # of which PyTorch, which is imported later, does not know
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    try:
        with _listen(arguments.host, arguments.port) as bound:
            _serve(arguments, bound)
    except RefusedError as err:
        return _say(str(err), REFUSED)
    except Exception as err:
        return _say(f"{type(err).__name__}: {err}", FAILED)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    """Of a start. An exception would be raised wherever the start is, and is lost in a library that catches all, or in a callback from C.
    Nothing is in flight yet, no buffer holds a line, and what is kept is written beside and then renamed."""
    os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded: that takes seconds, and a port that is taken should be said at once."""
    from refract.serve.http.transport.server import listen

    try:
        return listen(host, port)
    except OSError as err:
        raise RefusedError(f"cannot listen on {host}:{port}: {err.strerror}") from err


def _serve(arguments: argparse.Namespace, bound: socket.socket) -> None:
    from refract.serve.http.transport.server import Server, url

    bundle = _bundle(arguments.source)
    app = _app(bundle, arguments)
    ready = f"Refract serves {bundle.info.name} ({bundle.digest[:12]}) on {url(bound)}"
    try:
        told = {"on_ready": lambda: print(ready, flush=True), "on_leave": app.state.service.start_draining}
        with spared():
            times = {"drain_s": arguments.drain_s, "keep_alive_s": arguments.keep_alive_s}
            Server(app, **times, **told).run(sockets=[bound])
    except SystemExit as err:
        failure = app.state.failure
        if isinstance(failure, ValueError):  # a BundleError of the self-test
            raise RefusedError(str(failure)) from err
        raise failure or RuntimeError("the server did not start") from err


def _bundle(source: str) -> "Bundle":
    from refract.serve.rollout.model_source import SourceError, is_registered, resolve_in_subprocess, resolve

    try:
        folder = resolve_in_subprocess(source) if is_registered(source) else resolve(source)
    except SourceError as err:
        raise RefusedError(str(err)) from err
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        return load_bundle(folder)
    except BundleError as err:
        if not is_registered(source):
            raise RefusedError(str(err)) from err
        try:  # a download that was damaged since
            return load_bundle(resolve_in_subprocess(source, folder))
        except (BundleError, SourceError) as again:
            raise RefusedError(str(again)) from again


def _app(bundle: "Bundle", arguments: argparse.Namespace) -> "FastAPI":
    from refract.serve.http.access_log import write_lines
    from refract.serve.http.app import create_app
    from refract.serve.requests.limits import MIB, Limits
    from refract.serve.runtime.engine import build

    limits = Limits(
        max_body_bytes=int(arguments.max_body_mb * MIB),
        max_pixels=arguments.max_pixels,
        max_total_pixels=max(Limits.max_total_pixels, arguments.max_pixels),
        max_decoding_pixels=max(Limits.max_decoding_pixels, arguments.max_pixels),
    )
    made = partial(
        build,
        devices=_devices(arguments.device),
        backend=arguments.backend,
        replicas=arguments.replicas,
        largest=arguments.max_batch,
    )
    try:
        engine = made(bundle)
    except ValueError as err:
        raise RefusedError(str(err)) from err
    if arguments.access_log:
        write_lines()
    names = ("max_batch", "max_wait_ms", "max_requests", "deadline_s", "access_log", "root_path")
    options = {name: getattr(arguments, name) for name in names}
    options |= {"follow": _followed(arguments.source, arguments), "poll_s": arguments.poll_s, "build": made}
    options["cors_origins"] = arguments.cors_origin
    options["traces"] = _traces(arguments.traces)
    options["challenge"] = _challenge(arguments, made)
    options["sampling"] = _sampling(arguments)
    _warn_of_open_access(arguments)
    options |= {
        "keys": _keys("--keys", arguments.keys, rate=arguments.rate),
        "admin": _keys("--admin-keys", arguments.admin_keys, told="the keys of --admin-keys"),
    }
    app = create_app(engine, limits=limits, **options)
    if arguments.metrics_port is not None:
        try:
            port = app.state.service.metrics.listen(arguments.host, arguments.metrics_port)
        except OSError as err:
            where = f"{arguments.host}:{arguments.metrics_port}"
            raise RefusedError(f"--metrics-port: cannot listen on {where}: {err.strerror}") from err
        shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"metrics on http://{shown}:{port}/metrics", flush=True)
    return app


def _followed(source: str, arguments: argparse.Namespace) -> str | None:
    from refract.serve.rollout.model_source import is_registered

    return source if is_registered(source) and "@" in source and arguments.poll_s > 0 else None


def _challenge(arguments: argparse.Namespace, build: "Build") -> "Challenge | None":
    from refract.serve.rollout.canary import Challenge
    from refract.serve.rollout.model_source import is_registered

    source = arguments.challenger
    if source is None:
        return None
    try:
        engine = build(_bundle(source))
    except (RefusedError, ValueError) as err:
        if not is_registered(source):
            raise RefusedError(f"--challenger: {err}") from err
        engine = None  # an alias that is not set yet, or not any more, must not keep a service from starting
        print(f"refract serve: nothing challenges yet: {err}", file=sys.stderr)
    answers = arguments.canary is not None
    share = arguments.canary if answers else arguments.shadow
    return Challenge(engine, share, answers, _followed(source, arguments))


def _traces(address: str | None) -> "TracerProvider | None":
    from refract.serve.http.tracing import provider

    if address is None:
        return None
    if not address.startswith(("http://", "https://")):
        raise RefusedError(f"--traces: {address!r} is no URL, as http://localhost:4318/v1/traces")
    try:
        return provider(address)
    except ModuleNotFoundError as err:
        raise RefusedError("--traces needs the extra tracing: opentelemetry-exporter-otlp-proto-http") from err


def _sampling(arguments: argparse.Namespace) -> "DataCapture | None":
    from refract.serve.requests.limits import MIB
    from refract.serve.rollout.data_capture import DataCapture

    if arguments.sample is None:
        return None
    most = int(arguments.sample_mb * MIB)
    try:
        return DataCapture(
            arguments.sample, share=arguments.sample_share, most_bytes=most, below=arguments.sample_below
        )
    except OSError as err:
        raise RefusedError(f"--sample: {arguments.sample}: {err.strerror}") from err


def _devices(wanted: str) -> list[str]:
    import torch

    from refract.serve.runtime.gpus import unseen

    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    why = unseen()
    if wanted == "auto":
        if why:
            logger.warning("the server computes on the CPU, as PyTorch sees no GPU: %s", why)
        return there[:1] or ["cpu"]
    if wanted == "all" and there:
        return there
    devices = ["cuda:0" if name == "cuda" else name for name in wanted.split(",")]
    for name in devices:
        if name != "cpu" and name not in there:
            offered = ", ".join(["cpu", *there])
            hint = f": {why}" if why else ""
            raise RefusedError(f"--device {wanted}: this machine offers {offered} to torch, and no other device{hint}")
    return devices


def _warn_of_open_access(arguments: argparse.Namespace) -> None:
    host = arguments.host
    if arguments.keys is None and host not in ("127.0.0.1", "::1", "localhost"):
        print(f"refract serve: anybody who reaches {host} may ask; --keys FILE asks for a key", file=sys.stderr)


def _keys(option: str, file: Path | None, **own: Any) -> "ApiKeys | None":
    from refract.serve.http.auth import ApiKeys

    if file is None:
        return None
    try:
        return ApiKeys(file, **own)
    except OSError as err:
        raise RefusedError(f"{option}: {file}: {err.strerror}") from err
    except ValueError as err:
        raise RefusedError(f"{option}: {err}") from err


def _say(message: str, code: int) -> int:
    print(f"refract serve: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
