"""Base class of pixel ops: ops that are neither a geometric transform nor a colour map, and run their own kernels.

The batch methods take `images`, a uint8 tensor N×3×H×W on any device. The modules of pixel ops import torch inside functions only,
so that loader workers start without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from refract.augment.on_device import on_device
from refract.augment.ops.base import Args, Op
from refract.augment.plan import Step

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PixelOp(Op):
    """An op that computes new pixels from a whole image."""

    kind: ClassVar[str] = "pixel"

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        """Return a new uint8 H×W×3 array. `image` is not modified."""
        raise NotImplementedError

    @staticmethod
    def moves_pixels(args: Args) -> bool:
        """Whether the drawn op moves pixels in a way that the engine cannot apply to masks and boxes."""
        return False

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        """Return a new uint8 N×3×H×W tensor; args[i] belongs to sample i. `images` is not modified.

        This default copies the batch to the CPU and calls `on_image` for each sample.
        """
        import torch

        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        results = [cls.on_image(drawn, np.ascontiguousarray(image)) for drawn, image in zip(args, arrays, strict=True)]
        return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).to(images.device)


@dataclass(frozen=True, kw_only=True)
class BlendOp(Op):
    """An op that blends the image with the results of chains of other ops; each executor runs the chains itself."""

    kind: ClassVar[str] = "pixel"

    @staticmethod
    def chains(args: Args) -> tuple[float, list[tuple[float, tuple[Step, ...]]]]:
        """(the weight of the image, (weight, steps) of each chain) of a drawn op."""
        raise NotImplementedError


def cpu_only(op: type[Op]) -> bool:
    """Whether the batch executor copies the op's images to the CPU."""
    return issubclass(op, PixelOp) and op.on_batch.__func__ is PixelOp.on_batch.__func__  # type: ignore[attr-defined]


def to_uint8(values: "torch.Tensor") -> "torch.Tensor":
    """Round and clip float values to uint8. Modifies `values`."""
    import torch

    return values.round_().clamp_(0, 255).to(torch.uint8)


def column(images: "torch.Tensor", values: Sequence[float]) -> "torch.Tensor":
    """Return one float32 value per sample, shape N×1×1×1, on the device of `images`."""
    import torch

    return on_device(values, images.device, torch.float32).view(-1, 1, 1, 1)


def batch_stretch(table: np.ndarray, offsets: Sequence[int], like: "torch.Tensor", count: int) -> "torch.Tensor":
    """Read `count` consecutive table entries from each offset, as `refract.augment.random.stretch` does.

    Returns (N, count) on the device of `like`.
    """
    import torch

    source = _table_on(table, like.device)
    steps = torch.arange(count, device=like.device)
    starts = on_device(offsets, like.device).view(-1, 1)
    return source[(starts + steps) % table.size]


_tables: dict[tuple[int, str], "torch.Tensor"] = {}


def _table_on(table: np.ndarray, device: "torch.device") -> "torch.Tensor":
    """Return the table on the device. Each table is copied to each device once."""
    key = (id(table), str(device))
    if key not in _tables:
        _tables[key] = on_device(table, device)
    return _tables[key]
