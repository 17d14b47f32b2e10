"""Images and texts in one network: each read by a network of its own, their features brought together, one head."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from refract.models.head import HEADS, last_layer
from refract.models.layers import pick
from refract.models.training.activation_checkpointing import statistics_kept


class Concatenated(nn.Module):
    """Both, one after the other."""

    def __init__(self, images: int, texts: int, width: int) -> None:
        super().__init__()
        self.joined = nn.Sequential(nn.Linear(images + texts, width), nn.GELU())

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        found: Tensor = self.joined(torch.cat([image, text], dim=1))
        return found


class Gated(nn.Module):
    """z · tanh(image) + (1 − z) · tanh(text), z a sigmoid of both: Arevalo et al. 2017, arXiv:1702.01992, section 3.1."""

    def __init__(self, images: int, texts: int, width: int) -> None:
        super().__init__()
        self.of_image, self.of_text = nn.Linear(images, width), nn.Linear(texts, width)
        self.gate = nn.Linear(images + texts, width)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate(torch.cat([image, text], dim=1)))
        return torch.lerp(torch.tanh(self.of_text(text)), torch.tanh(self.of_image(image)), share)


class FiLM(nn.Module):
    """(1 + γ) · image + β, both linear in the text: Perez et al. 2018, arXiv:1709.07871, section 2. Deviation: of the features after
    pooling, which any backbone has, not of its maps; and with the text itself beside, so that it can speak alone."""

    def __init__(self, images: int, texts: int, width: int) -> None:
        super().__init__()
        self.of_image, self.of_text = nn.Linear(images, width), nn.Linear(texts, 3 * width)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        scale, shift, own = self.of_text(text).chunk(3, dim=1)
        return torch.relu((1 + scale) * self.of_image(image) + shift) + torch.relu(own)


FUSIONS: Mapping[str, Callable[[int, int, int], nn.Module]] = MappingProxyType(
    {"concat": Concatenated, "gated": Gated, "film": FiLM}
)


class Reader(nn.Module):
    """Images, texts, or both → logits. Its `forward` takes both; what the network does not read is not looked at.

    images: a network of images, whose last layer is taken away, or None; texts: one of
    `refract.models.multimodal.text_networks`, or None, not both.
    fusion: of FUSIONS; width: of what it gives. drop_image, drop_text: share of the training's samples that are shown without it, never
    without both (modality dropout: Neverova et al. 2016, arXiv:1501.00102, section 4); head: linear, or of `refract.models.head.HEADS`.
    An image or text that is missing has a learned vector in the place of its features. ValueError.
    """

    def __init__(
        self,
        pictures: nn.Module | None,
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
        self.texts = texts
        features = int(texts.width)  # type: ignore[arg-type]
        self.no_text = nn.Parameter(torch.zeros(features))
        self.pictures: nn.Module | None = None
        self.fusion: nn.Module | None = None
        if pictures is not None:
            self.pictures, own = without_head(pictures)
            self.no_picture = nn.Parameter(torch.zeros(own))
            self.fusion = pick("fusion", fusion, FUSIONS)(own, features, width)
            features = width
        self.head = (
            nn.Linear(features, num_classes) if head == "linear" else pick("head", head, HEADS)(features, num_classes)
        )

    def branches(self) -> list[nn.Module]:
        """The networks below what joins them."""
        return [self.texts] if self.pictures is None else [self.pictures, self.texts]

    def joint_head(self) -> nn.Module:
        """What is trained in every mode: what joins the two, and the last layer."""
        return self.head if self.fusion is None else nn.ModuleList([self.fusion, self.head])

    def forward(self, images: Tensor | None, texts: Tensor, has_image: Tensor, mixed: Tensor | None = None) -> Tensor:
        """images: (N, 3, H, W) floats, normalised, None for a network that reads texts alone; texts: (N, L) int; has_image: (N,) bool,
        whether there is an image; mixed: (N, N), each sample's shares of the batch's samples, where images were mixed: the texts'
        features are mixed alike, so that both sides speak for what the targets say. Logits (N, num_classes)."""
        written, there = texts.ne(0).any(dim=1), has_image
        if self.training and self.pictures is not None:
            drawn = torch.rand(len(texts), device=texts.device)
            written = written & ~((drawn < self.drop_text) & has_image)
            has_image = has_image & ~((drawn > 1 - self.drop_image) & written)
        text = self.texts(texts)
        text = torch.where(written.unsqueeze(1), text, self.no_text.to(text.dtype))
        if mixed is not None:
            text = mixed.to(text.dtype) @ text
        if self.pictures is None or self.fusion is None or images is None:
            return self.head(text)
        image = self._seen(self.pictures, images, there)
        image = torch.where(has_image.unsqueeze(1), image, self.no_picture.to(image.dtype))
        return self.head(self.fusion(image, text))

    def _seen(self, network: nn.Module, images: Tensor, there: Tensor) -> Tensor:
        """The features of the images that are there, whatever in the place of the others: batch norms that learn must not count these,
        whose grey would move what every image is normalised by. One image alone is not counted either, as it has no deviation."""
        learning = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules())
        if not learning or bool(there.all()):
            return network(images)
        rows = there.nonzero().squeeze(1)
        if len(rows) > 1:
            found = network(images[rows])
        else:
            rows = there.int().argmax().view(1)
            with statistics_kept(network):
                found = network(images[rows.repeat(2)])[:1]
        return found.new_zeros(len(images), found.shape[1]).index_copy(0, rows, found)


def without_head(network: nn.Module) -> tuple[nn.Module, int]:
    """(the network with nothing in the place of its last layer, the number of its features). ValueError where that is no Linear."""
    name = last_layer(network)
    old = network.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"{type(network).__name__} ends in a {type(old).__name__}, not a linear layer; it cannot be joined with texts"
        )
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network, old.in_features
