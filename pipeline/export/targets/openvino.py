"""`--to openvino`: model.xml and model.bin, for OpenVINO's runtime."""

import errno
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refract.models.conversion.deployable import OUTPUTS
from refract.models.conversion.openvino import compiled, core, to_openvino
from refract.pipeline.export.target import PIXELS, ExportError, Job, Run, Target, metadata

MODEL = "model.xml"


def write(job: Job, folder: Path) -> None:
    """Write the model with its metadata, in 8-bit integers by way of ONNX Runtime's quantisation."""
    if job.calibration is None:
        model = to_openvino(job.network, torch.from_numpy(job.images))
    else:
        model = core().read_model(io.BytesIO(_quantised(job)))
    import openvino  # after its telemetry has been switched off

    model.reshape([-1, *job.images.shape[1:]])
    model.inputs[0].get_tensor().set_names({PIXELS["name"]})
    model.get_parameters()[0].set_layout(openvino.Layout("NHWC"))
    for output, name in zip(model.outputs, OUTPUTS, strict=True):
        output.get_tensor().set_names({name})
    for name, value in metadata(job.description).items():
        model.set_rt_info(value, ["refract", name])
    try:
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    except RuntimeError as err:  # its streams do not say why a write fails
        raise OSError(errno.EIO, f"OpenVINO cannot write {MODEL} ({err}); is the disk full?") from err


def _quantised(job: Job) -> bytes:
    from refract.pipeline.export.targets import onnx

    try:
        onnx.TARGET.check_installed()
    except ExportError as err:
        raise ExportError(f"--int8 for openvino quantises by ONNX Runtime; {err}") from err
    return onnx.onnx_of(job)


def run(folder: Path, description: Mapping[str, Any]) -> Run:
    """Open the model with OpenVINO."""
    network = compiled(core().read_model(folder / MODEL))

    def compute(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        results = network([images])
        return results[OUTPUTS[0]], results[OUTPUTS[1]]

    return compute


TARGET = Target("openvino", write, run, MODEL, PIXELS, packages=("openvino",), extra="openvino", int8=True)
