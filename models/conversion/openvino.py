"""Convert a network to OpenVINO, and compile it for the CPU."""

import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import openvino


def to_openvino(network: nn.Module, images: Tensor) -> "openvino.Model":
    """Convert the network in float32, for any batch size. images: an example of at least two, of which the shape and dtype matter."""
    core()
    import openvino  # after its telemetry has been switched off

    return openvino.convert_model(network, example_input=images[:2])


def compiled(model: "openvino.Model", precision: str = "f32") -> "openvino.CompiledModel":
    """Compile the model for single batches on PyTorch's number of threads. precision: f32 or bf16."""
    settings: Mapping[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # The default is bfloat16 on every CPU that supports it, at two thirds of float32's speed on an Intel Xeon without AMX.
        "INFERENCE_PRECISION_HINT": precision,
        # Pinning would bind the threads of several engines, and the decoding threads, to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    return core().compile_model(model, "CPU", dict(settings))


@cache
def core() -> "openvino.Core":
    """Return the only core of this process. A core replaces the signal stack of the thread that creates it, and frees that stack when the
    core is deleted, in any thread. After a hot swap the next signal would then crash the server."""
    # Without this package the converter does not report its use to Google Analytics.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()
