"""Quantise an ONNX network to 8-bit integers."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refract.models.conversion.deployable import OUTPUTS
from refract.models.conversion.instruction_sets import weight_bits
from refract.models.conversion.onnx import INPUT, runtime
from refract.models.training_features import TrainingFeatures

MOST_THUMBNAILS = 128
BATCH = 8
"""Images in a batch of the calibration, which holds all activations of the network."""


def quantise(model: bytes, images: np.ndarray) -> bytes:
    """Return the ONNX network in 8-bit integers, with weights of `weight_bits`. ONNX Runtime quantises it.

    Each channel of the weights and each layer's output has its own scale. The outputs' ranges are measured on `images`, inputs of the
    network. What computes probabilities from the logits of a `Deployable` stays in float32.
    OSError, which names the temporary folder, if the disk is full.
    Source: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342.
    """
    runtime()
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary, _naming_folder(temporary):
        plain, ready, result = (Path(temporary, name) for name in ("plain.onnx", "ready.onnx", "int8.onnx"))
        plain.write_bytes(model)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        # x86's 8-bit instructions multiply unsigned by signed integers, three times as fast as signed by signed.
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(
            ready, result, _Reader(images), per_channel=True, reduce_range=weight_bits() == 7,
            nodes_to_exclude=_after_logits(ready), **types,
        )  # fmt: skip
        return result.read_bytes()


def calibration_images(
    golden_images: np.ndarray, training: TrainingFeatures | None, resize: Callable[[bytes], np.ndarray]
) -> np.ndarray:
    """Return the images on which a bundle's network is calibrated, uint8 N×H×W×3: the golden images and their variants, then thumbnails
    of up to MOST_THUMBNAILS training images, if the bundle has any.

    golden_images: uint8 N×H×W×3; resize: encoded thumbnail → uint8 H×W×3.
    """
    images = torch.from_numpy(golden_images).permute(0, 3, 1, 2)
    thumbnails = [] if training is None else [data for data in training.thumbnails if data]
    chosen = thumbnails[:: max(1, -(-len(thumbnails) // MOST_THUMBNAILS))]
    goldens = [batch.permute(0, 2, 3, 1).numpy() for batch in varied(images)]
    return np.concatenate([*goldens, *(resize(data)[None] for data in chosen)])


def varied(images: Tensor) -> Iterator[Tensor]:
    """Yield the images, their horizontal flips, and darker, brighter, lower-contrast and higher-contrast variants.

    images: (N, 3, H, W) uint8.
    """
    yield images
    yield images.flip(3)
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    for factor in (0.6, 1.4):
        for middle in (torch.zeros_like(mean), mean):
            yield ((images - middle) * factor + middle).clamp(0, 255).to(torch.uint8)


def _after_logits(file: Path) -> list[str]:
    """List the nodes between the outputs logits and probabilities, empty without these: 8 bits would round a probability to 1/255."""
    import onnx

    graph = onnx.load(file).graph
    last, logits = OUTPUTS
    if not {last, logits} <= {output.name for output in graph.output}:
        return []
    producers: dict[str, Any] = {name: node for node in graph.node for name in node.output}
    names, open_tensors = [], [last]
    while open_tensors:
        tensor = open_tensors.pop()
        if tensor != logits and tensor in producers:
            names.append(producers[tensor].name)
            open_tensors += producers[tensor].input
    return names


@contextmanager
def _naming_folder(folder: str) -> Iterator[None]:
    """Add the folder's path to an OSError: the error of a full disk does not name it."""
    try:
        yield
    except OSError as err:
        raise OSError(f"{folder}: {err.strerror}; free disk space there, or set TMPDIR to another folder") from err


class _Reader:
    """Feeds calibration batches to ONNX Runtime, which measures the ranges on them."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches = (np.ascontiguousarray(images[start : start + BATCH]) for start in range(0, len(images), BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}
