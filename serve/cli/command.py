"""`refract serve SOURCE`: start the server from its command line, and return an exit code.

The module imports nothing heavy, so that --help and usage errors respond at once.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from refract import output, progress
from refract.cores import limit_threads
from refract.models.allocator import keep_freed_memory
from refract.serve.cli.config import ServeConfig
from refract.serve.cli.home import ensure_home
from refract.serve.cli.options import parse
from refract.serve.runtime.garbage_collection import spared

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.trace import TracerProvider

    from refract.models.bundle.bundle import Bundle
    from refract.serve.feedback.feedback_log import FeedbackLog
    from refract.serve.http.auth import ApiKeys
    from refract.serve.rollout.canary import Challenge
    from refract.serve.rollout.data_capture import DataCapture
    from refract.serve.rollout.registry_watcher import Build

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

EXIT_FAILURE, EXIT_INVALID = 1, 2

CACHED_MEMORY_BYTES = 1 << 30
"""Most freed memory that the allocator keeps for the next batch, in bytes."""


class InvalidOptionError(Exception):
    """An option cannot work: the source, bundle, device, address or a file is invalid. The command exits with 2."""


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after a graceful shutdown, 1 after a failure, 2 for invalid options."""
    config = parse(argv)
    logging.basicConfig(level=logging.WARNING, format=output.log_format(LOG_FORMAT))
    logging.getLogger("refract.serve").setLevel(output.level())
    ensure_home()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _exit)
    # resnet18 in float32 on two cores, one connection: 41 images per second, 28 without it.
    keep_freed_memory(at_most=CACHED_MEMORY_BYTES)
    limit_threads()
    progress.stage("loading libraries")
    try:
        with _listen(config.host, config.port) as bound, _grpc_socket(config) as grpc_socket:
            _serve(config, bound, grpc_socket)
    except InvalidOptionError as err:
        return _failed(str(err), EXIT_INVALID)
    except Exception as err:
        return _failed(f"{type(err).__name__}: {err}", EXIT_FAILURE)
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    """Handle a signal during start-up by exiting at once.

    An exception could be raised inside a library that catches everything, or inside a callback from C, and be lost. Exiting is safe: no
    request is in flight, no buffer holds output, and files are written under a temporary name and then renamed."""
    os._exit(0)


def _grpc_socket(config: ServeConfig) -> AbstractContextManager[socket.socket | None]:
    """Bind the socket of --grpc-port; None without the option."""
    if config.grpc_port is None:
        return nullcontext()
    origin = config.origin("grpc_port")
    try:
        import google.protobuf
        import grpc
    except ImportError as err:
        message = f"{origin} needs gRPC, which is not installed; run pip install 'refract[grpc]'"
        raise InvalidOptionError(message) from err
    logger.debug("gRPC %s, protobuf %s", grpc.__version__, google.protobuf.__version__)
    return _listen(config.host, config.grpc_port, origin)


def _listen(host: str, port: int, origin: str = "--port") -> socket.socket:
    """Bind the socket. This precedes loading the model, which takes seconds, so that a taken port is reported at once."""
    from refract.serve.http.transport.server import listen

    try:
        return listen(host, port)
    except OSError as err:
        raise InvalidOptionError(
            f"cannot listen on {host}:{port}: {err.strerror}; choose another --host or {origin}"
        ) from err


def _serve(config: ServeConfig, bound: socket.socket, grpc_socket: socket.socket | None) -> None:
    from refract.serve.http.transport.server import Server, address, url

    _load_plugins(config)
    bundle = _bundle(config.source)
    app = _app(bundle, config, grpc_socket)
    calls, grpc_address = app.state.calls, address(grpc_socket) if grpc_socket else None
    server = Server(
        app,
        drain_s=config.drain_s,
        keep_alive_s=config.keep_alive_s,
        on_ready=lambda: _announce(bundle, url(bound), grpc_address),
        on_leave=app.state.service.start_draining,
        on_stop=calls.stop if calls else None,
    )
    try:
        with spared():
            server.run(sockets=[bound])
    except SystemExit as err:
        failure = app.state.failure
        if isinstance(failure, ValueError):  # includes the BundleError of a failed self-test
            raise InvalidOptionError(str(failure)) from err
        raise failure or RuntimeError("the server did not start") from err


def _announce(bundle: "Bundle", url: str, grpc_address: str | None) -> None:
    progress.finish()
    print(f"Refract serves {bundle.info.name} ({bundle.digest[:12]}) on {url}", flush=True)
    if grpc_address:
        print(f"gRPC on {grpc_address}", flush=True)
    calls = {"grpc": grpc_address} if grpc_address else {}
    output.result({"name": bundle.info.name, "digest": bundle.digest, "url": url} | calls)


def _load_plugins(config: ServeConfig) -> None:
    from refract.plugins import PluginError, load

    try:
        load(config.plugin)
    except PluginError as err:
        raise InvalidOptionError(f"{config.origin('plugin')}: {err}") from err


def _bundle(source: str) -> "Bundle":
    from refract.remote.address import AddressError, is_remote
    from refract.serve.rollout.model_source import SourceError, is_registered, resolve, resolve_in_subprocess

    progress.stage(f"loading {source}")
    remote = is_remote(source)
    try:
        folder = resolve_in_subprocess(source) if is_registered(source) else None if remote else resolve(source)
    except SourceError as err:
        raise InvalidOptionError(str(err)) from err
    from refract.errors import ServiceError
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        return load_bundle(source if folder is None else folder)
    except (AddressError, ServiceError) as err:
        raise InvalidOptionError(str(err)) from err
    except BundleError as err:
        if not is_registered(source):
            raise InvalidOptionError(str(err)) from err
        try:  # the cached download is damaged: download it again
            return load_bundle(resolve_in_subprocess(source, folder))
        except (BundleError, SourceError) as second_error:
            raise InvalidOptionError(str(second_error)) from second_error


def _app(bundle: "Bundle", config: ServeConfig, grpc_socket: socket.socket | None) -> "FastAPI":
    from refract.serve.http.access_log import write_lines
    from refract.serve.http.app import create_app
    from refract.serve.requests.limits import MIB, Limits
    from refract.serve.runtime.engine import build

    build_engine = partial(
        build,
        devices=_devices(config.device, config.origin("device")),
        backend=config.backend,
        replicas=config.replicas,
        largest=config.max_batch,
    )
    try:
        engine = build_engine(bundle)
    except ValueError as err:
        raise InvalidOptionError(str(err)) from err
    if config.access_log:
        write_lines()
    _warn_of_open_access(config)
    app = create_app(
        engine,
        limits=Limits(
            max_body_bytes=int(config.max_body_mb * MIB),
            max_pixels=config.max_pixels,
            max_total_pixels=max(Limits.max_total_pixels, config.max_pixels),
            max_decoding_pixels=max(Limits.max_decoding_pixels, config.max_pixels),
        ),
        max_batch=config.max_batch,
        max_wait_ms=config.max_wait_ms,
        max_requests=config.max_requests,
        deadline_s=config.deadline_s,
        min_familiarity=config.min_familiarity,
        similar=config.similar,
        feedback_keep=config.feedback_keep,
        feedback_hours=config.feedback_hours,
        feedback_log=_feedback_log(config),
        cache_mb=config.cache_mb,
        keys=_keys(config),
        admin=_admin_keys(config),
        access_log=config.access_log,
        traces=_traces(config),
        follow=_followed(config.source, config.poll_s),
        challenge=_challenge(config, build_engine),
        poll_s=config.poll_s,
        build=build_engine,
        sampling=_sampling(config),
        cors_origins=config.cors_origin,
        root_path=config.root_path,
        grpc_socket=grpc_socket,
    )
    if config.metrics_port is not None:
        _serve_metrics(app, config.host, config.metrics_port, config.origin("metrics_port"))
    return app


def _serve_metrics(app: "FastAPI", host: str, port: int, origin: str) -> None:
    try:
        port = app.state.service.metrics.listen(host, port)
    except OSError as err:
        raise InvalidOptionError(f"{origin}: cannot listen on {host}:{port}: {err.strerror}") from err
    url_host = f"[{host}]" if ":" in host else host
    print(f"metrics on http://{url_host}:{port}/metrics", flush=True)


def _followed(source: str, poll_s: float) -> str | None:
    """Return the registry URI to poll for new versions; None if `source` is not an alias or polling is disabled."""
    from refract.serve.rollout.model_source import is_registered

    return source if is_registered(source) and "@" in source and poll_s > 0 else None


def _challenge(config: ServeConfig, build: "Build") -> "Challenge | None":
    from refract.serve.rollout.canary import Challenge
    from refract.serve.rollout.model_source import is_registered

    source = config.challenger
    if source is None:
        return None
    follow, engine = _followed(source, config.poll_s), None
    try:
        engine = build(_bundle(source))
    except (InvalidOptionError, ValueError) as err:
        if not is_registered(source):
            raise InvalidOptionError(f"{config.origin('challenger')}: {err}") from err
        # An alias that is not set, or whose model is invalid, must not keep the server from starting.
        retry = "does not try again; correct the source and restart it"
        if follow:
            retry = f"looks it up again every {config.poll_s:g} s"
        _report(f"{config.origin('challenger')}: {err}; the server starts without a challenger and {retry}")
    fraction = config.shadow if config.canary is None else config.canary
    assert fraction is not None
    return Challenge(engine, fraction, config.canary is not None, follow)


def _traces(config: ServeConfig) -> "TracerProvider | None":
    from refract.serve.http.tracing import provider

    address, origin = config.traces, config.origin("traces")
    if address is None:
        return None
    if not address.startswith(("http://", "https://")):
        raise InvalidOptionError(f"{origin}: {address!r} is not an http(s) URL such as http://localhost:4318/v1/traces")
    try:
        return provider(address)
    except ModuleNotFoundError as err:
        message = f"{origin} needs OpenTelemetry, which is not installed; install refract with the extra `tracing`"
        raise InvalidOptionError(message) from err


def _sampling(config: ServeConfig) -> "DataCapture | None":
    from refract.serve.requests.limits import MIB
    from refract.serve.rollout.data_capture import DataCapture

    if config.sample is None:
        return None
    most = int(config.sample_mb * MIB)
    try:
        return DataCapture(config.sample, fraction=config.sample_fraction, most_bytes=most, below=config.sample_below)
    except OSError as err:
        raise InvalidOptionError(f"{config.origin('sample')}: {config.sample}: {err.strerror}") from err


def _feedback_log(config: ServeConfig) -> "FeedbackLog | None":
    from refract.serve.feedback.feedback_log import FeedbackLog

    if config.feedback_dir is None:
        return None
    try:
        return FeedbackLog(config.feedback_dir)
    except OSError as err:
        raise InvalidOptionError(f"{config.origin('feedback_dir')}: {config.feedback_dir}: {err.strerror}") from err


def _devices(option: str, origin: str = "--device") -> list[str]:
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
                f"{origin} {option}: device {name!r} is not available; available: {available}{hint}"
            )
    return devices


def _warn_of_open_access(config: ServeConfig) -> None:
    host = config.host
    if config.keys is None and host not in ("127.0.0.1", "::1", "localhost"):
        _report(f"every client that reaches {host} can use the server; --keys FILE requires an API key")


def _keys(config: ServeConfig) -> "ApiKeys | None":
    from refract.serve.http.auth import ApiKeys

    if config.keys is None:
        return None
    with _naming(config.origin("keys"), config.keys):
        return ApiKeys(config.keys, rate=config.rate)


def _admin_keys(config: ServeConfig) -> "ApiKeys | None":
    from refract.serve.http.auth import ApiKeys

    if config.admin_keys is None:
        return None
    with _naming(config.origin("admin_keys"), config.admin_keys):
        return ApiKeys(config.admin_keys, description="the keys of --admin-keys")


@contextmanager
def _naming(origin: str, file: Path) -> Iterator[None]:
    """Raise errors of reading `file` as InvalidOptionError, which names where the file was set."""
    try:
        yield
    except OSError as err:
        raise InvalidOptionError(f"{origin}: {file}: {err.strerror}") from err
    except ValueError as err:
        raise InvalidOptionError(f"{origin}: {err}") from err


def _failed(message: str, code: int) -> int:
    """Print an error, with --verbose also its traceback. Returns the exit code."""
    progress.finish()
    logger.debug("the error was raised here:", exc_info=True)
    _report(message)
    return code


def _report(message: str) -> None:
    """Print `message` as one line on the standard error."""
    progress.clear()
    print(f"refract serve: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
