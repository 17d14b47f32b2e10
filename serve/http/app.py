"""The ASGI application: routes, middleware and lifespan around the prediction service."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from refract.models.bundle.bundle import Bundle, BundleError
from refract.serve.errors import RequestError
from refract.serve.feedback.feedback_log import FeedbackLog
from refract.serve.feedback.recent_predictions import RecentPredictions
from refract.serve.http import errors
from refract.serve.http.access_log import AccessLog
from refract.serve.http.auth import ApiKeys
from refract.serve.http.base_path import BasePath
from refract.serve.http.cors import Cors
from refract.serve.http.live_metrics import LiveMetrics
from refract.serve.http.methods import Methods
from refract.serve.http.openapi import DESCRIPTION, problems
from refract.serve.http.routes.embed import EMBED, add_embed
from refract.serve.http.routes.feedback import FEEDBACK, add_feedback
from refract.serve.http.routes.predict import PREDICT, DirectRoute, add_predict
from refract.serve.http.routes.v2 import add_v2
from refract.serve.http.tracing import Tracing, shut_down
from refract.serve.http.transport.server import GRACE_S
from refract.serve.http.ui import add_page
from refract.serve.metrics import Metrics
from refract.serve.requests.body import Bodies
from refract.serve.requests.limits import Limits
from refract.serve.rollout.canary import Challenge, Challenger
from refract.serve.rollout.data_capture import DataCapture
from refract.serve.rollout.registry_watcher import Build, registry_watchers
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.gpus import describe
from refract.serve.runtime.service import Service
from refract.serve.runtime.settings import ServiceSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from refract.serve.grpc.server import GrpcServer

logger = logging.getLogger(__name__)


def create_app(
    served: Bundle | Engine,
    *,
    limits: Limits | None = None,
    max_batch: int = ServiceSettings.max_batch,
    max_wait_ms: float = ServiceSettings.max_wait_ms,
    max_queue: int = ServiceSettings.max_queue,
    max_requests: int = ServiceSettings.max_requests,
    deadline_s: float = ServiceSettings.deadline_s,
    min_familiarity: float | None = None,
    similar: bool = False,
    feedback_keep: int = ServiceSettings.feedback_keep,
    feedback_hours: float = ServiceSettings.feedback_hours,
    feedback_log: FeedbackLog | None = None,
    cache_mb: float = ServiceSettings.cache_mb,
    keys: ApiKeys | None = None,
    admin: ApiKeys | None = None,
    access_log: bool = False,
    traces: "TracerProvider | None" = None,
    follow: str | None = None,
    challenge: Challenge | None = None,
    poll_s: float = 60.0,
    build: Build = Engine,
    sampling: DataCapture | None = None,
    cors_origins: Sequence[str] = (),
    root_path: str = "",
    grpc_socket: socket.socket | None = None,
) -> FastAPI:
    """Return the application that serves the model `served`. A bundle is served on the CPU.

    keys: API keys of the clients; None lets every client predict. admin: API keys for `/admin/rollback`, in place of `keys`; without
    either the route is disabled. access_log: log one line for each request. traces: receives the spans; shut down with the application.
    follow: the registry URI of the bundle, models:/NAME@ALIAS. It is resolved every `poll_s` seconds; on a new version `build` creates its
    engine, which is hot-swapped. challenge: a second model, for canary or shadow requests. sampling: captures a sample of the requests.
    feedback_log: stores the feedback of clients; it is closed with the application.
    cors_origins: origins whose pages may read responses, `*` for all. root_path: the path of a reverse proxy below which the server runs.
    grpc_socket: a bound socket whose address also serves gRPC, see `GrpcServer`; it needs the extra `grpc`.
    The other parameters are those of `Limits` and of `ServiceSettings`.

    The lifespan runs the self-test. If it fails, the server does not start and `app.state.failure` holds the exception. Routes may be added
    to the application; middleware and exception handlers may not.
    Raises ValueError or BundleError for an invalid parameter or an unusable bundle.
    """
    engine = served if isinstance(served, Engine) else Engine(served)
    settings = ServiceSettings(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_requests=max_requests,
        deadline_s=deadline_s,
        min_familiarity=min_familiarity,
        similar=similar,
        feedback_keep=feedback_keep,
        feedback_hours=feedback_hours,
        cache_mb=cache_mb,
    )
    metrics = Metrics()
    if sampling:
        sampling.count = metrics.sampled
        sampling.on_image = feedback_log.captured if feedback_log else None
    service = Service(engine, limits=limits or Limits(), metrics=metrics, settings=settings, sampling=sampling)
    _add_gauges(metrics, service)

    watchers = registry_watchers(service, follow, challenge, build=build, every_s=poll_s)
    first_challenges = [challenge] if challenge and challenge.engine else []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await service.start()
            if calls:
                await calls.start()
        except Exception as err:
            app.state.failure = err
            raise
        while first_challenges:  # popped, so that no reference keeps its engine alive after a hot swap
            await _start_challenge(service, first_challenges.pop())
        tasks = [asyncio.create_task(watcher.run()) for watcher in watchers]
        yield
        for task in tasks:
            task.cancel()
        if calls:
            await calls.stop(GRACE_S)
        await service.stop()
        if feedback_log:
            await asyncio.to_thread(feedback_log.close)
        if traces:
            await shut_down(traces)

    app = FastAPIOffline(
        title="Refract",
        summary=f"Image classification by {engine.bundle.info.name}",
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,  # behind a load balancer the server does not know its own URL
        telemetry={"tracing": False, "metrics": False, "logs": False},  # see `refract.serve.http.tracing` instead
    )
    app.state.failure, app.state.service = None, service
    respond = errors.install(app, partial(_count_rejected, metrics))
    rated = _dependencies(keys) if keys else []
    allowed = _dependencies(keys.unrated()) if keys else []
    bodies = Bodies(service.limits)
    calls = app.state.calls = _grpc_server(grpc_socket, service, bodies, keys, access_log, traces)
    predict = add_predict(app, service, bodies, keys, rated)
    add_embed(app, service, bodies, rated)
    _add_health(app, service, allowed)
    add_feedback(app, service, feedback_log, allowed)
    add_v2(app, service, bodies, allowed, rated)
    guards = admin or keys
    _add_admin(app, service, guards)
    add_page(app)
    # These wrap the whole stack, so they also see the responses of Starlette's and FastAPI's own middleware.
    routes = DirectRoute(Methods(app.build_middleware_stack(), lambda: app.routes), PREDICT, predict, respond)
    with_cors: ASGIApp = Cors(routes, cors_origins) if cors_origins else routes
    with_base_path = BasePath(with_cors, root_path) if root_path else with_cors
    with_access_log: ASGIApp = AccessLog(with_base_path, log=access_log)
    named_paths = {PREDICT, root_path + PREDICT}
    app.middleware_stack = (
        Tracing(with_access_log, provider=traces, named_paths=named_paths) if traces else with_access_log
    )
    return app


def _grpc_server(
    bound: socket.socket | None,
    service: Service,
    bodies: Bodies,
    keys: ApiKeys | None,
    access_log: bool,
    traces: "TracerProvider | None",
) -> "GrpcServer | None":
    """Return the server of the calls over gRPC, see `GrpcServer`; None without a socket."""
    if bound is None:
        return None
    from refract.serve.grpc.server import GrpcServer  # imports gRPC, which most servers do not need

    return GrpcServer(bound, service, bodies, keys=keys, access_log=access_log, traces=traces)


def _add_gauges(metrics: Metrics, service: Service) -> None:
    """Add the gauges whose values are read at each scrape."""
    metrics.watch("requests_in_flight", "Requests in flight", lambda: service.admission.in_flight)
    metrics.watch("images_waiting", "Images that wait for a batch to form", lambda: service.models.champion.waiting)
    metrics.watch("ready", "1 if /readyz returns 200, else 0", lambda: float(service.accepting))
    cache = service.cache
    metrics.watch("cache_bytes", "Memory of the response cache in use", lambda: cache.used_bytes if cache else 0)
    if service.recent:
        metrics.registry.register(LiveMetrics(service.recent))
    for gpu in describe(service.models.engine.devices):
        metrics.watch_gpu(gpu.device, gpu.name, gpu.driver, partial(describe, [gpu.device]))


def _count_rejected(metrics: Metrics, path: str, code: str) -> None:
    """Count a rejected request if it is feedback or a prediction request."""
    if path == FEEDBACK and code != "method_not_allowed":
        metrics.judged(code)
    if (path in (PREDICT, EMBED) or path.endswith("/infer")) and code not in ("not_found", "method_not_allowed"):
        metrics.refused(code)


async def _reject_without_keys() -> None:
    message = "/admin/rollback is disabled; start the server with --keys FILE or --admin-keys FILE to enable it"
    raise RequestError(404, "not_found", message)


async def _start_challenge(service: Service, challenge: Challenge) -> None:
    try:
        await service.models.challenge(challenge)
    except BundleError as err:  # the champion still serves
        assert challenge.engine is not None
        service.models.rejected.add(challenge.engine.bundle.path)
        logger.warning("the challenger is not started: %s", err)


def _dependencies(keys: ApiKeys) -> list[Any]:
    # The first only documents the key in the OpenAPI document, for /docs and generated clients.
    return [Depends(HTTPBearer(auto_error=False)), Depends(keys.check)]


def _add_health(app: FastAPI, service: Service, allowed: list[Any]) -> None:
    @app.get(
        "/livez",
        summary="Liveness: the process responds, and the self-test has not failed twice in a row",
        responses=problems(503),
    )
    async def livez() -> JSONResponse:
        service.models.check_alive()
        return JSONResponse({"status": "alive"})

    @app.get(
        "/readyz",
        summary="Readiness: the model passes its self-test, and the server is not shutting down",
        responses=problems(503),
    )
    async def readyz() -> JSONResponse:
        service.check_accepting()
        return JSONResponse({"status": "ready", "model": service.models.engine.bundle.info.name})

    @app.get(
        "/v1/model",
        summary="The served model, its device, its challenger, and the live accuracy by feedback",
        dependencies=allowed,
        responses=problems(401),
    )
    async def model() -> JSONResponse:
        live = await asyncio.to_thread(_live, service.recent) if service.recent else None
        return JSONResponse(
            _description(service.models.engine, shows_similar=service.shows_similar)
            | {"challenger": _challenger(service.models.challenger), "live": live}
        )

    @app.get(
        "/v1/status",
        summary="Requests in flight and images that wait for a batch",
        dependencies=allowed,
        responses=problems(401),
    )
    async def status() -> JSONResponse:
        return JSONResponse(
            {"requests": service.admission.in_flight, "images_waiting": service.models.champion.waiting}
        )


def _add_admin(app: FastAPI, service: Service, guards: ApiKeys | None) -> None:
    allowed = _dependencies(guards.unrated()) if guards else [Depends(_reject_without_keys)]

    @app.post(
        "/admin/rollback",
        summary="Roll back to the model served before",
        dependencies=allowed,
        responses=problems(401, 409, 503),
        include_in_schema=guards is not None,
    )
    async def rollback() -> JSONResponse:
        service.models.check_ready()
        await service.models.roll_back()
        return JSONResponse(
            {"model": service.models.engine.bundle.info.name, "digest": service.models.engine.bundle.digest}
        )


def _challenger(challenger: Challenger | None) -> dict[str, Any] | None:
    if challenger is None:
        return None
    bundle, challenge = challenger.worker.engine.bundle, challenger.challenge
    model = {"name": bundle.info.name, "digest": bundle.digest}
    # `share` is the former name of `fraction`: deprecated, removed in the next minor version.
    return model | {"fraction": challenge.fraction, "share": challenge.fraction, "answers": challenge.answers}


def _live(recent: RecentPredictions) -> dict[str, Any]:
    """Describe the feedback: how many predictions it can judge, and the estimates for each model, the latest first."""
    return {"retained": recent.retained(), "models": [model.to_dict() for model in recent.live()]}


def _description(engine: Engine, *, shows_similar: bool) -> dict[str, Any]:
    info = engine.bundle.info.to_dict()
    public_fields = (
        "name",
        "task",
        "labels",
        "network",
        "preprocess",
        "temperature",
        "thresholds",
        "abstain_below",
        "metrics",
        "created",
        "versions",
    )
    counts = info["data"].get("counts", {})
    backend = {"name": "eager"} if engine.choice is None else asdict(engine.choice)
    serving = {
        "digest": engine.bundle.digest,
        "folder": engine.bundle.path.name,
        "reads": sorted(engine.reads),
        "device": ", ".join(engine.devices),
        "gpus": [gpu._asdict() for gpu in describe(engine.devices)],
        "backend": backend,
        "counts": counts,
        "training_images": len(engine.familiarity.training.paths) if shows_similar and engine.familiarity else 0,
    }
    return serving | {key: info[key] for key in public_fields} | {"hierarchy": info.get("hierarchy")}
