"""Store a network in 8-bit integers, which the backends of ONNX Runtime and OpenVINO share."""

from pathlib import Path

from torch import Tensor

from refract.models.conversion.int8 import quantise
from refract.models.conversion.onnx import to_onnx
from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.storage import store

FILE = "kept.int8.onnx"


def quantised(network: FeatureClassifier, images: Tensor, folder: Path) -> bytes:
    """Return the network as ONNX in 8-bit integers; `folder` stores the result. images: those of the calibration, N×3×H×W."""
    file = folder / FILE
    if file.is_file():
        return file.read_bytes()
    data = quantise(to_onnx(network, images), images.numpy())
    store(folder, FILE.removeprefix("kept."), lambda part: part.write_bytes(data))
    return data
