"""What a request asks for, and what it is answered."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refract.models.bundle.bundle import Bundle
from refract.models.multimodal.tokens import trimmed
from refract.models.prediction import Explanation
from refract.serve.http.errors import RequestError
from refract.serve.requests.decoding import RequestImages
from refract.serve.runtime.engine import Engine


class Work(NamedTuple):
    """What a request asks for. read: finds its images, or raises RequestError; mirrored: the mean answer to each and its mirror image, of
    their logits; explained: with heat maps of the likeliest labels; quick: they are better read and decoded at once than on worker threads;
    version: of the model that is to answer, and no other."""

    read: Callable[[], RequestImages]
    mirrored: bool = False
    explained: bool = False
    quick: bool = False
    version: str | None = None


class ReadWork(NamedTuple):
    """A request whose images were read, in so many seconds. due: the event loop's time by which its heat maps must be there."""

    work: Work
    images: RequestImages
    seconds: float
    due: float = float("inf")


class Predictions(NamedTuple):
    """bundle: that answered; probabilities: float32 N×C; seconds: of the stages `prepare` (threads to be free, reading, decoding,
    resizing), `queue`, `compute` and `explain`; explanations: where they were asked for, of each image;
    cut: where texts are read, whether each was too long to be read whole."""

    bundle: Bundle
    probabilities: np.ndarray
    seconds: dict[str, float]
    explanations: tuple[Explanation, ...] = ()
    cut: tuple[bool, ...] = ()

    @property
    def timing(self) -> str:
        """The stages as a `Server-Timing` header."""
        return ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in self.seconds.items())


def check_read(engine: Engine, images: RequestImages) -> None:
    """RequestError 422 where nothing was sent that the engine reads, or what it does not read."""
    if images.texts and engine.tokens is None:
        raise RequestError(422, "invalid_request", "this model reads no texts, only images")
    missing = [not there for there in images.has_image]
    if "images" not in engine.reads and not all(missing or [False]):
        raise RequestError(422, "invalid_request", "this model reads no images, only texts")
    texts = images.texts or [""] * len(missing)
    if any(gone and not trimmed(text) for text, gone in zip(texts, missing, strict=False)):
        raise RequestError(422, "invalid_request", "a text is empty, and there is no image")


def check_version(bundle: Bundle, version: str | None) -> None:
    """RequestError 404 where `version` is not that of the bundle; None is any."""
    if version not in (None, bundle.digest[:16]):
        raise RequestError(404, "unknown_model", f"this version is not served; that is {bundle.digest[:16]!r}")
