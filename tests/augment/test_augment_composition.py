"""Composition ops choose by their documented rules; the published policies match their papers."""

from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2

from refract.augment import Augmenter, PolicyError, load_policy
from refract.augment.ops.published_policies import (
    _AUTO,
    _BUILDERS,
    _RAND,
    _TRIVIAL,
    _mix_strength,
    _rand_strength,
    _strength,
)
from refract.augment.plan import Plan, Step
from refract.augment.registry import OPS

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def drawn(policy, count: int = 3000, epoch: int = 0) -> list[tuple[str, ...]]:
    augmenter = Augmenter(policy, seed=1)
    return [tuple(step.op for step in augmenter.draw((60, 80), epoch=epoch, index=i).steps) for i in range(count)]


def test_one_of_by_weight() -> None:
    ops = [{"VerticalFlip": {"p": 1}}, {"Invert": {"p": 1}}, {"Grayscale": {"p": 1}}]
    counts = Counter(drawn([{"OneOf": {"ops": ops, "weights": [1, 3, 0]}}]))
    assert set(counts) == {("VerticalFlip",), ("Invert",)}
    assert 690 < counts[("VerticalFlip",)] < 810
    equal = Counter(drawn([{"OneOf": {"ops": ops}}]))
    assert len(equal) == 3 and min(equal.values()) > 900


def test_some_of_applies_each_op_at_most_once_and_in_order() -> None:
    ops = [{name: {"p": 1}} for name in ("VerticalFlip", "Invert", "Grayscale")]
    seen = Counter(drawn([{"SomeOf": {"ops": ops, "count": [1, 3]}}]))
    order = {"VerticalFlip": 0, "Invert": 1, "Grayscale": 2}
    assert all([order[name] for name in names] == sorted({order[name] for name in names}) for names in seen)
    lengths = Counter(len(names) for names in seen.elements())
    assert all(900 < lengths[count] < 1100 for count in (1, 2, 3))
    shuffled = set(drawn([{"SomeOf": {"ops": ops, "count": 3, "in_order": False}}]))
    assert len(shuffled) == 6


def test_compose_and_sometimes_apply_all_ops_or_none() -> None:
    pair = [{"VerticalFlip": {"p": 1}}, {"Invert": {"p": 1}}]
    assert set(drawn([{"Compose": {"ops": pair, "p": 0.5}}])) == {(), ("VerticalFlip", "Invert")}
    both = {"Sometimes": {"ops": pair, "otherwise": [{"Grayscale": {"p": 1}}], "p": 0.3}}
    counts = Counter(drawn([both]))
    assert (
        set(counts) == {("VerticalFlip", "Invert"), ("Grayscale",)} and 820 < counts[("VerticalFlip", "Invert")] < 980
    )


def test_during_switches_by_epoch() -> None:
    policy = [{"During": {"ops": [{"Invert": {"p": 1}}], "epochs": [2, 3]}}]
    assert [bool(drawn(policy, 1, epoch)[0]) for epoch in range(6)] == [False, False, True, True, False, False]
    endless = [{"During": {"ops": [{"Invert": {"p": 1}}], "epochs": [2, None]}}]
    assert [bool(drawn(endless, 1, epoch)[0]) for epoch in (1, 2, 900)] == [False, True, True]


def test_ramp_interpolates_from_the_first_to_the_last_parameters() -> None:
    ops = [
        {"CoarseDropout": {"holes": 1, "size": 0.1, "p": 1.0}},
        {"CoarseDropout": {"holes": 9, "size": 0.3, "p": 1.0}},
    ]
    augmenter = Augmenter([{"Ramp": {"ops": ops, "epochs": [2, 10]}}])
    holes = [len(augmenter.draw((60, 80), epoch=e, index=0).steps[0].args["boxes"]) for e in (0, 2, 6, 10, 50)]
    assert holes == [1, 1, 5, 9, 9]
    rare = [{"Invert": {"p": 0.0}}, {"Invert": {"p": 1.0}}]
    fractions = [
        sum(map(bool, drawn([{"Ramp": {"ops": rare, "epochs": [0, 4]}}], 1000, epoch))) / 1000 for epoch in range(5)
    ]
    assert fractions == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.05)


def test_crop_in_a_composition_op_sets_the_size_of_later_ops() -> None:
    crops = {"OneOf": {"ops": [{"RandomCrop": {"size": 20}}, {"CenterCrop": {"size": [30, 10]}}]}}
    augmenter = Augmenter([crops, {"CoarseDropout": {"size": 1.0, "holes": 1}}])
    for index in range(20):
        plan = augmenter.draw((60, 80), epoch=0, index=index)
        assert plan.steps[1].args["boxes"] == [[0, 0, *plan.steps[0].args["size"]]]
        assert (augmenter.apply(plan, IMAGE) == 0).all()


def test_mixup_or_cutmix() -> None:
    augmenter = Augmenter(
        [{"OneOf": {"ops": ["HorizontalFlip"]}}, {"OneOf": {"ops": ["MixUp", {"CutMix": {"alpha": 1.0}}]}}]
    )
    assert augmenter.mixes
    kinds = Counter(augmenter.policy.draw_mixing((8, 8), seed=0, epoch=0, index=i).steps[0].op for i in range(1000))
    assert min(kinds["MixUp"], kinds["CutMix"]) > 440
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    for labels in (torch.eye(4), torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]])):
        mixed, targets = augmenter.mix(images, labels, epoch=3, indices=range(4))
        assert mixed.shape == images.shape and targets.shape == labels.shape
        assert ((targets >= 0) & (targets <= 1)).all() and not torch.equal(targets, labels)


def test_draw_and_draw_mixing_agree() -> None:
    policy = load_policy(["HorizontalFlip", {"OneOf": {"ops": ["Invert"]}}, {"OneOf": {"ops": ["MixUp", "CutMix"]}}])
    for index in range(50):
        whole = policy.draw((9, 9), seed=4, epoch=1, index=index)
        part = policy.draw_mixing((9, 9), seed=4, epoch=1, index=index)
        assert [step for step in whole.steps if OPS[step.op].kind == "batch"] == list(part.steps)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([{"OneOf": {"ops": ["Invrt"]}}], r"op 1, OneOf: ops, op 1: no op is called 'Invrt'; did you mean Invert\?"),
        ([{"OneOf": {"ops": [{"Rotate": {"degrees": "x"}}]}}], "OneOf: ops, op 1, Rotate: degrees: 'x' is not a number"),
        ([{"OneOf": {"ops": []}}], "the list is empty; add at least one op"),
        ([{"OneOf": {"ops": ["MixUp", "Invert"]}}], "need separate lists"),
        ([{"OneOf": {"ops": ["Invert"], "weights": [1, 2]}}], "weights: expected 1 numbers"),
        ([{"OneOf": {"ops": ["Invert"], "weights": [0]}}], "all zero"),
        ([{"SomeOf": {"ops": ["Invert"], "count": 2}}], r"count: 2 is not a whole number or a pair \[low, high\] in \[0, 1\]"),
        ([{"During": {"ops": ["Invert"], "epochs": [3, 2]}}], "ends before it starts"),
        ([{"Ramp": {"ops": ["Invert", "Rotate"]}}], "two entries of the same op"),
        ([{"Ramp": {"ops": [{"GridMask": {"fill": 3}}, {"GridMask": {"fill": "mean"}}]}}], "only numbers may differ"),
        ([{"Shear": {"x": 60, "y": 60}}], "can collapse the image to a line"),
        ([{"Rot90": {"turns": [4]}}], "turns: "),
        ([{"AutoAugment": {"policy": "mnist"}}], "policy: 'mnist' is not one of imagenet, cifar10, svhn"),
        ({"exact": "yes", "ops": []}, "exact: 'yes' is neither true nor false"),
        ({"exakt": True, "ops": []}, r"no key 'exakt' .*did you mean exact\?"),
    ],
)  # fmt: skip
def test_invalid_policies_are_rejected(spec, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        load_policy(spec)


def test_policy_and_plans_preserve_exact() -> None:
    policy = load_policy({"exact": True, "ops": [{"Rotate": {"degrees": 9}}, {"Rotate": {"degrees": 9}}]})
    assert load_policy(policy.to_spec()) == policy
    augmenter = Augmenter(policy)
    plan = augmenter.draw((60, 80), epoch=0, index=0)
    assert plan.exact
    first, second = (Augmenter("none").apply(type(plan)(plan.size, (step,)), IMAGE) for step in plan.steps)
    in_turn = Augmenter("none").apply(type(plan)(plan.size, plan.steps[1:]), first)
    np.testing.assert_array_equal(augmenter.apply(plan, IMAGE), in_turn)
    assert not np.array_equal(second, in_turn)


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "svhn"])
def test_autoaugment_matches_torchvisions_table(name: str) -> None:
    policy = v2.AutoAugmentPolicy(name)
    theirs = v2.AutoAugment(policy)._policies
    ours = _AUTO[name]
    assert len(ours) == len(theirs) == 25
    for our_pair, their_pair in zip(ours, theirs, strict=True):
        for (op, p, level), (their_op, their_p, their_level) in zip(our_pair, their_pair, strict=True):
            assert (op, p) == (their_op, pytest.approx(their_p))
            assert level == (their_level or 0)


SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}
LEVELS = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, 2)  # 256×1×3: each grey level once


@pytest.mark.parametrize(
    ("scale", "reference", "bins"),
    [
        (_TRIVIAL, v2.TrivialAugmentWide, 31),
        (_RAND, v2.RandAugment, 31),
        (_RAND, v2.AutoAugment, 10),
    ],
)
def test_every_strength_matches_torchvision(scale, reference, bins: int) -> None:
    space = reference()._AUGMENTATION_SPACE
    assert set(scale) | {"Invert"} == set(space) | {"Invert", "Identity"}
    for op, (function, signed) in space.items():
        assert signed == (op in SIGNED)
        levels = function(bins, 200, 300)
        for level in range(bins) if levels is not None else ():
            wide = scale is _TRIVIAL
            actual = _strength(scale, op, level, 30) if wide else _rand_strength(op, level, bins - 1, (200, 300))
            expected = float(levels[level]) * (
                255 if op == "Solarize" else 1
            )  # torchvision stores a fraction of the range
            assert (round(actual) if op == "Posterize" else actual) == pytest.approx(expected, abs=1e-4), (op, level)


@pytest.mark.parametrize("op", ["Posterize", "Solarize"])
@pytest.mark.parametrize(("scale", "bins"), [(_TRIVIAL, 31), (_RAND, 31), (_RAND, 10)])
def test_each_grey_level_matches_torchvision_at_every_strength(op: str, scale, bins: int) -> None:
    reference = v2.TrivialAugmentWide() if scale is _TRIVIAL else v2.RandAugment()
    magnitudes = reference._AUGMENTATION_SPACE[op][0](bins, 8, 8)
    for level in range(bins):
        op_and_args = _BUILDERS[op](_strength(scale, op, level, bins - 1), (256, 1))
        assert op_and_args is not None
        ours = Augmenter("none").apply(Plan((256, 1), (Step(*op_and_args),)), LEVELS)
        magnitude = float(magnitudes[level])
        theirs = reference._apply_image_or_video_transform(
            torch.from_numpy(LEVELS).permute(2, 0, 1), op, magnitude, interpolation=None, fill={}
        )
        differs = np.flatnonzero((ours != theirs.permute(1, 2, 0).numpy()).any((1, 2)))
        # torchvision rounds a whole-level threshold up or down, depending on whether the input is a tensor or a Pillow image.
        assert op == "Solarize" or differs.size == 0
        assert np.abs(differs - 255 * magnitude).max(initial=0) < 1e-4, (op, level)


def test_shifts_truncate_to_whole_pixels_as_in_torchvision() -> None:
    for level in (0.9, -31.99, 27.2):
        step = _BUILDERS["TranslateX"](level, (40, 60))
        assert step is not None and step[1]["shift"] == [0.0, int(level) / 60]


@pytest.mark.parametrize(
    ("name", "fraction", "strength"),
    [
        ("Posterize", 0.24, 4), ("Posterize", 0.25, 3), ("Posterize", 0.99, 1), ("Posterize", 1.0, 1),
        ("Solarize", 0.3, 180), ("Solarize", 0.01, 254), ("Rotate", 0.29, 8), ("Rotate", 1.0, 30),
        ("ShearX", 0.29, 0.087), ("TranslateX", 0.3, 30), ("TranslateY", 0.299, 19), ("Equalize", 0.3, 0),
    ],
)  # fmt: skip
def test_augmix_strengths_match_the_authors_code(name: str, fraction: float, strength: float) -> None:
    """int(level · maximum / 10) of 4 bits, 256 levels, 30 degrees and a third of the side; level · 0.3 / 10 of the shear."""
    assert _mix_strength(name, fraction, (200, 300)) == pytest.approx(strength)


def test_augmix_posterises_as_rarely_as_the_authors_code() -> None:
    """At severity 3 a level of at least 2.5, drawn from [0.1, 3], removes a fifth bit: in 17 % of the draws."""
    augmenter = Augmenter([{"AugMix": {"severity": 3, "width": 6, "depth": 3}}], seed=1)
    plans = [augmenter.draw((64, 64), epoch=0, index=i) for i in range(800)]
    ops = [op for plan in plans for chain in plan.steps[0].args["chains"] for op in chain]
    bits = Counter(op["bits"] for op in ops if op["op"] == "Posterize")
    assert set(bits) == {3, 4} and bits[3] / bits.total() == pytest.approx(0.5 / 2.9, abs=0.03)
    assert all(op["angle"] == int(op["angle"]) for op in ops if op["op"] == "Rotate")


@pytest.mark.parametrize("name", ["TrivialAugmentWide", "RandAugment", "AutoAugment", "ThreeAugment", "AugMix"])
def test_every_op_of_a_published_policy_is_drawn_and_runs(name: str) -> None:
    augmenter = Augmenter([name], seed=3)
    plans = [augmenter.draw((60, 80), epoch=0, index=i) for i in range(400)]
    seen = {step.op for plan in plans for step in plan.steps}
    expected = {"TrivialAugmentWide": 11, "RandAugment": 11, "AutoAugment": 9, "ThreeAugment": 3, "AugMix": 1}
    assert len(seen) >= expected[name]
    for plan in plans[:60]:
        assert augmenter.apply(plan, IMAGE).shape == IMAGE.shape


def test_augmix_blends_its_chains() -> None:
    chains = [[{"op": "VerticalFlip"}], [{"op": "Invert"}, {"op": "VerticalFlip"}]]
    step = Step("AugMix", {"original_weight": 0.5, "weights": [0.75, 0.25], "chains": chains})
    result = Augmenter("none").apply(Plan((60, 80), (step,)), IMAGE)
    expected = 0.5 * IMAGE + 0.375 * IMAGE[::-1] + 0.125 * (255.0 - IMAGE[::-1])
    assert np.abs(result - expected).max() <= 0.51


def test_ramp_with_parameters_that_cannot_be_interpolated_is_rejected() -> None:
    with pytest.raises(PolicyError, match=r"cannot be interpolated in epoch 1: length: 1\.25 is not a whole number"):
        load_policy([{"Ramp": {"ops": [{"Cutout": {"length": 0.5}}, {"Cutout": {"length": 8}}], "epochs": [0, 10]}}])
