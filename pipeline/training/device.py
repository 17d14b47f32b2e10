"""Choose the device and the precision of a training."""

from collections.abc import Mapping
from typing import Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.sections import TrainerConfig


def choose_device(device: str) -> str:
    """Return `cpu` or `cuda`. Raises ConfigError for `cuda` on a machine without a GPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device: cuda, but PyTorch sees no GPU on this machine; use auto or cpu")
    return device


def choose_precision(config: TrainerConfig, device: str) -> str:
    """Return Lightning's name of the precision. `auto` selects mixed bf16 or fp16 where the device is faster in it, else `32-true`."""
    import torch

    lightning_names = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    if config.precision == "fp16" and device == "cpu":
        raise ConfigError("trainer.precision: fp16 needs a GPU; use auto, bf16 or fp32")
    if config.precision != "auto":
        return lightning_names[config.precision]
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # Intel cores without AMX multiply bf16 no faster than float32 and convert besides: fastnet trained at 0.8 times the speed.
    intel = "Intel" in str(capabilities.get("cpu_name"))
    faster = ["amx_bf16", "bf16"] if intel else ["amx_bf16", "avx512_bf16", "bf16"]
    return "bf16-mixed" if any(capabilities.get(name) for name in faster) else "32-true"
