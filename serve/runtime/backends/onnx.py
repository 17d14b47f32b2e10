"""Backends of ONNX Runtime on CPUs, in float32 and in 8-bit integers."""

import os
from pathlib import Path

import torch
from torch import Tensor

from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import INT8_AGREED, Backend, Forward, needs
from refract.serve.runtime.backends.quantised import FILE as QUANTISED
from refract.serve.runtime.backends.quantised import exported, quantised
from refract.serve.runtime.backends.storage import store


def _build(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    """Export the network to ONNX, or read it from `folder`, where an earlier start stored it. An export takes ten seconds.

    A call has less overhead than one of OpenVINO, which matters for small networks (lenet5: 270 against 360 µs of server time a request).
    """
    file = folder / "kept.onnx"
    if file.is_file():
        return _session(file.read_bytes())
    data = exported(network, images)
    store(folder, "onnx", lambda part: part.write_bytes(data))
    return _session(data)


def _build_int8(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    return _session(quantised(network, images, folder))


def _session(data: bytes) -> Forward:
    # From version 1.29 on, ONNX Runtime stores a machine id in the home directory and sends telemetry to Microsoft by default.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits, embedding = session.run(None, {name: batch.contiguous().numpy()})
        return torch.from_numpy(logits), torch.from_numpy(embedding)

    return forward


_MISSING = needs("onnxruntime", "pip install 'refract[onnx]'")

BACKENDS = (
    Backend("onnx", _build, ("cpu",), ("kept.onnx",), missing=_MISSING, embeds=True),
    Backend("onnx-int8", _build_int8, ("cpu",), (QUANTISED,), INT8_AGREED, int8=True, missing=_MISSING, embeds=True),
)
