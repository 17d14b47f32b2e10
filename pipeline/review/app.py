"""The ASGI application of a label review: the web page and its JSON API."""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from refract.api_keys import KeyFile
from refract.augment.decoding.errors import ImageError
from refract.cores import cores
from refract.page_style import digest
from refract.pipeline.labels.decisions import Action, LabelError
from refract.pipeline.review import bodies, views
from refract.pipeline.review.access import Access, check_keys
from refract.pipeline.review.items import Item
from refract.pipeline.review.problems import HANDLERS, RequestError
from refract.pipeline.review.session import ReviewSession

PAGE = Path(__file__).with_name("page.html")

Value = TypeVar("Value")

SIZES = (256, 1024)
"""Longest sides of the images that the page asks for, in pixels."""

MOST_ENTRIES = 100
"""Most entries of a queue in one response."""

REMEMBERED = 10_000
"""Number of the latest requests that are recognised when the page sends them again."""


def create_app(
    session: ReviewSession, *, host: str = "127.0.0.1", keys: KeyFile | None = None, reviewer: str = "reviewer"
) -> Starlette:
    """Return the application of a review.

    host: where the server listens; keys: API keys, whose names are the reviewers, needed unless `host` is loopback; reviewer: the name of
    a reviewer who gives none. InputError for another host without keys.
    """
    check_keys(host, keys)
    return Starlette(
        routes=[Route("/", _page(PAGE.read_text("utf-8"))), *_Api(session, reviewer).routes()],
        exception_handlers=dict(HANDLERS),
        middleware=[Middleware(Access, host=host, keys=keys)],
    )


class _Api:
    """The endpoints below `/api/`."""

    def __init__(self, session: ReviewSession, reviewer: str) -> None:
        self._session, self._default = session, reviewer
        self._queues = {queue.name: queue for queue in session.queues}
        self._requests = _Requests()
        self._drawing, self._explaining = asyncio.Semaphore(cores()), asyncio.Lock()

    def routes(self) -> list[Route]:
        return [
            Route("/api/session", self.session),
            Route("/api/queues/{name}", self.queue),
            Route("/api/items/{index}", self.item),
            Route("/api/items/{index}/image", self.image),
            Route("/api/items/{index}/heat-map", self.heat_map),
            Route("/api/decisions", self.decide, methods=["POST"]),
            Route("/api/undo", self.undo, methods=["POST"]),
            Route("/api/decided", self.decided),
        ]

    async def session(self, request: Request) -> Response:
        fixed = request.state.reviewer is not None
        reviewer = self._reviewer(request)

        def view() -> dict[str, Any]:
            self._session.refresh()
            return views.session_view(self._session, reviewer, fixed=fixed)

        return await _json(view)

    async def queue(self, request: Request) -> Response:
        name, reviewer = request.path_params["name"], self._reviewer(request)
        if name not in self._queues:
            accepted = ", ".join(self._queues)
            raise RequestError(404, "unknown_queue", f"there is no queue {name[:100]!r}; the queues are {accepted}")
        start = _number(request, "start", 0, range(2**31))
        count = _number(request, "count", 20, range(1, MOST_ENTRIES + 1))

        def view() -> dict[str, Any]:
            self._session.refresh()
            entries = self._session.open_entries(name, reviewer, start=start, count=count)
            return {
                "open": self._session.open_count(name, reviewer),
                "items": [views.entry_view(self._session, entry, name) for entry in entries],
            }

        return await _json(view)

    async def item(self, request: Request) -> Response:
        item = self._item(request)

        def view() -> dict[str, Any]:
            neighbours = [
                views.brief_view(self._session.items[index]) | {"similarity": similarity}
                for index, similarity in self._session.neighbours(item.index)
            ]
            return views.item_view(self._session, item) | {"neighbours": neighbours}

        return await _json(view)

    async def image(self, request: Request) -> Response:
        item, longest = self._item(request), _number(request, "longest", max(SIZES), SIZES)
        # The browser asks each time: after a restart of the review the same URL may be another image.
        tag = f'"{item.content}-{longest}"'
        headers = {"Cache-Control": "private, no-cache", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        async with self._drawing:  # which bounds the memory of large images, too
            if await request.is_disconnected():
                raise _disconnected()
            data = await _of_file(item, partial(self._session.image, item.index, longest))
        return Response(data, headers=headers, media_type="image/jpeg")

    async def heat_map(self, request: Request) -> Response:
        item = self._item(request)
        async with self._explaining:  # each takes many forward passes, and the reviewer may be at another image by then
            if await request.is_disconnected():
                raise _disconnected()
            heat_map = await _of_file(item, partial(self._session.heat_map, item.index))
        if heat_map is None:
            return Response(status_code=204)
        data, method = heat_map
        return Response(data, headers={"Cache-Control": "no-store", "X-Method": method}, media_type="image/png")

    async def decide(self, request: Request) -> Response:
        body = await bodies.decision(request, queues=self._queues)
        item, reviewer = self._by_index(body.item), self._reviewer(request, body.reviewer)
        if body.content and body.content != item.content:
            message = "the image has another number since the review was restarted; reload the page, then decide again"
            raise RequestError(409, "restarted", message)

        def decide() -> dict[str, Any]:
            try:
                record = self._session.decide(
                    item.index,
                    action=cast("Action", body.action),
                    labels=body.labels,
                    reviewer=reviewer,
                    reason=body.reason,
                    queue=body.queue,
                    seen=body.seen,
                )
            except OSError as err:  # of the copy of a captured image
                message = f"{item.path}: the image cannot be copied: {err}"
                raise RequestError(409, "unreadable_image", message) from err
            return {"record": record, "conflicts": views.state_view(self._session.state(item.index))["conflicts"]}

        return await self._requests.once(request, reviewer, partial(_json, decide, "invalid_decision", 422))

    async def undo(self, request: Request) -> Response:
        body = await bodies.undo(request)
        reviewer = self._reviewer(request, body.reviewer)

        def undo() -> dict[str, Any]:
            self._session.undo(body.record, reviewer=reviewer)
            return {"record": body.record}

        return await self._requests.once(request, reviewer, partial(_json, undo, "not_undone", 409))

    async def decided(self, request: Request) -> Response:
        reviewer = self._reviewer(request)
        return await _json(lambda: {"decisions": [views.decided_view(one) for one in self._session.decided(reviewer)]})

    def _reviewer(self, request: Request, sent: str = "") -> str:
        """Return the name of the request's reviewer: of the key if there is one, else of the body or the query."""
        fixed: str | None = request.state.reviewer
        return fixed or (sent or request.query_params.get("reviewer", "")).strip() or self._default

    def _item(self, request: Request) -> Item:
        text = request.path_params["index"]
        return self._by_index(int(text) if re.fullmatch("[0-9]{1,12}", text) else -1)

    def _by_index(self, index: int) -> Item:
        if not 0 <= index < len(self._session.items):
            message = f"there is no such item; the review has the items 0 to {len(self._session.items) - 1}"
            raise RequestError(404, "unknown_item", message)
        return self._session.items[index]


class _Requests:
    """Responses to the latest requests that change something, by their `Idempotency-Key`: a request that the page sends again, as it saw
    no response, is carried out once."""

    def __init__(self) -> None:
        self._responses: OrderedDict[tuple[str, str, str], asyncio.Task[Response]] = OrderedDict()

    async def once(
        self, request: Request, reviewer: str, respond: Callable[[], Coroutine[Any, Any, Response]]
    ) -> Response:
        """Return the response to an earlier request with the same path, reviewer and key, else that of `respond`, unless it raises."""
        token = request.headers.get("idempotency-key", "")
        if not token:
            return await respond()
        name = (request.url.path, reviewer, token[:100])
        task = self._responses.get(name)
        if task is None or (task.done() and task.exception() is not None):
            task = self._responses[name] = asyncio.create_task(respond())
            while len(self._responses) > REMEMBERED:
                self._responses.popitem(last=False)
        return await asyncio.shield(task)


async def _json(work: Callable[[], Any], code: str = "", status: int = 422) -> Response:
    """Run `work` in a thread and return its JSON. RequestError with `code` and `status` for a LabelError."""
    try:
        return JSONResponse(await run_in_threadpool(work), headers={"Cache-Control": "no-store"})
    except LabelError as err:
        raise RequestError(status, code or "invalid_label", str(err)) from err


async def _of_file(item: Item, work: Callable[[], Value]) -> Value:
    """Run `work`, which reads the item's file, in a thread. RequestError 404 if the file is not a readable image."""
    try:
        return await run_in_threadpool(work)
    except (OSError, ImageError) as err:
        raise RequestError(404, "unreadable_image", f"{item.path}: the image cannot be read: {err}") from err


def _disconnected() -> RequestError:
    return RequestError(400, "client_disconnected", "the client disconnected while its request waited")


def _number(request: Request, name: str, default: int, accepted: Sequence[int]) -> int:
    """Return an integer of the query. RequestError 422 for another text or a number that is not accepted."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) not in accepted:
        choices = f"{accepted[0]} to {accepted[-1]}" if isinstance(accepted, range) else " or ".join(map(str, accepted))
        raise RequestError(422, "invalid_parameter", f"{name}: is {text[:100]!r}; expected {choices}")
    return int(text)


def _page(html: str) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of the page, which may run its own script and style only and load nothing from other hosts."""
    script, style = (digest(html, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    return page
