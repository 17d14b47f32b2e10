"""MixUp and CutMix mix images and targets with the same weight, one weight per sample."""

import numpy as np
import pytest
import torch

from refract.augment import Augmenter
from refract.augment.executors import torch_batch

COUNT = 64
LEVELS = torch.arange(COUNT, dtype=torch.uint8) * 4
IMAGES = (
    LEVELS.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
)  # image i has the value 4·i: a pixel identifies its image
ONE_HOT = torch.eye(COUNT)


def mixed(policy: list, **more) -> tuple[torch.Tensor, torch.Tensor]:
    return Augmenter(policy, seed=3).mix(
        IMAGES, more.get("targets", ONE_HOT), epoch=more.get("epoch", 0), indices=range(COUNT)
    )


def test_mixup_blends_images_and_targets_alike() -> None:
    images, targets = mixed([{"MixUp": {"alpha": 1.0}}])
    expected = (targets * LEVELS.float()).sum(1)
    torch.testing.assert_close(images, expected.view(-1, 1, 1, 1).expand_as(images), atol=1e-3, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(COUNT))
    assert (targets.diagonal() < 1).all(), "no sample is its own partner"
    assert len({round(float(v), 4) for v in targets.diagonal()}) > COUNT // 2, "each sample has a separate weight"


def test_cutmix_weight_is_the_visible_area() -> None:
    images, targets = mixed(["CutMix"])
    assert images.dtype == torch.uint8
    for i in range(COUNT):
        visible = (images[i, 0] == LEVELS[i]).float().mean()
        torch.testing.assert_close(targets[i, i], visible, atol=1e-6, rtol=0)
        foreign = images[i, 0][images[i, 0] != LEVELS[i]]
        if foreign.numel():
            (partner,) = foreign.unique().tolist()
            torch.testing.assert_close(targets[i, partner // 4], 1 - visible, atol=1e-6, rtol=0)


def test_multi_label_targets_are_blended_not_normalised() -> None:
    targets = torch.ones(COUNT, 5)
    _, soft = mixed([{"MixUp": {"alpha": 1.0}}], targets=targets)
    torch.testing.assert_close(soft, targets)


def test_mixing_depends_only_on_the_key() -> None:
    torch.manual_seed(1)
    first = mixed(["CutMix"])[0]
    torch.manual_seed(2)
    np.random.seed(5)
    assert torch.equal(mixed(["CutMix"])[0], first)
    assert not torch.equal(mixed(["CutMix"], epoch=1)[0], first)


def test_inputs_are_not_changed_and_p_zero_mixes_nothing() -> None:
    images, targets = IMAGES.clone(), ONE_HOT.clone()
    mixed([{"MixUp": {}}, {"CutMix": {}}])
    assert torch.equal(IMAGES, images) and torch.equal(ONE_HOT, targets)
    same, soft = mixed([{"MixUp": {"p": 0.0}}])
    assert torch.equal(same, IMAGES) and torch.equal(soft, ONE_HOT)


def test_probability_one_half_mixes_half_of_the_samples() -> None:
    _, soft = mixed([{"MixUp": {"p": 0.5, "alpha": 1.0}}])
    untouched = int((soft.diagonal() == 1).sum())
    assert 18 <= untouched <= 46


def test_batch_of_one_sample_is_unchanged() -> None:
    augmenter = Augmenter(["CutMix"])
    images, targets = augmenter.mix(IMAGES[:1], ONE_HOT[:1], epoch=0, indices=[0])
    assert torch.equal(images, IMAGES[:1]) and torch.equal(targets, ONE_HOT[:1])


def test_class_indices_are_rejected() -> None:
    with pytest.raises(ValueError, match="targets: expected float N×C"):
        mixed(["MixUp"], targets=torch.arange(COUNT))


def test_plans_for_another_size_are_rejected() -> None:
    plan = Augmenter("none").draw((8, 8), epoch=0, index=0)
    with pytest.raises(ValueError, match=r"plan 0 was drawn for \(8, 8\)"):
        torch_batch.run([plan] * COUNT, IMAGES)


def test_repeats_of_a_sample_are_mixed_differently() -> None:
    augmenter, same = Augmenter(["MixUp"], seed=3), [5] * COUNT
    one, _ = augmenter.mix(IMAGES, ONE_HOT, epoch=0, indices=same)
    other, targets = augmenter.mix(IMAGES, ONE_HOT, epoch=0, indices=same, repeats=range(COUNT))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1:], other[1:])
    assert len({round(float(weight), 4) for weight in targets.diagonal()}) > COUNT // 2
    for numbers in ([1], range(COUNT + 1)):
        with pytest.raises(ValueError, match=f"got {COUNT} images, {len(numbers)} indices"):
            augmenter.mix(IMAGES, ONE_HOT, epoch=0, indices=numbers)
