"""A prediction request before and after parsing, and its result."""

import base64
from typing import Any, NamedTuple

import numpy as np

from refract.models.bundle.bundle import Bundle
from refract.models.familiarity import Familiarity
from refract.models.multimodal.tokens import trimmed
from refract.models.prediction import Explanation
from refract.serve.errors import RequestError
from refract.serve.requests.decoding import ParsedRequest, RequestImages
from refract.serve.requests.protocols import Body
from refract.serve.runtime.engine import Engine


class Work(NamedTuple):
    """A request whose body was received and is not parsed yet. flipped: average the logits of each image and of its horizontal flip;
    explained: add heat maps of the likeliest labels; quick: parse and decode on the event loop, which is faster than on a thread; version:
    the only model version that may answer, None for any or if the body names it; request_id: the request's X-Request-Id."""

    body: Body
    flipped: bool = False
    explained: bool = False
    quick: bool = False
    version: str | None = None
    request_id: str = ""


class ParsedWork(NamedTuple):
    """A parsed request, whose images are not decoded yet. seconds: duration of the parsing; due: the event loop's time by which its heat
    maps must be complete; content: the hash of its images and texts, None without a response cache."""

    work: Work
    request: ParsedRequest
    seconds: float
    due: float
    content: bytes | None = None


class Predictions(NamedTuple):
    """The result of one request.

    - request: what was parsed
    - bundle: the model that answered
    - outputs: a record for each sample, see `refract.serve.runtime.outputs.unpacked`
    - seconds: durations of the stages `prepare` (wait for a thread, parse, decode, resize), `queue`, `compute` and `explain`; `cache` in
      place of `queue` and `compute` if the outputs come from the response cache
    - familiarity: compares embeddings with the training images of the bundle, None without training features
    - explanations: one for each image, empty if not requested
    - cut: whether each text was truncated, empty if the model reads no texts
    """

    request: ParsedRequest
    bundle: Bundle
    outputs: np.ndarray
    seconds: dict[str, float]
    familiarity: Familiarity | None = None
    explanations: tuple[Explanation, ...] = ()
    cut: tuple[bool, ...] = ()

    @property
    def probabilities(self) -> np.ndarray:
        """The probabilities, float32 N×C."""
        return self.outputs["probabilities"]

    @property
    def embeddings(self) -> np.ndarray:
        """The embeddings, float32 N×D. RequestError 422 if the backend computes none, or one that is not finite."""
        if not self.outputs["embedding"].shape[1]:
            message = "the backend of this server computes no embeddings; start it with another --backend"
            raise RequestError(422, "no_embedding", message)
        if not np.isfinite(self.outputs["embedding"]).all():
            message = "an embedding exceeds the range of this server's backend; start it with --backend eager"
            raise RequestError(422, "no_embedding", message)
        return self.outputs["embedding"]

    def similar(self, count: int) -> list[list[dict[str, Any]]]:
        """For each sample the `count` most similar training images, as JSON objects. RequestError 422 if the bundle has none."""
        if self.familiarity is None:
            message = "the model has no training features, which `similar` needs; train it again, or omit `similar`"
            raise RequestError(422, "no_training_features", message)
        rows = zip(*self.familiarity.nearest(self.embeddings, count), strict=True)
        return [[self._training_image(*pair) for pair in zip(*row, strict=True)] for row in rows]

    def _training_image(self, index: int, cosine: float) -> dict[str, Any]:
        assert self.familiarity is not None
        training, labels = self.familiarity.training, self.bundle.info.labels
        thumbnail = training.thumbnails[index]
        return {
            "path": training.paths[index],
            "labels": [labels[label] for label in training.labels[index]],
            "similarity": float(cosine),
            "thumbnail": base64.b64encode(thumbnail).decode() if thumbnail else None,
        }

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
