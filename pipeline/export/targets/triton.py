"""`--to triton`: a model repository for NVIDIA Triton, whose ONNX Runtime backend computes the network."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from refract.pipeline.export.target import PIXELS, ExportError, Job, Run, Target
from refract.pipeline.export.targets import onnx
from refract.pipeline.export.triton import repository_name, write_model_repository

MODEL = "{name}/1/model.onnx"


def write(job: Job, folder: Path) -> None:
    """Write the repository; its model is named as the bundle. ExportError for a label that labels.txt cannot hold."""
    info = job.bundle.info
    with TemporaryDirectory(dir=folder) as temporary:
        onnx.write(job, Path(temporary))
        try:
            write_model_repository(Path(temporary) / onnx.MODEL, info.labels, folder, name=info.name)
        except ValueError as error:
            raise ExportError(f"--to triton: {error}") from error


def run(folder: Path, description: Mapping[str, Any]) -> Run:
    """Open the model with ONNX Runtime, as Triton does."""
    return onnx.run(folder / repository_name(description["name"]) / "1", description)


TARGET = Target("triton", write, run, MODEL, PIXELS, packages=onnx.TARGET.packages, extra="onnx", int8=True)
