"""OpenVINO on CPUs."""

import io
import sys
import threading
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refract.models.classifier import Classifier
from refract.serve.runtime.backends.base import INT8_AGREED, Backend, Forward, needs
from refract.serve.runtime.backends.kept import store
from refract.serve.runtime.backends.quantised import FILE as QUANTISED
from refract.serve.runtime.backends.quantised import quantised
from refract.serve.runtime.backends.torch_backends import BACKENDS as OF_TORCH

if TYPE_CHECKING:
    import openvino


def _build(classifier: Classifier, images: Tensor, folder: Path, precision: str = "f32") -> Forward:
    """The converted network is kept in `folder`."""
    core, file = _core(), folder / "kept.xml"
    import openvino  # after its telemetry has been switched off

    if file.is_file():
        model = core.read_model(file)
    else:
        model = openvino.convert_model(classifier, example_input=images[:2])
        store(folder, "xml", lambda part: openvino.save_model(model, part, compress_to_fp16=False))
    return _request(model, precision)


def _build_int8(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    """The quantised network, for which OpenVINO has faster kernels than ONNX Runtime."""
    return _request(_core().read_model(io.BytesIO(quantised(classifier, images, folder))), "f32")


def _request(model: "openvino.Model", precision: str) -> Forward:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Its default is bfloat16 wherever the processor knows it, at two thirds of float32's rate on an Intel Xeon without AMX.
        "INFERENCE_PRECISION_HINT": precision,
        # It would bind its threads to cores: those of several engines to the same ones, and to those of decoding threads.
        "ENABLE_CPU_PINNING": False,
    }
    request, alone = _core().compile_model(model, "CPU", settings).create_infer_request(), threading.Lock()

    def forward(batch: Tensor) -> Tensor:
        with alone:  # a request holds one result: of two concurrent threads one would read the other's
            return torch.from_numpy(request.infer([batch.contiguous().numpy()])[0].copy())

    return forward


@cache
def _core() -> "openvino.Core":
    """One for the process. It replaces the signal stack of the thread that creates it, and frees that stack at its own end, in any thread:
    after a hot swap the next signal would end the server."""
    # Without this package its converter does not report its use to Google Analytics.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


_MISSING = needs("openvino", "pip install 'refract[openvino]'")
_FILES = ("kept.xml", "kept.bin")

BACKENDS = (
    Backend("openvino", _build, ("cpu",), _FILES, missing=_MISSING),
    Backend(
        "openvino-bf16",
        partial(_build, precision="bf16"),
        ("cpu",),
        _FILES,
        missing=_MISSING,
        automatic=next(backend for backend in OF_TORCH if backend.name == "bf16").automatic,
    ),
    Backend("openvino-int8", _build_int8, ("cpu",), (QUANTISED,), INT8_AGREED, int8=True, missing=_MISSING),
)
