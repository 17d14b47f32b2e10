"""`refract serve SOURCE`: start the server from its command line, and return an exit code.

The module imports nothing heavy, so that --help and usage errors respond at once.
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

EXIT_FAILURE, EXIT_INVALID = 1, 2

CACHED_MEMORY_BYTES = 1 << 30
"""Most freed memory that the allocator keeps for the next batch, in bytes."""


class InvalidOptionError(Exception):
    """An option cannot work: the source, bundle, device, address or a file is invalid. The command exits with 2."""


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after a graceful shutdown, 1 after a failure, 2 for invalid options."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("refract.serve").setLevel(logging.INFO)
    ensure_home()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _exit)
    # resnet18 in float32 on two cores, one connection: 41 images per second, 28 without it.
    keep_freed_memory(at_most=CACHED_MEMORY_BYTES)
    if quota():  # PyTorch, which is imported later, ignores the CPU quota of a container
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    try:
        with _listen(arguments.host, arguments.port) as bound:
            _serve(arguments, bound)
    except InvalidOptionError as err:
        return _report(str(err), EXIT_INVALID)
    except Exception as err:
        return _report(f"{type(err).__name__}: {err}", EXIT_FAILURE)
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    """Handle a signal during start-up by exiting at once.

    An exception could be raised inside a library that catches everything, or inside a callback from C, and be lost. Exiting is safe: no
    request is in flight, no buffer holds output, and files are written under a temporary name and then renamed."""
    os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    """Bind the socket. This precedes loading the model, which takes seconds, so that a taken port is reported at once."""
    from refract.serve.http.transport.server import listen

    try:
        return listen(host, port)
    except OSError as err:
        raise InvalidOptionError(f"cannot listen on {host}:{port}: {err.strerror}") from err


def _serve(arguments: argparse.Namespace, bound: socket.socket) -> None:
    from refract.serve.http.transport.server import Server, url

    _load_plugins(arguments.plugin)
    bundle = _bundle(arguments.source)
    app = _app(bundle, arguments)
    ready = f"Refract serves {bundle.info.name} ({bundle.digest[:12]}) on {url(bound)}"
    try:
        callbacks = {"on_ready": lambda: print(ready, flush=True), "on_leave": app.state.service.start_draining}
        with spared():
            times = {"drain_s": arguments.drain_s, "keep_alive_s": arguments.keep_alive_s}
            Server(app, **times, **callbacks).run(sockets=[bound])
    except SystemExit as err:
        failure = app.state.failure
        if isinstance(failure, ValueError):  # includes the BundleError of a failed self-test
            raise InvalidOptionError(str(failure)) from err
        raise failure or RuntimeError("the server did not start") from err


def _load_plugins(entries: list[str]) -> None:
    from refract.plugins import PluginError, load

    try:
        load(entries)
    except PluginError as err:
        raise InvalidOptionError(f"--plugin: {err}") from err


def _bundle(source: str) -> "Bundle":
    from refract.serve.rollout.model_source import SourceError, is_registered, resolve, resolve_in_subprocess

    try:
        folder = resolve_in_subprocess(source) if is_registered(source) else resolve(source)
    except SourceError as err:
        raise InvalidOptionError(str(err)) from err
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        return load_bundle(folder)
    except BundleError as err:
        if not is_registered(source):
            raise InvalidOptionError(str(err)) from err
        try:  # the cached download is damaged: download it again
            return load_bundle(resolve_in_subprocess(source, folder))
        except (BundleError, SourceError) as second_error:
            raise InvalidOptionError(str(second_error)) from second_error


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
    build_engine = partial(
        build,
        devices=_devices(arguments.device),
        backend=arguments.backend,
        replicas=arguments.replicas,
        largest=arguments.max_batch,
    )
    try:
        engine = build_engine(bundle)
    except ValueError as err:
        raise InvalidOptionError(str(err)) from err
    if arguments.access_log:
        write_lines()
    names = ("max_batch", "max_wait_ms", "max_requests", "deadline_s", "access_log", "root_path")
    options = {name: getattr(arguments, name) for name in names}
    options |= {"follow": _followed(arguments.source, arguments), "poll_s": arguments.poll_s, "build": build_engine}
    options["cors_origins"] = arguments.cors_origin
    options["traces"] = _traces(arguments.traces)
    options["challenge"] = _challenge(arguments, build_engine)
    options["sampling"] = _sampling(arguments)
    _warn_of_open_access(arguments)
    options |= {
        "keys": _keys("--keys", arguments.keys, rate=arguments.rate),
        "admin": _keys("--admin-keys", arguments.admin_keys, description="the keys of --admin-keys"),
    }
    app = create_app(engine, limits=limits, **options)
    if arguments.metrics_port is not None:
        try:
            port = app.state.service.metrics.listen(arguments.host, arguments.metrics_port)
        except OSError as err:
            address = f"{arguments.host}:{arguments.metrics_port}"
            raise InvalidOptionError(f"--metrics-port: cannot listen on {address}: {err.strerror}") from err
        url_host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"metrics on http://{url_host}:{port}/metrics", flush=True)
    return app


def _followed(source: str, arguments: argparse.Namespace) -> str | None:
    """Return the registry URI to poll for new versions; None if `source` is not an alias or polling is disabled."""
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
    except (InvalidOptionError, ValueError) as err:
        if not is_registered(source):
            raise InvalidOptionError(f"--challenger: {err}") from err
        engine = None  # an alias that is not set, or whose model is invalid, must not keep the server from starting
        print(f"refract serve: the challenger is not started yet: {err}", file=sys.stderr)
    answers = arguments.canary is not None
    share = arguments.canary if answers else arguments.shadow
    return Challenge(engine, share, answers, _followed(source, arguments))


def _traces(address: str | None) -> "TracerProvider | None":
    from refract.serve.http.tracing import provider

    if address is None:
        return None
    if not address.startswith(("http://", "https://")):
        raise InvalidOptionError(f"--traces: {address!r} is not an http(s) URL such as http://localhost:4318/v1/traces")
    try:
        return provider(address)
    except ModuleNotFoundError as err:
        message = "--traces needs OpenTelemetry, which is not installed; install refract with the extra `tracing`"
        raise InvalidOptionError(message) from err


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
        raise InvalidOptionError(f"--sample: {arguments.sample}: {err.strerror}") from err


def _devices(option: str) -> list[str]:
    import torch

    from refract.serve.runtime.gpus import unseen

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    cause = unseen()
    if option == "auto":
        if cause:
            logger.warning("the server runs on the CPU, as PyTorch sees no GPU: %s", cause)
        return gpus[:1] or ["cpu"]
    if option == "all" and gpus:
        return gpus
    devices = ["cuda:0" if name == "cuda" else name for name in option.split(",")]
    for name in devices:
        if name != "cpu" and name not in gpus:
            available = ", ".join(["cpu", *gpus])
            hint = f" ({cause})" if cause else ""
            raise InvalidOptionError(
                f"--device {option}: device {name!r} is not available; available: {available}{hint}"
            )
    return devices


def _warn_of_open_access(arguments: argparse.Namespace) -> None:
    host = arguments.host
    if arguments.keys is None and host not in ("127.0.0.1", "::1", "localhost"):
        warning = f"every client that reaches {host} can use the server; --keys FILE requires an API key"
        print(f"refract serve: {warning}", file=sys.stderr)


def _keys(option: str, file: Path | None, **options: Any) -> "ApiKeys | None":
    from refract.serve.http.auth import ApiKeys

    if file is None:
        return None
    try:
        return ApiKeys(file, **options)
    except OSError as err:
        raise InvalidOptionError(f"{option}: {file}: {err.strerror}") from err
    except ValueError as err:
        raise InvalidOptionError(f"{option}: {err}") from err


def _report(message: str, code: int) -> int:
    """Print `message` as one line on the standard error. Returns the exit code."""
    print(f"refract serve: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
