"""The batch executor on a GPU gives the images of the CPU executor."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_augment_ops import ALONE, make, make_image

from refract.augment import Augmenter
from refract.augment.executors import torch_batch
from refract.augment.registry import OPS

pytestmark = pytest.mark.gpu

COUNT = 6


@pytest.mark.parametrize("name", ALONE)
def test_an_op_gives_the_images_of_the_cpu_executor(name: str, device: str) -> None:
    if name == "ThirdPartyTransform" and not find_spec("albumentations"):
        pytest.skip(
            "albumentations is not among the packages of make gpu-wheels, and ThirdPartyTransform wraps its transforms"
        )
    augmenter = Augmenter(make(name), seed=9, size=(24, 28) if OPS[name].kind in ("geometric", "composition") else None)
    images = [make_image(90, 70, number) for number in range(COUNT)]
    plans = [augmenter.draw((90, 70), epoch=0, index=number) for number in range(COUNT)]
    expected = np.stack([augmenter.apply(plan, image) for plan, image in zip(plans, images, strict=True)])
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
    before = stacked.clone()
    result = torch_batch.run(plans, stacked)
    assert result.device == stacked.device and result.dtype == torch.uint8
    assert torch.equal(stacked, before), "the input is not changed"
    difference = np.abs(expected.astype(int) - result.permute(0, 2, 3, 1).cpu().numpy()).mean((1, 2, 3))
    assert difference.max() <= 1.0


def test_samples_with_different_ops_share_a_batch(device: str) -> None:
    policy = [
        "HorizontalFlip",
        {"RandomResizedCrop": {"size": 64}},
        {"ColorJitter": {"brightness": 0.5, "hue": 0.1, "p": 0.5}},
        {"Affine": {"degrees": 40, "p": 0.5}},
        {"RandomErasing": {}},
    ]
    augmenter = Augmenter(policy, seed=2)
    images = [make_image(96, 80, number) for number in range(24)]
    plans = [augmenter.draw((96, 80), epoch=0, index=number) for number in range(24)]
    result = torch_batch.run(plans, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device))
    for plan, image, actual in zip(plans, images, result.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        assert np.abs(augmenter.apply(plan, image).astype(int) - actual).mean() <= 1.0


@pytest.mark.parametrize("policy", [["MixUp"], ["CutMix"], [{"CutMix": {"p": 0.5}}, {"MixUp": {"p": 0.5}}]])
def test_mixing_gives_the_images_and_targets_of_the_cpu(policy: list, device: str) -> None:
    count = 16
    images = torch.from_numpy(np.stack([make_image(32, 32, number) for number in range(count)])).permute(0, 3, 1, 2)
    targets = torch.eye(count)
    augmenter = Augmenter(policy, seed=3)
    expected, expected_targets = augmenter.mix(images, targets, epoch=1, indices=range(count))
    mixed, mixed_targets = augmenter.mix(images.to(device), targets.to(device), epoch=1, indices=range(count))
    torch.testing.assert_close(mixed.cpu().float(), expected.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(mixed_targets.cpu(), expected_targets, atol=1e-6, rtol=0)
