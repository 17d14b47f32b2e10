"""ONNX Runtime on CPUs."""

import os
from pathlib import Path

import torch
from torch import Tensor

from refract.models.classifier import Classifier
from refract.serve.runtime.backends.base import INT8_AGREED, Backend, Forward, needs
from refract.serve.runtime.backends.kept import store
from refract.serve.runtime.backends.quantised import FILE as QUANTISED
from refract.serve.runtime.backends.quantised import exported, quantised


def _build(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    """The exported network is kept in `folder`. Exporting takes ten seconds; a call costs less than one of OpenVINO, which small networks
    notice (lenet5: 270 against 360 µs of the server's time for a request)."""
    file = folder / "kept.onnx"
    if file.is_file():
        return _session(file.read_bytes())
    data = exported(classifier, images)
    store(folder, "onnx", lambda part: part.write_bytes(data))
    return _session(data)


def _build_int8(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    return _session(quantised(classifier, images, folder))


def _session(data: bytes) -> Forward:
    # From 1.29 on it would otherwise keep a name for this machine in the home, and report what it computes to Microsoft.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.contiguous().numpy()})[0])


_MISSING = needs("onnxruntime", "pip install 'refract[onnx]'")

BACKENDS = (
    Backend("onnx", _build, ("cpu",), ("kept.onnx",), missing=_MISSING),
    Backend("onnx-int8", _build_int8, ("cpu",), (QUANTISED,), INT8_AGREED, int8=True, missing=_MISSING),
)
