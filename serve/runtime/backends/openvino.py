"""Backends of OpenVINO on CPUs, in float32, bfloat16 and 8-bit integers."""

import io
import sys
import threading
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import INT8_AGREED, Backend, Forward, needs
from refract.serve.runtime.backends.quantised import FILE as QUANTISED
from refract.serve.runtime.backends.quantised import quantised
from refract.serve.runtime.backends.storage import store
from refract.serve.runtime.backends.torch_backends import BACKENDS as TORCH_BACKENDS

if TYPE_CHECKING:
    import openvino


def _build(network: FeatureClassifier, images: Tensor, folder: Path, precision: str = "f32") -> Forward:
    """Convert the network, or read it from `folder`, where an earlier start stored it."""
    core, file = _core(), folder / "kept.xml"
    import openvino  # after its telemetry has been switched off

    if file.is_file():
        model = core.read_model(file)
    else:
        model = openvino.convert_model(network, example_input=images[:2])
        store(folder, "xml", lambda part: openvino.save_model(model, part, compress_to_fp16=False))
    return _request(model, precision)


def _build_int8(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    """Build the quantised network. OpenVINO has faster kernels for it than ONNX Runtime."""
    return _request(_core().read_model(io.BytesIO(quantised(network, images, folder))), "f32")


def _request(model: "openvino.Model", precision: str) -> Forward:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # The default is bfloat16 on every CPU that supports it, at two thirds of float32's speed on an Intel Xeon without AMX.
        "INFERENCE_PRECISION_HINT": precision,
        # Pinning would bind the threads of several engines, and the decoding threads, to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    request, lock = _core().compile_model(model, "CPU", settings).create_infer_request(), threading.Lock()

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        with lock:  # a request has one buffer for each result, which concurrent threads would overwrite
            results = request.infer([batch.contiguous().numpy()])
            return torch.from_numpy(results[0].copy()), torch.from_numpy(results[1].copy())

    return forward


@cache
def _core() -> "openvino.Core":
    """Return the only core of this process. A core replaces the signal stack of the thread that creates it, and frees that stack when the
    core is deleted, in any thread. After a hot swap the next signal would then crash the server."""
    # Without this package the converter does not report its use to Google Analytics.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


_MISSING = needs("openvino", "pip install 'refract[openvino]'")
_FILES = ("kept.xml", "kept.bin")

BACKENDS = (
    Backend("openvino", _build, ("cpu",), _FILES, missing=_MISSING, embeds=True),
    Backend(
        "openvino-bf16",
        partial(_build, precision="bf16"),
        ("cpu",),
        _FILES,
        missing=_MISSING,
        embeds=True,
        automatic=next(backend for backend in TORCH_BACKENDS if backend.name == "bf16").automatic,
    ),
    Backend(
        "openvino-int8", _build_int8, ("cpu",), (QUANTISED,), INT8_AGREED, int8=True, missing=_MISSING, embeds=True
    ),
)
