"""The HTTP face of an engine. What happens behind its routes is the service's."""

import asyncio
import copy
import logging
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
from refract.serve.http import errors
from refract.serve.http.access_log import AccessLog
from refract.serve.http.auth import ApiKeys
from refract.serve.http.base_path import BasePath
from refract.serve.http.cors import Cors
from refract.serve.http.errors import RequestError
from refract.serve.http.methods import Methods
from refract.serve.http.metrics import Metrics
from refract.serve.http.openapi import problems
from refract.serve.http.routes.predict import PREDICT, Direct, add_predict
from refract.serve.http.routes.v2 import add_v2
from refract.serve.http.tracing import Traced, close
from refract.serve.http.ui import add_page
from refract.serve.requests.body import Bodies
from refract.serve.requests.limits import Limits
from refract.serve.rollout.canary import Challenge, Challenger
from refract.serve.rollout.data_capture import DataCapture
from refract.serve.rollout.registry_watcher import Build, registry_watchers
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.gpus import describe
from refract.serve.runtime.service import Service

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)


def create_app(
    served: Bundle | Engine,
    *,
    limits: Limits | None = None,
    max_batch: int = 32,
    max_wait_ms: float = 2.0,
    max_queue: int = 1024,
    max_requests: int = 256,
    deadline_s: float = 10.0,
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
) -> FastAPI:
    """The application that answers with `served`; a bundle is served on the CPU. keys: who may ask, without them everybody; admin:
    who may roll back, in place of `keys`, and without either nobody. traces: where spans go, closed at the end. follow: the name in the
    registry that the bundle is from, asked for its meaning every `poll_s` seconds, and `build` makes an engine of what it means then.
    challenge: a second model beside it. sampling: keeps a sample of what is asked. cors_origins: whose pages may
    read answers, `*` for all. root_path: the path of a reverse proxy below which the server is.

    Its lifespan runs the self-test: if that fails the server does not start, and `app.state.failure` says why. Routes may be added to it,
    middleware and handlers of errors not.
    ValueError or BundleError for a parameter or bundle that cannot work.
    """
    engine = served if isinstance(served, Engine) else Engine(served)
    options: dict[str, Any] = {"max_batch": max_batch, "max_wait_ms": max_wait_ms, "max_queue": max_queue}
    options |= {"max_requests": max_requests, "deadline_s": deadline_s}
    metrics = Metrics()
    if sampling:
        sampling.count = metrics.sampled
    service = Service(engine, limits=limits or Limits(), metrics=metrics, sampling=sampling, **options)
    metrics.watch("requests_inside", "Requests in the house", lambda: service.in_flight)
    metrics.watch("images_waiting", "Images that wait for a batch", lambda: service.waiting)
    for gpu in describe(engine.devices):
        metrics.watch_gpu(gpu.device, gpu.name, gpu.driver, partial(describe, [gpu.device]))

    following = registry_watchers(service, follow, challenge, build=build, every_s=poll_s)
    begun = [challenge] if challenge and challenge.engine else []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await service.start()
        except Exception as err:
            app.state.failure = err
            raise
        while begun:  # and is not kept here, where it will be exchanged
            await _challenged(service, begun.pop())
        tasks = [asyncio.create_task(follower.run()) for follower in following]
        yield
        for task in tasks:
            task.cancel()
        await service.stop()
        if traces:
            await close(traces)

    app = FastAPIOffline(
        title="Refract",
        summary=f"Image classification by {engine.bundle.info.name}",
        lifespan=lifespan,
        redirect_slashes=False,  # to where a server behind a balancer does not know how to name itself
        telemetry={"tracing": False, "metrics": False, "logs": False},  # for ours see `refract.serve.http.tracing`
    )
    app.state.failure, app.state.service = None, service
    refused = errors.install(app, partial(_count, metrics))
    rated = _dependencies(keys) if keys else []
    allowed = _dependencies(_unrated(keys)) if keys else []
    bodies = Bodies(service.limits)
    predict = add_predict(app, service, bodies, keys, rated)
    _add_health(app, service, allowed)
    add_v2(app, service, bodies, allowed, rated)
    guards = admin or keys
    _add_admin(app, service, guards)
    add_page(app)
    # Around all that Starlette and FastAPI have around a route, too.
    routes = Direct(Methods(app.build_middleware_stack(), lambda: app.routes), PREDICT, predict, refused)
    shared: ASGIApp = Cors(routes, cors_origins) if cors_origins else routes
    rooted = BasePath(shared, root_path) if root_path else shared
    watched: ASGIApp = AccessLog(rooted, log=access_log)
    busy = {PREDICT, root_path + PREDICT}
    app.middleware_stack = Traced(watched, provider=traces, busy=busy) if traces else watched
    return app


def _count(metrics: Metrics, path: str, code: str) -> None:
    """Of refusals, those of what asked for predictions."""
    if (path == PREDICT or path.endswith("/infer")) and code not in ("not_found", "method_not_allowed"):
        metrics.refused(code)


async def _nobody() -> None:
    raise RequestError(404, "not_found", "/admin/rollback is there with --keys or --admin-keys alone")


async def _challenged(service: Service, challenge: Challenge) -> None:
    try:
        await service.challenge(challenge)
    except BundleError as err:  # the champion answers all the same
        assert challenge.engine is not None
        service.rejected.add(challenge.engine.bundle.path)
        logger.warning("nothing challenges: %s", err)


def _unrated(keys: ApiKeys) -> ApiKeys:
    """The same keys, for what is no prediction: the page asks for the state every few seconds, which must not use up their rate."""
    unrated = copy.copy(keys)
    unrated._rate = None
    return unrated


def _dependencies(keys: ApiKeys) -> list[Any]:
    # The first is for the description, so that /docs and generated clients know of the key.
    return [Depends(HTTPBearer(auto_error=False)), Depends(keys.check)]


def _add_health(app: FastAPI, service: Service, allowed: list[Any]) -> None:
    @app.get("/livez", summary="The process answers, and its model is not lost", responses=problems(503))
    async def livez() -> JSONResponse:
        service.check_alive()
        return JSONResponse({"status": "alive"})

    @app.get("/readyz", summary="The golden images gave their stored answers again", responses=problems(503))
    async def readyz() -> JSONResponse:
        service.check_accepting()
        return JSONResponse({"status": "ready", "model": service.engine.bundle.info.name})

    @app.get("/v1/model", summary="What is served", dependencies=allowed, responses=problems(401))
    async def model() -> JSONResponse:
        return JSONResponse(_description(service.engine) | {"challenger": _challenger(service.challenger)})

    @app.get("/v1/status", summary="What is in the house", dependencies=allowed, responses=problems(401))
    async def status() -> JSONResponse:
        return JSONResponse({"requests": service.in_flight, "images_waiting": service.waiting})


def _add_admin(app: FastAPI, service: Service, guards: ApiKeys | None) -> None:
    allowed = _dependencies(_unrated(guards)) if guards else [Depends(_nobody)]

    @app.post(
        "/admin/rollback",
        summary="Answer with the model before",
        dependencies=allowed,
        responses=problems(401, 409, 503),
        include_in_schema=guards is not None,
    )
    async def rollback() -> JSONResponse:
        service.check_ready()
        await service.roll_back()
        return JSONResponse({"model": service.engine.bundle.info.name, "digest": service.engine.bundle.digest})


def _challenger(challenger: Challenger | None) -> dict[str, Any] | None:
    if challenger is None:
        return None
    bundle, challenge = challenger.worker.engine.bundle, challenger.challenge
    own = {"name": bundle.info.name, "digest": bundle.digest}
    return own | {"share": challenge.share, "answers": challenge.answers}


def _description(engine: Engine) -> dict[str, Any]:
    info = engine.bundle.info.to_dict()
    shown = (
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
    chosen = {"name": "eager"} if engine.choice is None else asdict(engine.choice)
    own = {
        "digest": engine.bundle.digest,
        "folder": engine.bundle.path.name,
        "reads": sorted(engine.reads),
        "device": ", ".join(engine.devices),
        "gpus": [gpu._asdict() for gpu in describe(engine.devices)],
        "backend": chosen,
        "counts": counts,
    }
    return own | {key: info[key] for key in shown}
