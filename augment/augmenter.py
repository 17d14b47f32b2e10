"""`Augmenter`: apply a policy with a seed to images, texts, masks and boxes."""

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
from refract.augment.resize_libraries import REFRACT, check_interpolation
from refract.augment.targets import move_boxes, move_mask
from refract.augment.text.ops import run as run_text

if TYPE_CHECKING:
    import torch

_MAX_DRAWS = 1000


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
        interpolation: str = REFRACT,
    ) -> None:
        """Load the policy and check the options. ValueError names a bad option; PolicyError, a ValueError, an invalid policy.

        policy: see `load_policy`.
        size: pixels of every result, (height, width) or the side of a square; None keeps the size that the policy produces.
        output: `uint8` (H×W×3), `uint8_chw` (3×H×W), or `float32` (3×H×W, normalised: (x / 255 − mean) / std).
        channels: 3 for RGB, 1 for luma.
        mean, std: per channel, in 0…1, for `float32` only; None takes ImageNet's.
        color_profile: `convert` converts encoded and Pillow images to sRGB by their embedded profile; `ignore` does not.
        interpolation: what resamples crops and scaling inside the image: `refract`, `pillow` or `torchvision`, see
        `refract.augment.resize_libraries`. Rotations, shears, views that show the border and bicubic ops are always Refract's.
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
        check_interpolation(interpolation)
        self.interpolation = interpolation

    @property
    def mixes(self) -> bool:
        """Whether the policy mixes the samples of a batch (MixUp, CutMix)."""
        return self.policy.mixes

    @property
    def texts(self) -> bool:
        """Whether the policy changes texts."""
        return self.policy.texts

    def text(self, text: str, *, epoch: int, index: int, repeat: int = 0) -> str:
        """Augment the text of the sample `index` in `epoch`. Its draws are independent of those of its image.

        repeat: see `__call__`. ValueError if a third-party text augmenter fails.
        """
        return run_text(self.policy.draw_text(seed=self.seed, epoch=epoch, index=index, repeat=repeat), text)

    def __call__(
        self, image: ImageInput, *, epoch: int, index: int, repeat: int = 0, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the augmented image in the `output` format, by default uint8 H×W×3. The input is not changed.

        image: encoded bytes, a Pillow image, or a uint8 array H×W×3. Grey (H×W, H×W×1) and RGBA (H×W×4) become RGB as in `decode`.
        repeat: number of this draw of the sample in the epoch, from 0, for repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335).
        out: an array that receives the result, such as `batch[i]`.
        Raises ImageError as `decode` does.
        """
        data = read_image(image, color_profile=self.color_profile)
        size = input_size(data)
        return self.output(self._apply(self.draw(size, epoch=epoch, index=index, repeat=repeat), data, size), out)

    def draw(self, size: tuple[int, int], *, epoch: int, index: int, repeat: int = 0) -> Plan:
        """Draw the plan of the sample `index` in `epoch` for an image of `size` (height, width). repeat: see `__call__`."""
        plan = self.policy.draw(size, seed=self.seed, epoch=epoch, index=index, to=self.size, repeat=repeat)
        return plan if self.interpolation == REFRACT else replace(plan, interpolation=self.interpolation)

    def views(self, image: ImageInput, *, epoch: int, index: int, repeat: int = 0) -> np.ndarray:
        """Return three views of one image for a consistency loss, stacked, by default uint8 3×H×W×3.

        The first view omits the policy's AugMix; the other two use one draw of AugMix each. All other ops are drawn once and are equal in
        the three views. Source: Hendrycks et al. 2020, arXiv:1912.02781, section 3.
        """
        data = read_image(image, color_profile=self.color_profile)
        size = input_size(data)
        plan = self.draw(size, epoch=epoch, index=index, repeat=repeat)
        count = sum(step.op == "AugMix" for step in plan.steps)
        redrawn: list[Step] = []
        for attempt in range(1, _MAX_DRAWS):  # with p < 1, some draws contain no AugMix
            if len(redrawn) >= count:
                break
            other = self.draw(size, epoch=epoch, index=index, repeat=repeat + (attempt << 32))
            redrawn += [step for step in other.steps if step.op == "AugMix"]
        replacements = iter(redrawn)
        clean = tuple(step for step in plan.steps if step.op != "AugMix")
        second = tuple(next(replacements, step) if step.op == "AugMix" else step for step in plan.steps)
        plans = (replace(plan, steps=steps) for steps in (clean, plan.steps, second))
        return np.stack([self.output(self._apply(view, data, size)) for view in plans])

    def apply(self, plan: Plan, image: ImageInput, *, out: np.ndarray | None = None) -> np.ndarray:
        """Apply a plan to the image that it was drawn for. image, out: see `__call__`. Batch ops are not applied: see `mix`.

        JPEG bytes are decoded only where the plan reads them, at the smallest sufficient scale of 1, 1/2, 1/4 and 1/8.
        At full scale the result equals that of the decoded array within one grey level. At a reduced scale, single values may differ by
        20 in fine detail; on photos the mean differs by less than one.
        ValueError if the image has another size, or if the plan's arguments do not fit its ops.
        """
        data = read_image(image, color_profile=self.color_profile)
        size = input_size(data)
        if size != plan.size:
            raise ValueError(
                f"the plan was drawn for {plan.size[0]}×{plan.size[1]} pixels, the image has {size[0]}×{size[1]}"
            )
        with _plan_errors(plan):
            result = self._apply(plan, data, size)
        return self.output(result, out)

    def apply_mask(self, plan: Plan, mask: np.ndarray, *, fill: int = 0) -> np.ndarray:
        """Apply a plan's geometric steps to the mask of its image: see `refract.augment.targets.move_mask`."""
        with _plan_errors(plan):
            return move_mask(plan, mask, fill=fill)

    def apply_boxes(self, plan: Plan, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Apply a plan's geometric steps to the boxes of its image: see `refract.augment.targets.move_boxes`."""
        with _plan_errors(plan):
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

        images: N×3×H×W, any dtype, values in 0…255. targets: float N×C (one-hot, soft or multi-label).
        indices: the dataset index of each sample. repeats: the number of each sample's draw (see `__call__`); None for 0.
        Returns (images, targets), new tensors where mixed; MixUp returns float32 images. The inputs are not changed.
        ValueError if the lengths differ.
        """
        from refract.augment.executors import torch_batch

        size = (images.shape[-2], images.shape[-1])
        # `tolist` synchronises once with a GPU; reading item by item would synchronise for each sample.
        numbers = indices if isinstance(indices, Sequence) else indices.tolist()
        draws = (
            [0] * len(numbers) if repeats is None else repeats if isinstance(repeats, Sequence) else repeats.tolist()
        )
        if not len(numbers) == len(draws) == len(images):
            raise ValueError(
                f"got {len(images)} images, {len(numbers)} indices, {len(draws)} repeats; pass one of each per image"
            )
        plans = [
            self.policy.draw_mixing(size, seed=self.seed, epoch=epoch, index=int(i), repeat=int(k))
            for i, k in zip(numbers, draws, strict=True)
        ]
        return torch_batch.mix(plans, images, targets)

    def _apply(self, plan: Plan, image: bytes | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        passes = fuse(plan)
        if isinstance(image, np.ndarray):
            return cpu.run(passes, image)
        return encoded.run(passes, image, size, color_profile=self.color_profile)


@contextmanager
def _plan_errors(plan: Plan) -> Iterator[None]:
    """Convert the errors of a plan whose arguments do not fit its ops to a ValueError that shows the plan."""
    try:
        yield
    except (LookupError, TypeError, ArithmeticError, RecursionError, MemoryError, cv2.error) as error:
        raise ValueError(
            f"the plan cannot be applied: its arguments do not fit its ops ({error!r}): {plan.to_json()[:200]}"
        ) from error
