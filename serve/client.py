"""HTTP clients of the server: `Client` blocks, `AsyncClient` is awaited. Both retry when the server is busy. Independent of the server's
code."""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

Images = Sequence[bytes | str | Path]
Outcome = httpx.Response | httpx.TransportError

logger = logging.getLogger(__name__)

TRIES = 5
MAX_WAIT_S = 30.0
LOGGED_WAIT_S = 1.0
"""A wait of at least this many seconds is logged as a warning."""


class ServerError(RuntimeError):
    """The server rejected the request, or is unreachable. status: the HTTP status, 0 if unreachable; code: the problem's `code`, such as
    `invalid_image`; `unreachable` without a response, `unknown` for a response that is not a problem."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code = status, code


class _BaseClient:
    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 30.0, tries: int = TRIES) -> None:
        """url: such as http://localhost:8000; key: an API key, if the server requires one; timeout_s: limit of one try, in seconds;
        tries: most tries of a request, at least 1. Raises ValueError for an invalid url, key or number of tries."""
        if tries < 1:
            raise ValueError(f"tries={tries}: expected at least 1")
        if not str(url).lower().startswith(("http://", "https://")):
            raise ValueError(
                f"url={str(url)!r}: a URL must start with http:// or https://, as http://localhost:8000 does"
            )
        if key is not None and not key.isascii():
            raise ValueError("key: an API key must have ASCII characters only")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": timeout_s}
        self._tries = tries
        self._http: Any = _Unopened()

    def _retry_delay(self, attempt: int, outcome: Outcome) -> float | None:
        """Return the seconds to wait before the next try; None if the outcome is final. attempt: from 0."""
        if attempt + 1 >= self._tries:
            return None
        backoff = min(MAX_WAIT_S, 0.2 * 2**attempt) * random.uniform(0.5, 1.0)
        if isinstance(outcome, httpx.TransportError):
            # The connection failed, or was closed before a response. A prediction is safe to repeat.
            return None if isinstance(outcome, httpx.TimeoutException) else backoff
        if outcome.status_code not in (429, 503):
            return None
        retry_after = outcome.headers.get("retry-after", "")
        wait = min(MAX_WAIT_S, float(retry_after)) + backoff if retry_after.isdecimal() else backoff
        if wait >= LOGGED_WAIT_S:
            logger.warning("the server is busy (%d); next try in %.0f s", outcome.status_code, wait)
        return wait


class _Unopened:
    def __getattr__(self, name: str) -> Any:
        message = (
            "the client is not open; use `with Client(url) as client:` or `async with AsyncClient(url) as client:`"
        )
        raise RuntimeError(message)


def _request(path: str, images: Images, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of httpx's `post`. Reads the image files."""
    params = dict(options)
    texts = params.pop("texts", None)
    if isinstance(images, str | bytes | Path) or isinstance(texts, str):
        raise TypeError("images, texts: expected lists, not a single image or text")
    data = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in images]
    if not data and not texts:
        raise ValueError("no images and no texts; pass at least one")
    files: list[tuple[str, Any]] = [("file", (f"{i}", content)) for i, content in enumerate(data)]
    files += [("text", (None, text)) for text in texts or ()]
    return {
        "url": path,
        "files": files,
        "params": {key: value for key, value in params.items() if value is not None},
    }


def _feedback(request_id: str, labels: Sequence[str], index: int | None) -> dict[str, Any]:
    """Return the arguments of httpx's `post` for feedback."""
    if isinstance(labels, str):
        raise TypeError("labels: expected a list, not a single label")
    content = {"id": request_id, "labels": list(labels)}
    return {"url": "/v1/feedback", "json": content if index is None else {**content, "index": index}}


def _predictions(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the predictions of a response, each with the request's id."""
    predictions: list[dict[str, Any]] = _content(outcome)["predictions"]
    assert isinstance(outcome, httpx.Response)
    request_id = outcome.headers.get("x-request-id")
    return [{**row, "id": request_id} for row in predictions] if request_id else predictions


def _content(outcome: Outcome) -> dict[str, Any]:
    """Return the content of a response. Raises ServerError for every other outcome."""
    if isinstance(outcome, httpx.TransportError):
        url = outcome.request.url.copy_with(raw_path=b"/")
        remedy = "start it with `refract serve`, or correct the URL"
        message = f"the server at {url} does not respond ({type(outcome).__name__}: {outcome}); {remedy}"
        raise ServerError(0, "unreachable", message) from outcome
    if outcome.status_code != 200:
        try:
            problem = outcome.json()
            code, detail = str(problem["code"]), str(problem["detail"])
        except (ValueError, KeyError, TypeError):  # the response of a proxy
            code, detail = "unknown", f"HTTP {outcome.status_code}"
        raise ServerError(outcome.status_code, code, detail)
    content: dict[str, Any] = outcome.json()
    return content


class Client(_BaseClient):
    """A blocking client: `with Client("http://localhost:8000") as client: client.predict(["a.jpg"])`."""

    def __enter__(self) -> Self:
        self._http = httpx.Client(**self._options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def predict(self, images: Images, **options: Any) -> list[dict[str, Any]]:
        """Return one prediction per image, in order: a dict with `label`, `confidence`, `top`, the fields of the options, and `id`, the
        request's id for `feedback`.

        images: bytes or paths of image files. options:
        - top, threshold, tta: as the query parameters of `/v1/predict`;
        - explain: adds `explanation`, a PNG in base64, and `explanation_method`, or `explanation_problem` with `code` and `detail`;
        - embed: adds `embedding`, a list of numbers; similar: adds so many `similar` training images;
        - texts: one per image, or texts only with no images, for a model that reads texts.

        If the server is busy or unreachable, the client waits as `Retry-After` says and tries again: `tries` tries in all. A timeout is not
        retried. Raises ServerError, and OSError for an unreadable file.
        """
        return _predictions(self._send(_request("/v1/predict", images, options)))

    def feedback(self, id: str, labels: Sequence[str], *, index: int | None = None) -> dict[str, Any]:
        """Send the true labels of a prediction. Returns a dict with `predicted`, `correct`, `replaced` and `model`.

        id: the prediction's `id`; labels: one for a single-label model; index: the index of the image in its request, needed if it had
        several. Feedback is safe to repeat: a second one replaces the first. retries and errors: as in `predict`.
        """
        return _content(self._send(_feedback(id, labels, index)))

    def embed(self, images: Images, **options: Any) -> list[list[float]]:
        """Return one embedding per image, in order. images, retries and errors: as in `predict`. options: tta and texts."""
        embeddings: list[list[float]] = _content(self._send(_request("/v1/embed", images, options)))["embeddings"]
        return embeddings

    def _send(self, request: dict[str, Any]) -> Outcome:
        for attempt in range(self._tries):
            outcome = self._post(request)
            if (delay := self._retry_delay(attempt, outcome)) is None:
                break
            time.sleep(delay)
        return outcome

    def _post(self, request: dict[str, Any]) -> Outcome:
        try:
            response: httpx.Response = self._http.post(**request)
            return response
        except httpx.TransportError as error:
            return error


class AsyncClient(_BaseClient):
    """An asynchronous client: `async with AsyncClient("http://localhost:8000") as client: await client.predict(["a.jpg"])`."""

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(**self._options)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def predict(self, images: Images, **options: Any) -> list[dict[str, Any]]:
        """Return one prediction per image, like `Client.predict`."""
        return _predictions(await self._send(await asyncio.to_thread(_request, "/v1/predict", images, options)))

    async def feedback(self, id: str, labels: Sequence[str], *, index: int | None = None) -> dict[str, Any]:
        """Send the true labels of a prediction, like `Client.feedback`."""
        return _content(await self._send(_feedback(id, labels, index)))

    async def embed(self, images: Images, **options: Any) -> list[list[float]]:
        """Return one embedding per image, like `Client.embed`."""
        request = await asyncio.to_thread(_request, "/v1/embed", images, options)
        embeddings: list[list[float]] = _content(await self._send(request))["embeddings"]
        return embeddings

    async def _send(self, request: dict[str, Any]) -> Outcome:
        for attempt in range(self._tries):
            outcome = await self._post(request)
            if (delay := self._retry_delay(attempt, outcome)) is None:
                break
            await asyncio.sleep(delay)
        return outcome

    async def _post(self, request: dict[str, Any]) -> Outcome:
        try:
            response: httpx.Response = await self._http.post(**request)
            return response
        except httpx.TransportError as error:
            return error
