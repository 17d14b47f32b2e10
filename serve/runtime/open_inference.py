"""What the Open Inference Protocol, version 2, offers over HTTP and over gRPC: https://github.com/kserve/open-inference-protocol.

The clients of KServe and Triton use it. A request has one of two inputs. `images`: RGB pixels of any size, UINT8 [N, height, width, 3].
`encoded`: the bytes of image files, BYTES [N], in JSON as base64. The outputs are `probabilities`, FP32 [N, labels], `label`, BYTES [N],
and, only if the request names it, `embedding`, FP32 [N, features].
"""

from typing import NamedTuple

import numpy as np

from refract.models.bundle.bundle import Bundle
from refract.serve.http.errors import RequestError
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Predictions, check_version

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


INPUTS = (TensorMetadata("images", "UINT8", [-1, -1, -1, 3]), TensorMetadata("encoded", "BYTES", [-1]))


def outputs_of(bundle: Bundle) -> tuple[TensorMetadata, ...]:
    """Return the outputs that a request to `bundle` may name."""
    return (
        TensorMetadata("probabilities", "FP32", [-1, len(bundle.info.labels)]),
        TensorMetadata("label", "BYTES", [-1]),
        TensorMetadata("embedding", "FP32", [-1, -1]),
    )


def check_model(served: Bundle, name: str, version: str | None) -> None:
    """Raise RequestError 404 unless `served` has this name, and this version, or `version` is None."""
    if name != served.info.name:
        message = f"model {name[:40]!r} is not served; this server serves {served.info.name!r}"
        raise RequestError(404, "unknown_model", message)
    check_version(served, version)


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
    rows = results.embeddings if name == "embedding" else results.probabilities
    return Tensor(name, "FP32", list(rows.shape), rows)
