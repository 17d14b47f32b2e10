"""Export a network to ONNX, in float32 or in 8-bit integers."""

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import capabilities
from refract.serve.runtime.backends.storage import store

INPUT = "images"
FILE = "kept.int8.onnx"


def exported(network: FeatureClassifier, images: Tensor) -> bytes:
    """Return the network as ONNX in float32, for any batch size."""
    shapes = ({0: torch.export.Dim("images")},)
    program = torch.onnx.export(
        network, (images[:2],), input_names=[INPUT], dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def quantised(network: FeatureClassifier, images: Tensor, folder: Path) -> bytes:
    """Return the network as ONNX in 8-bit integers, with weights of `weight_bits`. ONNX Runtime quantises it; `folder` stores the result.

    Each channel of the weights and each layer's output has its own scale. The outputs' ranges are measured on the golden samples and on
    their variants. Source: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342.
    """
    file = folder / FILE
    if file.is_file():
        return file.read_bytes()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary, _naming_folder(temporary):
        plain, ready, result = (Path(temporary, name) for name in ("plain.onnx", "ready.onnx", "int8.onnx"))
        plain.write_bytes(exported(network, images))
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        reader = _Reader(_varied(images))
        # x86's 8-bit instructions multiply unsigned by signed integers, three times as fast as signed by signed.
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, result, reader, per_channel=True, reduce_range=weight_bits() == 7, **types)
        data = result.read_bytes()
    store(folder, FILE.removeprefix("kept."), lambda part: part.write_bytes(data))
    return data


def weight_bits() -> int:
    """Return the bits of a weight: 8, or 7 on x86 without VNNI, which adds two 8-bit products in 16 bits and saturates."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return 7 if on_x86 and not any(capabilities().get(name) for name in ("avx512_vnni", "avx_vnni")) else 8


@contextmanager
def _naming_folder(folder: str) -> Iterator[None]:
    """Add the folder's path to an OSError: the error of a full disk does not name it."""
    try:
        yield
    except OSError as err:
        raise OSError(f"{folder}: {err.strerror}; free disk space there, or set TMPDIR to another folder") from err


class _Reader:
    """Feeds calibration batches to ONNX Runtime, which measures the ranges on them."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def _varied(images: Tensor) -> Iterator[Tensor]:
    """Yield the images, their horizontal flips, and darker, brighter, lower-contrast and higher-contrast variants."""
    yield images
    yield images.flip(3)
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    for factor in (0.6, 1.4):
        for middle in (torch.zeros_like(mean), mean):
            yield ((images - middle) * factor + middle).clamp(0, 255).to(torch.uint8)
