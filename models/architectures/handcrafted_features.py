"""A linear classifier on handcrafted features, the baseline for learned features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.architectures.rbf import clustered
from refract.models.layers import pick


class ColourHistogram(nn.Module):
    """Compute the square root of the fraction of pixels in each of bins³ boxes of RGB.

    The boxes divide normalised values from −2.5 to 2.5; values beyond fall in the outer boxes.
    (N, 3, H, W) → (N, bins³). Source: Swain & Ballard 1991, "Color indexing".
    """

    def __init__(self, image_size: tuple[int, int], bins: int = 6) -> None:
        super().__init__()
        self.bins, self.size = _above_0("bins", bins), bins**3

    def forward(self, images: Tensor) -> Tensor:
        bins = ((images.float() + 2.5) / 5 * self.bins).long().clamp(0, self.bins - 1)
        box = (bins[:, 0] * self.bins + bins[:, 1]) * self.bins + bins[:, 2]
        counts = torch.zeros(len(images), self.size, device=images.device)
        flat = box.flatten(1)
        return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype)).div_(flat.shape[1]).sqrt()


class HoG(nn.Module):
    """Histograms of oriented gradients: 9 unsigned directions in cells of `cell`² pixels, normalised over blocks of 2×2 cells.

    (N, 3, H, W) → (N, 36 · blocks). The gradient comes from the grey image; L2-Hys normalisation, clipped at 0.2.
    Source: Dalal & Triggs 2005, section 6.
    """

    def __init__(self, image_size: tuple[int, int], cell: int = 8) -> None:
        super().__init__()
        _above_0("cell", cell)
        down, across = image_size[0] // cell, image_size[1] // cell
        if min(down, across) < 2:
            raise ValueError(
                f"image_size={image_size}: hog with cells of {cell} expected at least {2 * cell} pixels a side"
            )
        self.cell, self.size = cell, 36 * (down - 1) * (across - 1)

    def forward(self, images: Tensor) -> Tensor:
        grey = F.pad(images.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
        down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        magnitude = torch.sqrt(across.square() + down.square() + 1e-12)
        direction = torch.atan2(down, across).remainder(math.pi) / math.pi * 9  # in bins of 20°
        low = direction.floor()
        weight = direction - low
        bins = torch.arange(9, device=images.device).view(1, 9, 1, 1)
        first, second = (low.long() % 9) == bins, ((low.long() + 1) % 9) == bins
        votes = magnitude * ((1 - weight) * first + weight * second)
        cells = F.avg_pool2d(votes, self.cell)
        blocks = torch.cat([cells[..., :-1, :-1], cells[..., :-1, 1:], cells[..., 1:, :-1], cells[..., 1:, 1:]], dim=1)
        blocks = F.normalize(F.normalize(blocks, dim=1).clamp(max=0.2), dim=1)
        return blocks.flatten(1)


class VisualWords(nn.Module):
    """A bag of visual words: count the nearest of `words` cluster centres for each patch, in each quarter of the image.

    (N, 3, H, W) → (N, 4 · words). `prepare` clusters patches of `patch`² pixels, without their mean and contrast.
    Source: Csurka et al. 2004; on raw patches and in quarters, Coates et al. 2011, "An analysis of single-layer networks".
    """

    def __init__(self, image_size: tuple[int, int], words: int = 128, patch: int = 6) -> None:
        super().__init__()
        _above_0("words", words)
        if _above_0("patch", patch) and min(image_size) < 2 * patch:
            raise ValueError(
                f"image_size={image_size}: visual_words of {patch} pixels expected at least {2 * patch} pixels a side"
            )
        self.patch, self.size = patch, 4 * words
        self.vocabulary: Tensor
        self.register_buffer("vocabulary", torch.randn(words, 3 * patch * patch))

    def forward(self, images: Tensor) -> Tensor:
        words = self.vocabulary
        height, width = (side - self.patch + 1 for side in images.shape[-2:])
        patches = self._patches(images)
        # The nearest word is the one with the largest wᵀx − ‖w‖² / 2.
        nearest = (patches @ words.T - words.square().sum(dim=1) / 2).argmax(dim=2).view(-1, height, width)
        maps = F.one_hot(nearest, len(words)).permute(0, 3, 1, 2).float()
        return F.adaptive_avg_pool2d(maps, 2).sqrt().flatten(1)

    def prepare(self, images: Tensor) -> None:
        """Cluster patches of normalised training images (N, 3, H, W)."""
        views = images.float().unfold(2, self.patch, 1).unfold(3, self.patch, 1)  # views, not copies
        count, _, rows, columns = views.shape[:4]
        indices = [torch.randint(size, (_CLUSTERED_PATCHES,)) for size in (count, rows, columns)]
        patches = views[indices[0], :, indices[1], indices[2]].flatten(1)
        self.vocabulary.copy_(clustered(_normalised_contrast(patches), len(self.vocabulary)))

    def _patches(self, images: Tensor) -> Tensor:
        return _normalised_contrast(F.unfold(images.float(), self.patch).transpose(1, 2))


_CLUSTERED_PATCHES = 50_000


def _normalised_contrast(patches: Tensor) -> Tensor:
    """Subtract the mean of each patch (…, D) and divide by about its standard deviation."""
    patches = patches - patches.mean(dim=-1, keepdim=True)
    return patches / (patches.std(dim=-1, keepdim=True) + 0.1)


def _above_0(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number above 0")
    return value


class LinearOnFeatures(nn.Module):
    """A linear classifier on `features`: colour_histogram, hog, visual_words, or pixels.

    args: arguments of the features, such as bins=8. ValueError for an unknown name or a bad argument.
    """

    def __init__(self, num_classes: int, *, image_size: tuple[int, int], features: str = "hog", **args: int) -> None:
        super().__init__()
        if features == "pixels":
            if args:
                raise ValueError(f"features='pixels' takes no arguments: remove {', '.join(args)}")
            self.features: nn.Module = nn.Flatten()
            size = 3 * image_size[0] * image_size[1]
        else:
            self.features = pick("features", features, FEATURES)(image_size, **args)
            size = int(self.features.size)  # type: ignore[arg-type]
        self.head = nn.Linear(size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) of the `image_size` it was built for → logits (N, num_classes)."""
        return self.head(self.features(images))

    def prepare(self, images: Tensor) -> None:
        """Call `prepare` of the features, if they have it, with normalised training images (N, 3, H, W)."""
        if hasattr(self.features, "prepare"):
            self.features.prepare(images)  # type: ignore[operator]


FEATURES = {"colour_histogram": ColourHistogram, "hog": HoG, "visual_words": VisualWords}
