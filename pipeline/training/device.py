"""What the machine offers: device and precision."""

from collections.abc import Mapping
from typing import Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.sections import TrainerConfig


def choose_device(device: str) -> str:
    """`cpu` or `cuda`. ConfigError where a GPU is asked for and there is none."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device: cuda, but PyTorch sees no GPU here; take auto or cpu")
    return device


def choose_precision(config: TrainerConfig, device: str) -> str:
    """Lightning's name of the precision: mixed bf16 or fp16 where the device computes faster in it, else `32-true`."""
    import torch

    named = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    if config.precision == "fp16" and device == "cpu":
        raise ConfigError("trainer.precision: fp16 needs a GPU; take auto, bf16 or fp32")
    if config.precision != "auto":
        return named[config.precision]
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    capable: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # Intel's cores without AMX take as long for a product of bf16 as of float32, and convert besides: fastnet trained 0.8 times as fast.
    paying = ["amx_bf16", "bf16"] if "Intel" in str(capable.get("cpu_name")) else ["amx_bf16", "avx512_bf16", "bf16"]
    return "bf16-mixed" if any(capable.get(name) for name in paying) else "32-true"
