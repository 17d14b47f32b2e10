"""Fusion of images and texts: separate networks compute the features, a fusion layer joins them, one head classifies.

The names of nn.Module attributes with parameters or submodules are keys of stored weights: a rename breaks stored bundles and checkpoints.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from refract.models.head import HEADS, last_layer
from refract.models.layers import pick
from refract.models.multimodal.former_names import rename
from refract.models.training.activation_checkpointing import frozen_batch_statistics


class Concatenated(nn.Module):
    """Concatenate both features, then a linear layer and GELU. (N, images), (N, texts) → (N, width)."""

    def __init__(self, images: int, texts: int, width: int) -> None:
        super().__init__()
        self.joined = nn.Sequential(nn.Linear(images + texts, width), nn.GELU())

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        features: Tensor = self.joined(torch.cat([image, text], dim=1))
        return features


class Gated(nn.Module):
    """z · tanh(image) + (1 − z) · tanh(text), with z a sigmoid of both.

    Source: Arevalo et al. 2017, arXiv:1702.01992, section 3.1.
    """

    def __init__(self, images: int, texts: int, width: int) -> None:
        super().__init__()
        self.of_image, self.of_text = nn.Linear(images, width), nn.Linear(texts, width)
        self.gate = nn.Linear(images + texts, width)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(torch.cat([image, text], dim=1)))
        return torch.lerp(torch.tanh(self.of_text(text)), torch.tanh(self.of_image(image)), gate)


class FiLM(nn.Module):
    """(1 + γ) · image + β, with γ and β linear in the text.

    Source: Perez et al. 2018, arXiv:1709.07871, section 2. Deviations: it modulates the pooled features, which any backbone has, not the
    feature maps; and it adds features of the text itself, so that the text alone can determine the prediction.
    """

    def __init__(self, images: int, texts: int, width: int) -> None:
        super().__init__()
        self.of_image, self.of_text = nn.Linear(images, width), nn.Linear(texts, 3 * width)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        scale, shift, text_features = self.of_text(text).chunk(3, dim=1)
        return torch.relu((1 + scale) * self.of_image(image) + shift) + torch.relu(text_features)


FUSIONS: Mapping[str, Callable[[int, int, int], nn.Module]] = MappingProxyType(
    {"concat": Concatenated, "gated": Gated, "film": FiLM}
)


class Reader(nn.Module):
    """Map texts, or images and texts, to logits.

    - images: a network of images, whose last layer is removed in place, or None for a network that reads only texts
    - texts: a network of `refract.models.multimodal.text_networks`
    - fusion: one of FUSIONS; width: its number of output features
    - drop_image, drop_text: fraction of the training samples whose image or text is hidden, never both (modality dropout: Neverova et al.
      2016, arXiv:1501.00102, section 4)
    - head: linear, or one of `refract.models.head.HEADS`

    A learned vector replaces the features of a missing image or text. ValueError for an unknown name, or a network of images that does not
    end in a linear layer.
    """

    def __init__(
        self,
        images: nn.Module | None,
        texts: nn.Module,
        num_classes: int,
        *,
        fusion: str = "concat",
        width: int = 256,
        drop_image: float = 0.15,
        drop_text: float = 0.15,
        head: str = "linear",
    ) -> None:
        super().__init__()
        self.drop_image, self.drop_text = drop_image, drop_text
        # The names of parameters and modules are keys of stored weights: a new name needs an entry in `former_names`.
        self.texts = texts
        features = int(texts.width)  # type: ignore[arg-type]
        self.no_text = nn.Parameter(torch.zeros(features))
        self.images: nn.Module | None = None
        self.fusion: nn.Module | None = None
        if images is not None:
            self.images, image_features = without_head(images)
            self.no_image = nn.Parameter(torch.zeros(image_features))
            self.fusion = pick("fusion", fusion, FUSIONS)(image_features, features, width)
            features = width
        self.head = (
            nn.Linear(features, num_classes) if head == "linear" else pick("head", head, HEADS)(features, num_classes)
        )
        self.register_load_state_dict_pre_hook(_accept_former_names)

    def branches(self) -> list[nn.Module]:
        """Return the networks below the fusion layer."""
        return [self.texts] if self.images is None else [self.images, self.texts]

    def joint_head(self) -> nn.Module:
        """Return the layers that are trained in every mode: the fusion layer and the last layer."""
        return self.head if self.fusion is None else nn.ModuleList([self.fusion, self.head])

    def forward(self, images: Tensor | None, texts: Tensor, has_image: Tensor, mixed: Tensor | None = None) -> Tensor:
        """Compute logits (N, num_classes).

        - images: (N, 3, H, W) normalised floats; None for a network that reads only texts
        - texts: (N, L) integer token numbers; a row of zeros is a missing text
        - has_image: (N,) bool
        - mixed: (N, N) mixing weights of the batch's samples, if the images were mixed; the features of the texts are mixed with the same
          weights, so that images, texts and targets agree
        """
        has_text, real_images = texts.ne(0).any(dim=1), has_image
        if self.training and self.images is not None:
            drawn = torch.rand(len(texts), device=texts.device)
            has_text = has_text & ~((drawn < self.drop_text) & has_image)
            has_image = has_image & ~((drawn > 1 - self.drop_image) & has_text)
        text = self.texts(texts)
        text = torch.where(has_text.unsqueeze(1), text, self.no_text.to(text.dtype))
        if mixed is not None:
            text = mixed.to(text.dtype) @ text
        if self.images is None or self.fusion is None or images is None:
            return self.head(text)
        image = self._image_features(self.images, images, real_images)
        image = torch.where(has_image.unsqueeze(1), image, self.no_image.to(image.dtype))
        return self.head(self.fusion(image, text))

    def _image_features(self, network: nn.Module, images: Tensor, has_image: Tensor) -> Tensor:
        """Compute the features of the real images; the rows of grey placeholders are undefined.

        Batch norms in training must not see the placeholders, whose grey would change the statistics of all images. A single image does not
        update the statistics either, as it has no deviation.
        """
        has_training_norm = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules()
        )
        if not has_training_norm or bool(has_image.all()):
            return network(images)
        rows = has_image.nonzero().squeeze(1)
        if len(rows) > 1:
            features = network(images[rows])
        else:
            rows = has_image.int().argmax().view(1)
            with frozen_batch_statistics(network):
                features = network(images[rows.repeat(2)])[:1]
        return features.new_zeros(len(images), features.shape[1]).index_copy(0, rows, features)


def _accept_former_names(reader: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state dict is loaded, rename the keys that an earlier version stored."""
    rename(state_dict, prefix)


def without_head(network: nn.Module) -> tuple[nn.Module, int]:
    """Replace the last layer by an identity, in place. Returns (the network, its number of features).

    ValueError if the last layer is not a Linear.
    """
    name = last_layer(network)
    old = network.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"{type(network).__name__} ends in a {type(old).__name__}: fusion with texts needs a network that ends in a "
            "linear layer; choose another model.name"
        )
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network, old.in_features
