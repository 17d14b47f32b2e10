"""A prediction request before and after parsing, and its result."""

from typing import NamedTuple

import numpy as np

from refract.models.bundle.bundle import Bundle
from refract.models.multimodal.tokens import trimmed
from refract.models.prediction import Explanation
from refract.serve.http.errors import RequestError
from refract.serve.requests.decoding import ParsedRequest, RequestImages
from refract.serve.requests.protocols import InferBody, PredictBody
from refract.serve.runtime.engine import Engine


class Work(NamedTuple):
    """A request whose body was received and is not parsed yet. flipped: average the logits of each image and of its horizontal flip;
    explained: add heat maps of the likeliest labels; quick: parse and decode on the event loop, which is faster than on a thread; version:
    the only model version that may answer, None for any."""

    body: PredictBody | InferBody
    flipped: bool = False
    explained: bool = False
    quick: bool = False
    version: str | None = None


class ParsedWork(NamedTuple):
    """A parsed request, whose images are not decoded yet. seconds: duration of the parsing; due: the event loop's time by which its heat
    maps must be complete."""

    work: Work
    request: ParsedRequest
    seconds: float
    due: float


class Predictions(NamedTuple):
    """The result of one request. request: what was parsed; bundle: the model that answered; outputs: a record for each sample, see
    `refract.serve.runtime.outputs.unpacked`; seconds: durations of the stages `prepare` (wait for a thread, parse, decode, resize),
    `queue`, `compute` and `explain`; explanations: one for each image, empty if not requested; cut: whether each text was truncated, empty
    if the model reads no texts."""

    request: ParsedRequest
    bundle: Bundle
    outputs: np.ndarray
    seconds: dict[str, float]
    explanations: tuple[Explanation, ...] = ()
    cut: tuple[bool, ...] = ()

    @property
    def probabilities(self) -> np.ndarray:
        """The probabilities, float32 N×C."""
        return self.outputs["probabilities"]

    @property
    def timing(self) -> str:
        """The stages as the value of a `Server-Timing` header, in milliseconds."""
        return ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in self.seconds.items())


def check_read(engine: Engine, images: RequestImages) -> None:
    """Raise RequestError 422 if a sample has no input that the engine reads, or has one that it does not read."""
    if images.texts and engine.tokens is None:
        raise RequestError(422, "invalid_request", "this model reads no texts, only images")
    missing = [not has_image for has_image in images.has_image]
    if "images" not in engine.reads and not all(missing or [False]):
        raise RequestError(422, "invalid_request", "this model reads no images, only texts")
    texts = images.texts or [""] * len(missing)
    if any(no_image and not trimmed(text) for text, no_image in zip(texts, missing, strict=False)):
        raise RequestError(422, "invalid_request", "a sample has an empty text and no image; send one of them")


def check_version(bundle: Bundle, version: str | None) -> None:
    """Raise RequestError 404 if `version` is not the bundle's; None accepts any."""
    if version is not None and version != bundle.digest[:16]:
        message = f"model version {version[:40]!r} is not served; the served version is {bundle.digest[:16]!r}"
        raise RequestError(404, "unknown_model", message)
