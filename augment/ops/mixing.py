"""Ops that mix each sample with another sample of its batch, images and targets alike. Only the batch executor runs them.

Each sample draws its own mixing weight `lam` and its partner: `partner` in [0, 1) selects one of the *other* samples of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from refract.augment.on_device import on_device
from refract.augment.ops.base import Args, Op, Size, number

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class MixOp(Op):
    """alpha: both parameters of the Beta distribution of `lam`, the weight of the sample itself; positive."""

    kind: ClassVar[str] = "batch"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if number("alpha", self.alpha, 0, 1e6) == 0:
            raise ValueError("alpha: 0 is not positive; remove the op or set p: 0 to disable mixing")

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"lam": float(rng.beta(self.alpha, self.alpha)), "partner": float(rng.random())}

    @staticmethod
    def on_batch(
        args: Sequence[Args], images: "torch.Tensor", partners: "torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return (new images, (N,) float32 weight of each sample itself). partners: (N, C, H, W), the partner image of each sample."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MixUp(MixOp):
    """Blend each image with its partner: lam · x + (1 − lam) · partner. Returns float32 in 0…255, not rounded.

    Source: Zhang et al. 2018, arXiv:1710.09412, section 2. Deviation: one lam and partner per sample, not per batch.
    """

    alpha: float = 0.2

    @staticmethod
    def on_batch(
        args: Sequence[Args], images: "torch.Tensor", partners: "torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        import torch

        lam = on_device([a["lam"] for a in args], images.device, torch.float32)
        return partners.float().lerp(images.float(), lam.view(-1, 1, 1, 1)), lam


@dataclass(frozen=True, kw_only=True)
class CutMix(MixOp):
    """Paste a box of the partner image at a uniform centre.

    The box covers a fraction 1 − lam of the area. The image's edge clips it, so lam becomes the fraction that remains visible.
    Source: Yun et al. 2019, arXiv:1905.04899, section 3. Deviation: one box and partner per sample, not per batch.
    """

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {**super().draw(rng, size), "centre": [float(rng.random()), float(rng.random())]}

    @staticmethod
    def on_batch(
        args: Sequence[Args], images: "torch.Tensor", partners: "torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        import torch

        height, width = images.shape[-2:]
        boxes = on_device([_paste_box(a, height, width) for a in args], images.device, torch.int64)
        top, left, bottom, right = boxes.view(-1, 4, 1, 1).unbind(1)
        rows = torch.arange(height, device=images.device).view(1, -1, 1)
        columns = torch.arange(width, device=images.device).view(1, 1, -1)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        lam = 1 - inside.float().mean((1, 2))
        return torch.where(inside.unsqueeze(1), partners, images), lam


def _paste_box(args: Args, height: int, width: int) -> list[int]:
    """Return the box as [top, left, bottom, right), clipped at the image's edge."""
    side = (1 - args["lam"]) ** 0.5
    middle_y, middle_x = int(args["centre"][0] * height), int(args["centre"][1] * width)
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    return [
        max(middle_y - half_y, 0),
        max(middle_x - half_x, 0),
        min(middle_y + half_y, height),
        min(middle_x + half_x, width),
    ]


MIX: Mapping[str, type[MixOp]] = MappingProxyType({"MixUp": MixUp, "CutMix": CutMix})
