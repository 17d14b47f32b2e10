"""Backends of OpenVINO on CPUs, in float32, bfloat16 and 8-bit integers."""

import io
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refract.models.conversion.openvino import compiled, core, to_openvino
from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import INT8_AGREED, Backend, Forward
from refract.serve.runtime.backends.quantised import FILE as QUANTISED
from refract.serve.runtime.backends.quantised import quantised
from refract.serve.runtime.backends.storage import store
from refract.serve.runtime.backends.torch_backends import BACKENDS as TORCH_BACKENDS

if TYPE_CHECKING:
    import openvino


def _build(network: FeatureClassifier, images: Tensor, folder: Path, precision: str = "f32") -> Forward:
    """Convert the network, or read it from `folder`, where an earlier start stored it."""
    file = folder / "kept.xml"
    if file.is_file():
        model = core().read_model(file)
    else:
        model = to_openvino(network, images)
        import openvino  # after its telemetry has been switched off

        store(folder, "xml", lambda part: openvino.save_model(model, part, compress_to_fp16=False))
    return _request(model, precision)


def _build_int8(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    """Build the quantised network. OpenVINO has faster kernels for it than ONNX Runtime."""
    return _request(core().read_model(io.BytesIO(quantised(network, images, folder))), "f32")


def _request(model: "openvino.Model", precision: str) -> Forward:
    request, lock = compiled(model, precision).create_infer_request(), threading.Lock()

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        with lock:  # a request has one buffer for each result, which concurrent threads would overwrite
            results = request.infer([batch.contiguous().numpy()])
            return torch.from_numpy(results[0].copy()), torch.from_numpy(results[1].copy())

    return forward


_REQUIRES = ("openvino", "pip install 'refract[openvino]'")
_FILES = ("kept.xml", "kept.bin")
_OF_BF16 = next(backend for backend in TORCH_BACKENDS if backend.name == "bf16").automatic

BACKENDS = (
    Backend("openvino", _build, ("cpu",), _FILES, embeds=True, requires=_REQUIRES),
    Backend(
        "openvino-bf16",
        partial(_build, precision="bf16"),
        ("cpu",),
        _FILES,
        automatic=_OF_BF16,
        embeds=True,
        requires=_REQUIRES,
    ),
    Backend(
        "openvino-int8", _build_int8, ("cpu",), (QUANTISED,), INT8_AGREED, int8=True, embeds=True, requires=_REQUIRES
    ),
)
