"""`--to torch-export`: model.pt2, a program of torch.export that runs without the network's code."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refract.pipeline.export.target import PIXELS, Job, Run, Target, metadata

MODEL = "model.pt2"


def write(job: Job, folder: Path) -> None:
    """Write the program; its extra file metadata.json has the metadata."""
    shapes = ({0: torch.export.Dim(PIXELS["name"])},)
    program = torch.export.export(job.network, (torch.from_numpy(job.images[:2]),), dynamic_shapes=shapes)
    extra = {"metadata.json": json.dumps(metadata(job.description), ensure_ascii=False)}
    buffer = io.BytesIO()  # for a path, PyTorch ends the process if the disk is full
    torch.export.save(program, buffer, extra_files=extra)
    (folder / MODEL).write_bytes(buffer.getvalue())


def run(folder: Path, description: Mapping[str, Any]) -> Run:
    """Load the program."""
    network = torch.export.load(folder / MODEL).module()

    def compute(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            probabilities, logits = network(torch.from_numpy(images))
        return probabilities.numpy(), logits.numpy()

    return compute


TARGET = Target("torch-export", write, run, MODEL, PIXELS)
