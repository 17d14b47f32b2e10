"""Ways to compute a network. Know nothing of HTTP."""

import copy
import io
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from models.classifier import Classifier

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

PART, LEFT_S = "part-", 3600
"""Folders in which files are written, and the age from which nobody writes there any more."""

Forward = Callable[[Tensor], Tensor]
"""uint8 N×3×H×W on the device → float32 logits N×C."""


def _eager(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    return classifier


def channels_last(classifier: Classifier) -> Classifier:
    """`classifier` itself, its weights in the order of a picture's bytes: a CPU need not put them in order for each. Those of networks of
    slices in depth have a dimension more, and stay."""
    if all(parameter.dim() != 5 for parameter in classifier.parameters()):
        classifier.to(memory_format=torch.channels_last)
    return classifier


def _bf16(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    """bfloat16 where that is safe, the channels last in memory."""
    own = channels_last(copy.deepcopy(classifier))
    _lower(own, images[:2])

    def forward(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            return own(batch).float()

    return forward


def _lower(classifier: Classifier, example: Tensor) -> None:
    """Keep the weights in bfloat16 that autocast would convert at each call: a fifth of the time that resnet18 takes for one picture."""
    found: list[nn.Module] = []

    def look(module: nn.Module, _: Any) -> None:
        if torch.is_autocast_enabled(example.device.type):  # not where a network switches it off
            found.append(module)

    layers = [module for module in classifier.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    with torch.autocast(example.device.type, torch.bfloat16):
        classifier(example)
    for hook in hooks:
        hook.remove()
    for layer in found:
        layer.to(torch.bfloat16)


def _compiled(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    """The same by torch.compile. On a CPU it needs a C++ compiler, and most of a minute at its first start."""
    run = torch.compile(channels_last(copy.deepcopy(classifier)), dynamic=True)

    def forward(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            return run(batch).float()

    return forward


def _openvino(classifier: Classifier, images: Tensor, folder: Path, precision: str = "f32") -> Forward:
    """OpenVINO, in float32. The converted network is kept in `folder`."""
    core, file = _openvino_core(), folder / "kept.xml"
    import openvino  # after it has been kept from talking

    if file.is_file():
        model = core.read_model(file)
    else:
        model = openvino.convert_model(classifier, example_input=images[:2])
        store(folder, "xml", lambda part: openvino.save_model(model, part, compress_to_fp16=False))
    return _openvino_request(model, precision)


def _openvino_int8(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    """What `_quantised` makes, by OpenVINO, which has faster functions for it than ONNX Runtime."""
    return _openvino_request(_openvino_core().read_model(io.BytesIO(_quantised(classifier, images, folder))), "f32")


def _openvino_request(model: "openvino.Model", precision: str) -> Forward:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # By itself it takes bfloat16 wherever the processor knows it, at two thirds of float32's rate on an Intel Xeon without AMX.
        "INFERENCE_PRECISION_HINT": precision,
        # And binds its threads to cores: those of several engines to the same ones, and beside threads that decode.
        "ENABLE_CPU_PINNING": False,
    }
    request, alone = _openvino_core().compile_model(model, "CPU", settings).create_infer_request(), threading.Lock()

    def forward(batch: Tensor) -> Tensor:
        with alone:  # a request holds its own answer: of two threads at a time one would get the other's
            return torch.from_numpy(request.infer([batch.contiguous().numpy()])[0].copy())

    return forward


@cache
def _openvino_core() -> "openvino.Core":
    """One for the process. It gives the thread that makes it another stack for signals, and at its own end frees it, in whichever thread
    that is: where the model was exchanged, the next signal would end the server."""
    # Else its converter tells Google Analytics that it is used; without this package it does without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


def _onnx(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    """ONNX Runtime, in float32. The exported network is kept in `folder`."""
    file = folder / "kept.onnx"
    if file.is_file():
        return _onnx_session(file.read_bytes())
    data = _exported(classifier, images)
    store(folder, "onnx", lambda part: part.write_bytes(data))
    return _onnx_session(data)


def _onnx_int8(classifier: Classifier, images: Tensor, folder: Path) -> Forward:
    """What `_quantised` makes, by ONNX Runtime."""
    return _onnx_session(_quantised(classifier, images, folder))


def _quantised(classifier: Classifier, images: Tensor, folder: Path) -> bytes:
    """The network in integers of 8 bits, its weights of 7 where the processor needs that; a scale for each channel of the weights and for
    each layer's output, whose range is that of the golden pictures and of what is made of them; made by ONNX Runtime, kept in `folder`.
    Source: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342."""
    file = folder / "kept.int8.onnx"
    if file.is_file():
        return file.read_bytes()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as beside, _told(beside):
        plain, ready, made = (Path(beside, name) for name in ("plain.onnx", "ready.onnx", "made.onnx"))
        plain.write_bytes(_exported(classifier, images))
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        shown = _Shown(_varied(images))
        # Of a processor's instructions for 8 bits, x86's multiply unsigned by signed ones: three times as fast as signed by signed.
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, made, shown, per_channel=True, reduce_range=weight_bits() == 7, **types)
        data = made.read_bytes()
    store(folder, "int8.onnx", lambda part: part.write_bytes(data))
    return data


def weight_bits() -> int:
    """Of a weight in INT8: 8, or 7 on x86 without VNNI, which adds two products of 8 bits in 16 and cuts what is more."""
    known: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return 7 if on_x86 and not any(known.get(name) for name in ("avx512_vnni", "avx_vnni")) else 8


@contextmanager
def _told(folder: str) -> Iterator[None]:
    """OSError with the folder: that of a disk that is full does not name it."""
    try:
        yield
    except OSError as err:
        raise OSError(f"{folder}: {err.strerror}; make room there, or name another place by TMPDIR") from err


INPUT = "images"


class _Shown:
    """What ONNX Runtime asks for a batch at a time, to see the ranges."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def _varied(images: Tensor) -> Iterator[Tensor]:
    """The pictures, mirrored, darker, brighter, and of less and of more contrast."""
    yield images
    yield images.flip(3)
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    for factor in (0.6, 1.4):
        for middle in (torch.zeros_like(mean), mean):
            yield ((images - middle) * factor + middle).clamp(0, 255).to(torch.uint8)


def _exported(classifier: Classifier, images: Tensor) -> bytes:
    shapes = ({0: torch.export.Dim("pictures")},)
    program = torch.onnx.export(
        classifier, (images[:2],), input_names=[INPUT], dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def _onnx_session(data: bytes) -> Forward:
    # Else from 1.29 on it keeps a name for this machine in the home, and tells Microsoft what it computes.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.contiguous().numpy()})[0])


def store(folder: Path, suffix: str, write: Callable[[Path], object]) -> None:
    """Have `write` make a file, and call it `kept` when it is whole. Where that cannot be, in a read-only container, the next start makes
    it again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: others may write there, as containers do, which share one process number.
        with tempfile.TemporaryDirectory(prefix=PART, dir=folder) as part:
            write(Path(part, f"kept.{suffix}"))
            for written in sorted(Path(part).iterdir()):  # of OpenVINO's two files that first, which the other needs
                _rename(written, folder / written.name)
    except (OSError, RuntimeError) as err:  # the second is OpenVINO's kind
        logger.warning("%s is not kept: %s", folder, first_line(err))
    for left in folder.glob(f"{PART}*"):  # by a process that was killed
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left)


def _rename(part: Path, kept: Path) -> None:
    """The bytes are on the disk before the name is: else a loss of power leaves the name with less than all bytes."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(kept)


INT8 = ("openvino-int8", "onnx-int8")
"""Those of BACKENDS that compute in integers of 8 bits."""

KEPT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("openvino", "openvino-bf16"), ("kept.xml", "kept.bin")),
        "onnx": ("kept.onnx",),
        **dict.fromkeys(INT8, ("kept.int8.onnx",)),
    }
)
"""The converted networks of BACKENDS, in a folder of the cache."""

BACKENDS: Mapping[str, Callable[[Classifier, Tensor, Path], Forward]] = MappingProxyType(
    {
        "eager": _eager,
        "bf16": _bf16,
        "compiled": _compiled,
        "openvino": _openvino,
        "openvino-bf16": partial(_openvino, precision="bf16"),
        "onnx": _onnx,
        "openvino-int8": _openvino_int8,
        "onnx-int8": _onnx_int8,
    }
)


def first_line(err: Exception) -> str:
    return (str(err).splitlines() or [""])[0][:200] or type(err).__name__
