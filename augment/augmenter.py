"""`Augmenter`: a policy and a seed, applied to pictures."""

from collections.abc import Sequence
from dataclasses import replace
from operator import index as index_of
from typing import TYPE_CHECKING

import cv2
import numpy as np

from augment import cpu, encoded
from augment.decode import ImageError, image_size
from augment.fuse import fuse
from augment.ops.op import pixels
from augment.ops.text import run as run_text
from augment.plan import Plan, Step
from augment.policy import Policy, PolicySpec, load_policy

if TYPE_CHECKING:
    import torch

_ATTEMPTS = 1000


class Augmenter:
    """Draw a plan for a sample and apply it.

    The result is a pure function of (policy, seed, epoch, index, picture): the same in any process, thread, order or batch.
    """

    def __init__(
        self, policy: Policy | PolicySpec, seed: int = 0, *, size: int | tuple[int, int] | None = None
    ) -> None:
        """policy: see `load_policy`. size: pixels, (height, width) or one side of a square, that every result shall have; None leaves
        it to the policy. ValueError (PolicyError) for a policy that cannot be read."""
        self.policy = load_policy(policy)
        try:
            self.seed = index_of(seed)
        except TypeError as error:
            raise ValueError(f"seed: {seed!r} is not a whole number") from error
        self.size = None if size is None else pixels("size", size)

    @property
    def mixes(self) -> bool:
        """Whether the policy mixes the samples of a batch (MixUp, CutMix)."""
        return self.policy.mixes

    @property
    def texts(self) -> bool:
        """Whether the policy changes texts."""
        return self.policy.texts

    def text(self, text: str, *, epoch: int, index: int, repeat: int = 0) -> str:
        """The augmented text of the sample `index` in `epoch`; drawn apart from its picture. repeat: as for a call. ValueError where an
        augmenter of another library fails on it."""
        return run_text(self.policy.draw_text(seed=self.seed, epoch=epoch, index=index, repeat=repeat), text)

    def __call__(self, image: bytes | np.ndarray, *, epoch: int, index: int, repeat: int = 0) -> np.ndarray:
        """The augmented picture, uint8 H×W×3. image: encoded bytes or a uint8 H×W×3 array, which is not changed. ImageError as `decode`.

        repeat: which of the sample's draws in this epoch, for repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335).
        """
        size = _size_of(image)
        return _applied(self.draw(size, epoch=epoch, index=index, repeat=repeat), image, size)

    def draw(self, size: tuple[int, int], *, epoch: int, index: int, repeat: int = 0) -> Plan:
        """The plan for the sample `index` in `epoch`, a picture of `size` (height, width). repeat: as for a call."""
        return self.policy.draw(size, seed=self.seed, epoch=epoch, index=index, to=self.size, repeat=repeat)

    def views(self, image: bytes | np.ndarray, *, epoch: int, index: int, repeat: int = 0) -> np.ndarray:
        """Three views of one picture for a consistency loss, uint8 3×H×W×3: without the policy's AugMix, and with two draws of it.

        All other ops are drawn once and are the same in the three. Source: Hendrycks et al. 2020, arXiv:1912.02781, section 3.
        """
        size = _size_of(image)
        plan = self.draw(size, epoch=epoch, index=index, repeat=repeat)
        count = sum(step.op == "AugMix" for step in plan.steps)
        again: list[Step] = []
        for attempt in range(1, _ATTEMPTS):  # where AugMix has a p below 1, some draws are without it
            if len(again) >= count:
                break
            other = self.draw(size, epoch=epoch, index=index, repeat=repeat + (attempt << 32))
            again += [step for step in other.steps if step.op == "AugMix"]
        drawn = iter(again)
        clean = tuple(step for step in plan.steps if step.op != "AugMix")
        second = tuple(next(drawn, step) if step.op == "AugMix" else step for step in plan.steps)
        return np.stack([_applied(replace(plan, steps=own), image, size) for own in (clean, plan.steps, second)])

    def apply(self, plan: Plan, image: bytes | np.ndarray) -> np.ndarray:
        """Apply a plan to the picture it was drawn for. ValueError if the picture has another size.

        From JPEG bytes only the part that the plan reads is decoded, at the smallest of the scales 1, 1/2, 1/4 and 1/8 that feeds
        it: at the full scale the result is that of the decoded array within one grey level, at another single values may differ by 20
        where there is fine detail, the mean by less than one on photos. ValueError too for a plan whose numbers do not fit its
        ops. Steps that mix a batch are not applied: see `mix`.
        """
        size = _size_of(image)
        if size != plan.size:
            raise ValueError(
                f"the plan was drawn for {plan.size[0]}×{plan.size[1]} pixels, the picture has {size[0]}×{size[1]}"
            )
        try:
            return _applied(plan, image, size)
        except (LookupError, TypeError, ArithmeticError, RecursionError, MemoryError, cv2.error) as error:
            raise ValueError(
                f"the plan cannot be applied, its numbers do not fit its ops ({error!r}): {plan.to_json()[:200]}"
            ) from error

    def mix(
        self,
        images: "torch.Tensor",
        targets: "torch.Tensor",
        *,
        epoch: int,
        indices: "Sequence[int] | torch.Tensor",
        repeats: "Sequence[int] | torch.Tensor | None" = None,
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Apply the policy's batch ops (MixUp, CutMix) to a batch on any device.

        images: N×3×H×W, any dtype in 0…255; targets: float N×C (one-hot, soft or multi-label); indices: of the N samples; repeats:
        which of its draws each is, None for the first. Returns both, new where mixed; images become float32 where MixUp blended them.
        Neither input is changed. ValueError where their lengths differ.
        """
        from augment import batch

        size = (images.shape[-2], images.shape[-1])
        # A tensor is read back at once: item by item a GPU would be waited for each time.
        numbers = indices if isinstance(indices, Sequence) else indices.tolist()
        draws = (
            [0] * len(numbers) if repeats is None else repeats if isinstance(repeats, Sequence) else repeats.tolist()
        )
        if not len(numbers) == len(draws) == len(images):
            raise ValueError(f"{len(images)} pictures, but {len(numbers)} indices and {len(draws)} repeats")
        plans = [
            self.policy.draw_mixing(size, seed=self.seed, epoch=epoch, index=int(i), repeat=int(k))
            for i, k in zip(numbers, draws, strict=True)
        ]
        return batch.mix(plans, images, targets)


def _applied(plan: Plan, image: bytes | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    passes = fuse(plan)
    return cpu.run(passes, image) if isinstance(image, np.ndarray) else encoded.run(passes, image, size)


def _size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    if isinstance(image, bytes):
        return image_size(image)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"expected encoded bytes or a uint8 array H×W×3, got {type(image).__name__}; np.asarray(image.convert('RGB')) is that of a "
            "Pillow image, bytes(data) that of a buffer"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"expected a uint8 array H×W×3, got {image.dtype} {'×'.join(map(str, image.shape))}")
    return image.shape[0], image.shape[1]
