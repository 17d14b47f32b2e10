"""`Augmenter`: a policy and a seed, applied to images, masks and boxes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import index as index_of
from typing import TYPE_CHECKING

import cv2
import numpy as np

from refract.augment.decoding.color_profiles import check_color_profile
from refract.augment.executors import cpu, encoded
from refract.augment.fuse import fuse
from refract.augment.inputs import ImageInput, input_size, read_image
from refract.augment.ops.base import pixels
from refract.augment.output import Numbers, OutputFormat
from refract.augment.plan import Plan, Step
from refract.augment.policy import Policy, PolicySpec, load_policy
from refract.augment.targets import move_boxes, move_mask
from refract.augment.text.ops import run as run_text

if TYPE_CHECKING:
    import torch

_ATTEMPTS = 1000


class Augmenter:
    """Draw a plan for a sample and apply it.

    The result is a pure function of (policy, seed, epoch, index, image): the same in any process, thread, order or batch.
    """

    def __init__(
        self,
        policy: Policy | PolicySpec,
        seed: int = 0,
        *,
        size: int | tuple[int, int] | None = None,
        output: str = "uint8",
        channels: int = 3,
        mean: Numbers | None = None,
        std: Numbers | None = None,
        color_profile: str = "ignore",
    ) -> None:
        """policy: see `load_policy`. size: pixels, (height, width) or one side of a square, that every result shall have; None leaves
        it to the policy. ValueError (PolicyError) for a policy that cannot be read.

        output: the form of the result: `uint8` (H×W×3), `uint8_chw` (3×H×W), or `float32` (3×H×W, normalised: (x / 255 − mean) / std).
        channels: 1 gives luma in place of RGB. mean, std: for `float32`, of each channel in 0…1; None takes ImageNet's.
        color_profile: convert takes encoded and Pillow images to sRGB by their embedded profile, ignore does not.
        """
        self.policy = load_policy(policy)
        try:
            self.seed = index_of(seed)
        except TypeError as error:
            raise ValueError(f"seed: {seed!r} is not a whole number") from error
        self.size = None if size is None else pixels("size", size)
        self.output = OutputFormat(output, channels, mean, std)
        check_color_profile(color_profile)
        self.color_profile = color_profile

    @property
    def mixes(self) -> bool:
        """Whether the policy mixes the samples of a batch (MixUp, CutMix)."""
        return self.policy.mixes

    @property
    def texts(self) -> bool:
        """Whether the policy changes texts."""
        return self.policy.texts

    def text(self, text: str, *, epoch: int, index: int, repeat: int = 0) -> str:
        """The augmented text of the sample `index` in `epoch`; drawn apart from its image. repeat: as for a call. ValueError where an
        augmenter of another library fails on it."""
        return run_text(self.policy.draw_text(seed=self.seed, epoch=epoch, index=index, repeat=repeat), text)

    def __call__(
        self, image: ImageInput, *, epoch: int, index: int, repeat: int = 0, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The augmented image in the form of `output`, by default uint8 H×W×3. The input is not changed. ImageError as `decode`.

        image: encoded bytes, a Pillow image, or a uint8 array H×W×3; grey (H×W, H×W×1) and RGBA (H×W×4) are converted as by `decode`.
        repeat: which of the sample's draws in this epoch, for repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335).
        out: an array to write the result into, such as `batch[i]`.
        """
        data = read_image(image, color_profile=self.color_profile)
        size = input_size(data)
        return self.output(self._applied(self.draw(size, epoch=epoch, index=index, repeat=repeat), data, size), out)

    def draw(self, size: tuple[int, int], *, epoch: int, index: int, repeat: int = 0) -> Plan:
        """The plan for the sample `index` in `epoch`, an image of `size` (height, width). repeat: as for a call."""
        return self.policy.draw(size, seed=self.seed, epoch=epoch, index=index, to=self.size, repeat=repeat)

    def views(self, image: ImageInput, *, epoch: int, index: int, repeat: int = 0) -> np.ndarray:
        """Three views of one image for a consistency loss, stacked, uint8 3×H×W×3 by default.

        The first is without the policy's AugMix, the others are with two draws of it. All other ops are drawn once and are the same in the
        three. Source: Hendrycks et al. 2020, arXiv:1912.02781, section 3.
        """
        data = read_image(image, color_profile=self.color_profile)
        size = input_size(data)
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
        plans = (replace(plan, steps=own) for own in (clean, plan.steps, second))
        return np.stack([self.output(self._applied(own, data, size)) for own in plans])

    def apply(self, plan: Plan, image: ImageInput, *, out: np.ndarray | None = None) -> np.ndarray:
        """Apply a plan to the image it was drawn for. ValueError if the image has another size. image, out: as for a call.

        From JPEG bytes only the part that the plan reads is decoded, at the smallest of the scales 1, 1/2, 1/4 and 1/8 that feeds
        it: at the full scale the result is that of the decoded array within one grey level, at another single values may differ by 20
        where there is fine detail, the mean by less than one on photos. ValueError too for a plan whose numbers do not fit its
        ops. Steps that mix a batch are not applied: see `mix`.
        """
        data = read_image(image, color_profile=self.color_profile)
        size = input_size(data)
        if size != plan.size:
            raise ValueError(
                f"the plan was drawn for {plan.size[0]}×{plan.size[1]} pixels, the image has {size[0]}×{size[1]}"
            )
        with _fitting(plan):
            result = self._applied(plan, data, size)
        return self.output(result, out)

    def apply_mask(self, plan: Plan, mask: np.ndarray, *, fill: int = 0) -> np.ndarray:
        """Apply a plan's geometric part to the mask of its image: see `refract.augment.targets.move_mask`."""
        with _fitting(plan):
            return move_mask(plan, mask, fill=fill)

    def apply_boxes(self, plan: Plan, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Apply a plan's geometric part to the boxes of its image: see `refract.augment.targets.move_boxes`."""
        with _fitting(plan):
            return move_boxes(plan, boxes)

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
        from refract.augment.executors import torch_batch

        size = (images.shape[-2], images.shape[-1])
        # A tensor is read back at once: item by item a GPU would be waited for each time.
        numbers = indices if isinstance(indices, Sequence) else indices.tolist()
        draws = (
            [0] * len(numbers) if repeats is None else repeats if isinstance(repeats, Sequence) else repeats.tolist()
        )
        if not len(numbers) == len(draws) == len(images):
            raise ValueError(f"{len(images)} images, but {len(numbers)} indices and {len(draws)} repeats")
        plans = [
            self.policy.draw_mixing(size, seed=self.seed, epoch=epoch, index=int(i), repeat=int(k))
            for i, k in zip(numbers, draws, strict=True)
        ]
        return torch_batch.mix(plans, images, targets)

    def _applied(self, plan: Plan, image: bytes | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        passes = fuse(plan)
        if isinstance(image, np.ndarray):
            return cpu.run(passes, image)
        return encoded.run(passes, image, size, color_profile=self.color_profile)


@contextmanager
def _fitting(plan: Plan) -> Iterator[None]:
    """Turn what a plan raises whose numbers do not fit its ops into a ValueError that shows it."""
    try:
        yield
    except (LookupError, TypeError, ArithmeticError, RecursionError, MemoryError, cv2.error) as error:
        raise ValueError(
            f"the plan cannot be applied, its numbers do not fit its ops ({error!r}): {plan.to_json()[:200]}"
        ) from error
