"""Backends of ONNX Runtime on CPUs, in float32 and in 8-bit integers."""

from pathlib import Path

import torch
from torch import Tensor

from refract.models.conversion.onnx import open_session, to_onnx
from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import INT8_AGREED, Backend, Forward
from refract.serve.runtime.backends.quantised import FILE as QUANTISED
from refract.serve.runtime.backends.quantised import quantised
from refract.serve.runtime.backends.storage import store


def _build(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    """Export the network to ONNX, or read it from `folder`, where an earlier start stored it. An export takes ten seconds.

    A call has less overhead than one of OpenVINO, which matters for small networks (lenet5: 270 against 360 µs of server time a request).
    """
    file = folder / "kept.onnx"
    if file.is_file():
        return _forward(file.read_bytes())
    data = to_onnx(network, images)
    store(folder, "onnx", lambda part: part.write_bytes(data))
    return _forward(data)


def _build_int8(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    return _forward(quantised(network, images, folder))


def _forward(data: bytes) -> Forward:
    session = open_session(data)
    name = session.get_inputs()[0].name

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits, embedding = session.run(None, {name: batch.contiguous().numpy()})
        return torch.from_numpy(logits), torch.from_numpy(embedding)

    return forward


_REQUIRES = ("onnxruntime", "pip install 'refract[onnx]'")

BACKENDS = (
    Backend("onnx", _build, ("cpu",), ("kept.onnx",), embeds=True, requires=_REQUIRES),
    Backend("onnx-int8", _build_int8, ("cpu",), (QUANTISED,), INT8_AGREED, int8=True, embeds=True, requires=_REQUIRES),
)
