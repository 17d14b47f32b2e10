"""The batch executor on images of different sizes: each result equals that of the image alone, which other tests compare with the CPU."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_augment_ops import make_image

from refract.augment import Augmenter
from refract.augment.executors import torch_batch
from refract.augment.plan import Plan

SIZE = (24, 20)
POLICIES = {
    "crop first": ["HorizontalFlip", {"RandomResizedCrop": {"size": 24, "scale": [0.1, 1.0]}}, {"ColorJitter": {}}],
    "a view beyond the border": [{"Affine": {"degrees": 40, "fill": [200, 30, 90]}}],
    "reflected borders": [{"Rotate": {"degrees": 40, "border": "reflect101"}}, {"Rotate": {"border": "reflect"}}],
    "perspective": ["Perspective", {"RandomErasing": {}}],
    "bicubic": [{"RandomResizedCrop": {"size": 24, "interpolation": "bicubic"}}],
    "colours before the crop": ["AutoContrast", {"ColorJitter": {"hue": 0.1}}, {"RandomCrop": {"size": 16}}],
    "blended chains": ["AugMix"],
}


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def drawn(policy: list, sizes: list[tuple[int, int]], seed: int = 0) -> tuple[list[Plan], list[np.ndarray]]:
    augmenter = Augmenter(policy, seed=seed, size=SIZE)
    plans = [augmenter.draw(size, epoch=0, index=index) for index, size in enumerate(sizes)]
    return plans, [make_image(*size, number) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("name", POLICIES)
@given(
    sizes=st.lists(st.tuples(st.integers(9, 130), st.integers(9, 130)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_an_image_does_not_depend_on_the_sizes_of_the_others(
    name: str, sizes: list[tuple[int, int]], seed: int
) -> None:
    sizes = [*sizes, sizes[0]]  # two of one size, which run together
    plans, images = drawn(POLICIES[name], sizes, seed)
    before = [image.copy() for image in images]
    together = torch_batch.run(plans, [tensor(image) for image in images])
    assert together.shape == (len(sizes), 3, *SIZE) and together.dtype == torch.uint8
    for plan, image, result in zip(plans, images, together, strict=True):
        alone = torch_batch.run([plan], tensor(image)[None])[0]
        assert (
            alone.int() - result.int()
        ).abs().float().mean() <= 0.2  # 0 on one processor; others may round differently
    assert all(np.array_equal(image, copy) for image, copy in zip(images, before, strict=True))


def test_a_plan_for_another_size_is_named() -> None:
    plans, images = drawn(["HorizontalFlip"], [(30, 40), (50, 20)])
    with pytest.raises(ValueError, match=r"plan 1 was drawn for \(50, 20\), its image has \(30, 40\)"):
        torch_batch.run(plans, [tensor(images[0])] * 2)


def test_other_tensors_are_rejected() -> None:
    plans, images = drawn(["HorizontalFlip"], [(30, 40)])
    for wrong, message in (
        ([], "an image for each of 1 plans, got 0 images"),
        ([tensor(images[0]).float()], "image 0: expected uint8 3×H×W, got torch.float32 (3, 30, 40)"),
        ([torch.from_numpy(images[0])], "image 0: expected uint8 3×H×W, got torch.uint8 (30, 40, 3)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            torch_batch.run(plans, wrong)
