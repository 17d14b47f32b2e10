"""The classifier: a network with scaling and normalisation as its first layer, so that a server cannot forget them.

Independent of files, augmentation and training loops.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.tokens import Tokens
from refract.models.tasks import check_task
from refract.models.training.freezing import blocks_of

NORMALIZE = ("channel", "mean_image", "pca", "zca")


class Classifier(nn.Module):
    """Map images to logits: scale 0…255 to 0…1, normalise, apply `network`.

    - network: maps (N, 3, H, W) floats to (N, num_classes) logits; a `refract.models.multimodal.fusion.Reader` also takes texts
    - normalize: `channel`, (x - mean) / std; `mean_image`, (x - mean_image) / std; `pca` or `zca`, whitening @ (x - mean_image), flattened
      in the order 3, H, W
    - mean, std: three numbers each, for RGB in 0…1, std > 0
    - image_size: (H, W), required unless normalize is `channel`
    - mean_image: (3, H, W) in 0…1; whitening: (3·H·W, 3·H·W); zeros by default, for `load_state_dict` to fill
    - tokens: the tokenizer of a network that reads texts

    The normalisation arrays are buffers of the state dict, so the weights always travel with their normalisation. Set `frozen_norms` to
    freeze the statistics of all batch norms in training.
    ValueError for an unknown normalize, an array of another shape, or mean and std that are not three finite numbers.
    """

    mean: Tensor
    std: Tensor
    mean_image: Tensor | None
    whitening: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        normalize: str = "channel",
        image_size: tuple[int, int] | None = None,
        mean_image: Tensor | None = None,
        whitening: Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        super().__init__()
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize={normalize!r}: expected one of {', '.join(NORMALIZE)}")
        self.network, self.normalize = network, normalize
        self.register_buffer("mean", _three_numbers("mean", mean))
        self.register_buffer("std", _three_numbers("std", std))
        if normalize != "channel" and image_size is None:
            raise ValueError(f"normalize={normalize!r} needs image_size: pass image_size=(height, width)")
        shape = (3, *(image_size or (0, 0)))
        count = math.prod(shape)
        centred, whitened = normalize != "channel", normalize in ("pca", "zca")
        self.register_buffer("mean_image", _shaped("mean_image", mean_image, shape) if centred else None)
        self.register_buffer("whitening", _shaped("whitening", whitening, (count, count)) if whitened else None)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std={tuple(std)}: expected three numbers above 0, for RGB in 0…1")
        self.frozen_norms = False
        self.tokens = tokens
        self._trainable = frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)

    def forward(
        self,
        images: Tensor | None,
        texts: Tensor | None = None,
        has_image: Tensor | None = None,
        mixed: Tensor | None = None,
    ) -> Tensor:
        """Compute logits (N, num_classes).

        images: (N, 3, H, W), any dtype, RGB in 0…255; None for a network that reads only texts. texts: (N, L) token numbers, for a network
        that reads texts, see `refract.models.multimodal.tokens`. has_image: (N,) bool; None means that all samples have one.
        mixed: see `refract.models.multimodal.fusion.Reader`. ValueError for images of another shape.
        """
        if images is not None and (images.ndim != 4 or images.shape[1] != 3):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (N, 3, H, W), RGB in 0…255")
        if texts is None:
            return self.network(self.normalise(images))  # type: ignore[arg-type]
        if has_image is None:
            has_image = torch.full((len(texts),), images is not None, device=texts.device)
        return self.network(None if images is None else self.normalise(images), texts, has_image, mixed)

    @property
    def reads(self) -> frozenset[str]:
        """The inputs of the network: {"images"}, {"texts"}, or both."""
        if not isinstance(self.network, Reader):
            return frozenset({"images"})
        return frozenset({"texts"} | ({"images"} if self.network.images is not None else set()))

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images (N, 3, H, W) of any dtype in 0…255 to float32 of the same shape."""
        std = self.std.to(torch.float32).view(1, 3, 1, 1)
        mean = self.mean.to(torch.float32).view(1, 3, 1, 1)
        if self.mean_image is not None:
            mean = self.mean_image.to(torch.float32).unsqueeze(0)
        if self.whitening is not None:
            centred = (images.to(torch.float32) / 255 - mean).flatten(1)
            with torch.autocast(images.device.type, enabled=False):  # which would round the matrix
                normalised = (centred @ self.whitening.to(torch.float32).T).view(images.shape)
        else:
            # One multiply-add over the pixels instead of a division, a subtraction and another division.
            normalised = torch.addcmul(-mean / std, images.to(torch.float32), 1 / (255 * std))
        return normalised

    def train_blocks(self, count: int | None) -> Self:
        """Freeze all but the last `count` of `blocks_of(network)`, at least the head stays trainable; None unfreezes all. Returns self.

        Parameters that the network's constructor froze stay frozen. Fully frozen modules stay in eval mode even after `train()`: the
        statistics of a frozen batch norm would otherwise follow the new images and change the backbone without any gradient.
        """
        blocks = blocks_of(self.network)
        trained = blocks if count is None else blocks[-max(1, count) :]
        trained_ids = {id(parameter) for block in trained for parameter in block}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in self._trainable and id(parameter) in trained_ids)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. Fully frozen modules stay in eval mode, and with `frozen_norms` all batch norms do."""
        super().train(mode)
        if not mode:
            return self
        trainable = {id(parameter) for name, parameter in self.network.named_parameters() if name in self._trainable}
        in_trained_part = False  # from the first trained parameter on; a dropout before it stays off
        for module in self.network.modules():
            parameters = [parameter for parameter in module.parameters() if id(parameter) in trainable]
            in_trained_part = in_trained_part or any(p.requires_grad for p in module.parameters(recurse=False))
            module.training = (
                any(parameter.requires_grad for parameter in parameters) if parameters else in_trained_part
            )
            if self.frozen_norms and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self


Inputs = tuple[Tensor | None, ...]
"""The arguments of `Classifier.forward`: (images,), or (images or None, texts, has_image) for a network that reads texts."""


def inputs_of(batch: Mapping[str, Tensor]) -> Inputs:
    """Build the arguments of `Classifier.forward` from a training batch. Views of images (B, V, 3, H, W) become (B·V, 3, H, W)."""
    images = batch.get("images")
    images = images.flatten(0, -4) if images is not None and images.ndim > 4 else images
    return (images, batch["texts"], batch["has_image"]) if "texts" in batch else (images,)


def probabilities(logits: Tensor, *, task: str, temperature: float = 1.0) -> Tensor:
    """Compute calibrated probabilities: softmax(logits / temperature), for multilabel sigmoid(logits / temperature).

    logits: (N, C), any float dtype, C = 2 for binary; temperature > 0. Returns float32 (N, C); rows sum to 1 unless
    multilabel. ValueError for an unknown task or a temperature that is not a positive finite number.
    Source: temperature scaling, Guo et al. 2017, arXiv:1706.04599.
    """
    check_task(task)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: expected a finite number above 0")
    scaled = logits.to(torch.float32) / temperature
    return scaled.sigmoid() if task == "multilabel" else scaled.softmax(dim=-1)


def _shaped(name: str, values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if values is None:
        return torch.zeros(shape)
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(values.shape)}: expected {shape}")
    return values.to(torch.float32)


def _three_numbers(name: str, values: Sequence[float]) -> Tensor:
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name}={values!r}: expected three finite numbers, for RGB in 0…1")
    return torch.tensor([float(value) for value in values], dtype=torch.float32)
