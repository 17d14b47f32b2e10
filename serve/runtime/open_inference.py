"""What the Open Inference Protocol, version 2, offers over HTTP and over gRPC: https://github.com/kserve/open-inference-protocol.

The clients of KServe and Triton use it. A request has images in one of two forms. `images`: RGB pixels of any size, UINT8
[N, height, width, 3]. `encoded`: the bytes of image files, BYTES [N], in JSON as base64. For a model that reads texts it may have `texts`,
BYTES [N], with or without images. The outputs are `probabilities`, FP32 [N, labels], `label`, BYTES [N], and, only if the request names
them, `embedding`, FP32 [N, features], and `familiarity`, FP32 [N].
"""

from typing import NamedTuple

import numpy as np

from refract.serve.errors import RequestError
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Predictions

PLATFORM = "refract"


class TensorMetadata(NamedTuple):
    """Name, datatype and shape of an input or output; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class Tensor(NamedTuple):
    """An output. values: float32 of `shape` for FP32, a list of texts for BYTES."""

    name: str
    datatype: str
    shape: list[int]
    values: np.ndarray | list[str]


IMAGES = (TensorMetadata("images", "UINT8", [-1, -1, -1, 3]), TensorMetadata("encoded", "BYTES", [-1]))
TEXTS = (TensorMetadata("texts", "BYTES", [-1]),)
FAMILIARITY = (TensorMetadata("familiarity", "FP32", [-1]),)


def inputs_of(engine: Engine) -> tuple[TensorMetadata, ...]:
    """Return the inputs that the engine reads. A request has one of IMAGES, TEXTS, or both."""
    return (IMAGES if "images" in engine.reads else ()) + (TEXTS if "texts" in engine.reads else ())


def outputs_of(engine: Engine) -> tuple[TensorMetadata, ...]:
    """Return the outputs that a request may name."""
    always = (
        TensorMetadata("probabilities", "FP32", [-1, len(engine.bundle.info.labels)]),
        TensorMetadata("label", "BYTES", [-1]),
        TensorMetadata("embedding", "FP32", [-1, -1]),
    )
    return always + (FAMILIARITY if engine.familiarity else ())


def tensors_of(results: Predictions) -> list[Tensor]:
    """Return the outputs that the request names. RequestError 422 if the backend does not compute one."""
    return [_tensor(name, results) for name in results.request.outputs]


def record(service: Service, request_id: str, results: Predictions, seconds: float) -> None:
    """Count an answered request in the metrics, and keep its predictions for feedback. seconds: since the request began."""
    rows = results.probabilities
    if service.recent:
        service.recent.record(request_id, results.bundle, rows)
    service.metrics.predicted(rows, results.bundle.info.labels, 0)
    service.metrics.answered(seconds, results.seconds)


def _tensor(name: str, results: Predictions) -> Tensor:
    if name == "label":
        labels = [results.bundle.info.labels[i] for i in results.probabilities.argmax(axis=1)]
        return Tensor(name, "BYTES", [len(labels)], labels)
    if name == "familiarity":
        if results.familiarity is None:
            message = (
                "the model has no training features, which `familiarity` needs; train it again, or omit the output"
            )
            raise RequestError(422, "no_training_features", message)
        rows = results.outputs["familiarity"]
    else:
        rows = results.embeddings if name == "embedding" else results.probabilities
    return Tensor(name, "FP32", list(rows.shape), rows)
