"""`--to onnx`: model.onnx, for ONNX Runtime and everything else that reads ONNX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refract.models.conversion.deployable import OUTPUTS
from refract.models.conversion.onnx import open_session, to_onnx
from refract.pipeline.export.target import PIXELS, Job, Run, Target, metadata

MODEL = "model.onnx"


def onnx_of(job: Job) -> bytes:
    """Convert the network of the job, in 8-bit integers if it has images for the calibration."""
    data = to_onnx(job.network, torch.from_numpy(job.images), OUTPUTS)
    if job.calibration is None:
        return data
    from refract.models.conversion.int8 import quantise

    return quantise(data, job.calibration)


def write(job: Job, folder: Path) -> None:
    """Write the model with its metadata."""
    import onnx

    model = onnx.load_from_string(onnx_of(job))
    onnx.helper.set_model_props(model, metadata(job.description))
    onnx.save(model, folder / MODEL)


def run(folder: Path, description: Mapping[str, Any]) -> Run:
    """Open the model with ONNX Runtime."""
    session = open_session(str(folder / MODEL))

    def compute(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probabilities, logits = session.run(list(OUTPUTS), {PIXELS["name"]: images})
        return probabilities, logits

    return compute


TARGET = Target(
    "onnx", write, run, MODEL, PIXELS, packages=("onnx", "onnxscript", "onnxruntime"), extra="onnx", int8=True
)
