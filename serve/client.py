"""A client of the server: `Client` waits, `AsyncClient` is awaited; both try again when they are told to. Imports nothing of the server."""

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
Answer = httpx.Response | httpx.TransportError

logger = logging.getLogger(__name__)

TRIES = 5
LONGEST_WAIT_S = 30.0
TOLD_WAIT_S = 1.0
"""A wait of so long is told, as a warning."""


class ServerError(RuntimeError):
    """The server refused, or did not answer. status: of HTTP, 0 for none; code: the server's word for it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code = status, code


class _Common:
    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 30.0, tries: int = TRIES) -> None:
        """url: as http://localhost:8000; key: where the server asks for one; tries: for one question, the first among them. ValueError for
        what is no url, or no try."""
        if tries < 1:
            raise ValueError(f"tries={tries}: expected at least 1")
        if not str(url).lower().startswith(("http://", "https://")):
            raise ValueError(f"url={str(url)!r}: expected http:// or https:// before it, as in http://localhost:8000")
        if key is not None and not key.isascii():
            raise ValueError("key: a key has letters, digits and signs of ASCII alone")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": timeout_s}
        self._tries = tries
        self._http: Any = _Unopened()

    def _waits(self, attempt: int, answer: Answer) -> float | None:
        """Seconds after which to ask once more; None where that is of no use."""
        if attempt + 1 >= self._tries:
            return None
        backoff = min(LONGEST_WAIT_S, 0.2 * 2**attempt) * random.uniform(0.5, 1.0)
        if isinstance(answer, httpx.TransportError):
            # A connection that was not made, or that was closed before an answer: to classify twice does no harm.
            return None if isinstance(answer, httpx.TimeoutException) else backoff
        if answer.status_code not in (429, 503):
            return None
        told = answer.headers.get("retry-after", "")
        wait = min(LONGEST_WAIT_S, float(told)) + backoff if told.isdecimal() else backoff
        if wait >= TOLD_WAIT_S:
            logger.warning("the server is busy (%d): asked again in %.0f s", answer.status_code, wait)
        return wait


class _Unopened:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("use it as `with Client(url) as client:`, or `async with AsyncClient(url) as client:`")


def _question(images: Images, options: dict[str, Any]) -> dict[str, Any]:
    own = dict(options)
    texts = own.pop("texts", None)
    if isinstance(images, str | bytes | Path) or isinstance(texts, str):
        raise TypeError("images, texts: expected lists, not a single one")
    data = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in images]
    if not data and not texts:
        raise ValueError("no images")
    files: list[tuple[str, Any]] = [("file", (f"{i}", content)) for i, content in enumerate(data)]
    files += [("text", (None, text)) for text in texts or ()]
    return {
        "url": "/v1/predict",
        "files": files,
        "params": {key: value for key, value in own.items() if value is not None},
    }


def _read(answer: Answer) -> list[dict[str, Any]]:
    if isinstance(answer, httpx.TransportError):
        told = f"the server does not answer ({type(answer).__name__}: {answer})"
        raise ServerError(0, "unreachable", told) from answer
    if answer.status_code != 200:
        try:
            problem = answer.json()
            code, detail = str(problem["code"]), str(problem["detail"])
        except (ValueError, KeyError, TypeError):  # something between us and the server
            code, detail = "unknown", f"HTTP {answer.status_code}"
        raise ServerError(answer.status_code, code, detail)
    predictions: list[dict[str, Any]] = answer.json()["predictions"]
    return predictions


class Client(_Common):
    """`with Client("http://localhost:8000") as client: client.predict(["a.jpg"])`"""

    def __enter__(self) -> Self:
        self._http = httpx.Client(**self._options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def predict(self, images: Images, **options: Any) -> list[dict[str, Any]]:
        """An answer for each image, bytes or a file: label, confidence, top, and what else the server says. options: top, threshold, tta,
        explain (adds `explanation`, a PNG in base64, and `explanation_method`; where there is no map, `explanation_problem` with code and
        detail); texts: as many, or alone with no images, for a model that reads them. Waits and asks again, `tries` times, where the server
        is busy or not there, as long as it says in Retry-After. ServerError; OSError for a file."""
        question = _question(images, options)
        for attempt in range(self._tries):
            answer = self._ask(question)
            if (wait := self._waits(attempt, answer)) is None:
                break
            time.sleep(wait)
        return _read(answer)

    def _ask(self, question: dict[str, Any]) -> Answer:
        try:
            found: httpx.Response = self._http.post(**question)
            return found
        except httpx.TransportError as error:
            return error


class AsyncClient(_Common):
    """`async with AsyncClient("http://localhost:8000") as client: await client.predict(["a.jpg"])`"""

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(**self._options)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def predict(self, images: Images, **options: Any) -> list[dict[str, Any]]:
        """As `Client.predict`."""
        question = await asyncio.to_thread(_question, images, options)
        for attempt in range(self._tries):
            answer = await self._ask(question)
            if (wait := self._waits(attempt, answer)) is None:
                break
            await asyncio.sleep(wait)
        return _read(answer)

    async def _ask(self, question: dict[str, Any]) -> Answer:
        try:
            found: httpx.Response = await self._http.post(**question)
            return found
        except httpx.TransportError as error:
            return error
