"""Convert a network to ONNX, and open it with ONNX Runtime."""

import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnxruntime

INPUT = "images"


def to_onnx(network: nn.Module, images: Tensor, outputs: Sequence[str] | None = None) -> bytes:
    """Return the network as ONNX in float32, for any batch size. It takes ten seconds.

    images: an example of at least two, of which the shape and dtype matter. outputs: names of the network's outputs.
    """
    shapes = ({0: torch.export.Dim(INPUT)},)
    program = torch.onnx.export(
        network,
        (images[:2],),
        input_names=[INPUT],
        output_names=None if outputs is None else [*outputs],
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def open_session(model: bytes | str) -> "onnxruntime.InferenceSession":
    """Open a model, its bytes or its path, on the CPU with PyTorch's number of threads."""
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def runtime() -> ModuleType:
    """Import ONNX Runtime without its telemetry."""
    # From version 1.29 on, it stores a machine id in the home directory and sends telemetry to Microsoft by default.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime
