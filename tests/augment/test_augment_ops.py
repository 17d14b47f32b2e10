"""Every registered op satisfies the contract of `Op`. The tests run over the registry, so they cover a new op without an edit."""

import io
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refract.augment import Augmenter, Plan, Policy, Step
from refract.augment.executors import torch_batch
from refract.augment.registry import OPS

REQUIRED: dict[str, dict[str, Any]] = {
    "RandomCrop": {"size": [20, 24]},
    "Resize": {"size": [20, 24]},
    "RandomResizedCrop": {"size": [20, 24]},
    "CenterCrop": {"size": [20, 24]},
    "Pad": {"size": [50, 60]},
    "ShortestSide": {"size": 20},
    "LongestSide": {"size": 20, "interpolation": "bicubic"},
    "ThirdPartyTransform": {"transform": "albumentations.RandomGamma"},
    **{
        name: {"ops": ["VerticalFlip", {"Brightness": {"factor": 0.5}}]}
        for name in ("Compose", "Sometimes", "OneOf", "SomeOf", "During")
    },
    "Ramp": {"ops": [{"Rotate": {"degrees": 0}}, {"Rotate": {"degrees": 20}}]},
}
STRONG: dict[str, dict[str, Any]] = {
    "ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "Affine": {"degrees": 30, "translate": 0.2, "scale": [0.6, 1.6], "shear": 20, "fill": [10, 200, 30]},
    "Rotate": {"degrees": 180, "border": "reflect"},
    "PadAndCrop": {"padding": 6, "border": "reflect"},
    "RandomCrop": {"size": [50, 30], "fill": 77},
    "GaussianNoise": {"sigma": [0.05, 0.2]},
    "RandomErasing": {"p": 1.0},
}
IMAGES = [name for name, op in OPS.items() if op.kind != "text"]
ALONE = [name for name in IMAGES if OPS[name].kind != "batch"]


def make(name: str, **more: Any) -> Policy:
    return Policy((OPS[name](**{**REQUIRED.get(name, {}), **STRONG.get(name, {}), "p": 1.0, **more}),))


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return smooth colours with edges. Noise would hide a resampling error."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + seed) + np.cos(y / (7 + c)) + (x > width / 2) for c in range(3)]
    return np.uint8(255 * (np.stack(waves, -1) + 2) / 5.001)


@pytest.mark.parametrize("name", IMAGES)
def test_p_zero_is_the_identity(name: str) -> None:
    image = make_image(40, 48)
    plan = Augmenter(make(name, p=0.0)).draw((40, 48), epoch=0, index=0)
    assert plan.steps == ()
    np.testing.assert_array_equal(Augmenter("none").apply(plan, image), image)


@pytest.mark.parametrize("name", ALONE)
@given(height=st.integers(1, 70), width=st.integers(1, 70), index=st.integers(0, 2**40))
@settings(max_examples=30)
def test_shape_dtype_replay_and_no_mutation(name: str, height: int, width: int, index: int) -> None:
    image = make_image(height, width)
    before = image.copy()
    augmenter = Augmenter(make(name), seed=5, size=(16, 20))
    plan = augmenter.draw((height, width), epoch=1, index=index)
    result = augmenter.apply(plan, image)
    assert (result.shape, result.dtype) == ((16, 20, 3), np.uint8)
    assert result.flags.c_contiguous and not np.shares_memory(result, image)
    np.testing.assert_array_equal(augmenter.apply(Plan.from_json(plan.to_json()), image), result)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", ALONE)
def test_both_executors_draw_the_same_image(name: str) -> None:
    """The documented bound: a mean difference of at most 1 grey level, also for a reduction by more than 2×."""
    augmenter = Augmenter(make(name), seed=9, size=(24, 28) if OPS[name].kind in ("geometric", "composition") else None)
    images = [make_image(90, 70, i) for i in range(6)]
    plans = [augmenter.draw((90, 70), epoch=0, index=i) for i in range(6)]
    single = np.stack([augmenter.apply(plan, image) for plan, image in zip(plans, images, strict=True)])
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    before = stacked.clone()
    together = torch_batch.run(plans, stacked).permute(0, 2, 3, 1).numpy()
    assert torch.equal(stacked, before)
    assert np.abs(single.astype(int) - together).mean((1, 2, 3)).max() <= 1.0


@pytest.mark.parametrize(
    "policy", [[{"RandomResizedCrop": {"size": 48, "scale": [0.1, 1.0]}}, "HorizontalFlip"], ["Rot90"], []]
)
def test_both_executors_enlarge_equally(policy: list) -> None:
    """Both executors repeat the last pixels of an enlarged crop. The bound is on the largest difference, not the mean."""
    augmenter = Augmenter(policy, seed=3, size=(50, 61))
    images = [np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8) for i in range(40)]
    plans = [augmenter.draw((30, 40), epoch=0, index=i) for i in range(40)]
    single = np.stack([augmenter.apply(plan, image) for plan, image in zip(plans, images, strict=True)])
    together = (
        torch_batch.run(plans, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    )
    assert np.abs(single.astype(int) - together).max() <= 2
    white = torch.full((1, 3, 30, 40), 255, dtype=torch.uint8)
    assert torch_batch.run(plans[:1], white).min() == 255


def test_batch_executor_handles_samples_that_drew_different_ops() -> None:
    policy = [
        "HorizontalFlip",
        {"ColorJitter": {"brightness": 0.5, "p": 0.5}},
        {"Rotate": {"degrees": 40, "p": 0.5}},
        {"RandomErasing": {}},
    ]
    augmenter = Augmenter(policy, seed=2)
    images = [make_image(32, 32, i) for i in range(16)]
    plans = [augmenter.draw((32, 32), epoch=0, index=i) for i in range(16)]
    assert len({tuple(step.op for step in plan.steps) for plan in plans}) > 4
    together = (
        torch_batch.run(plans, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    )
    for i, (plan, image) in enumerate(zip(plans, images, strict=True)):
        assert np.abs(augmenter.apply(plan, image).astype(int) - together[i]).mean() <= 1.0
        alone = torch_batch.run([plan], torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
        assert np.abs(alone.astype(int) - together[i]).max() <= 1  # float32 rounding differs by batch shape


def test_flip_is_exact_and_its_own_inverse() -> None:
    image = make_image(33, 47)
    once = Augmenter([{"HorizontalFlip": {"p": 1.0}}])(image, epoch=0, index=0)
    np.testing.assert_array_equal(once, image[:, ::-1])
    twice = Augmenter([{"HorizontalFlip": {"p": 1.0}}, {"HorizontalFlip": {"p": 1.0}}])(image, epoch=0, index=0)
    np.testing.assert_array_equal(twice, image)


@given(index=st.integers(0, 10_000), height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=60)
def test_crop_is_a_slice_of_the_padded_image(index: int, height: int, width: int) -> None:
    image = make_image(23, 31)
    augmenter = Augmenter([{"RandomCrop": {"size": [height, width], "fill": [1, 2, 3]}}])
    plan = augmenter.draw((23, 31), epoch=0, index=index)
    top, left = plan.steps[0].args["box"][:2]
    canvas = np.full((23 + 80, 31 + 80, 3), [1, 2, 3], np.uint8)
    canvas[40:63, 40:71] = image
    np.testing.assert_array_equal(
        augmenter.apply(plan, image), canvas[40 + top : 40 + top + height, 40 + left : 40 + left + width]
    )


def test_every_crop_position_is_drawn() -> None:
    augmenter = Augmenter([{"RandomCrop": {"size": 8}}])
    tops = {augmenter.draw((10, 8), epoch=0, index=i).steps[0].args["box"][0] for i in range(100)}
    assert tops == {0, 1, 2}


def test_rotation_by_90_degrees_is_counter_clockwise() -> None:
    image = make_image(32, 32)
    rotated = Augmenter([{"Rotate": {"degrees": [90, 90]}}])(image, epoch=0, index=0)
    assert np.abs(rotated.astype(int) - np.rot90(image)).max() <= 1


@pytest.mark.parametrize(("angle", "scale", "shear"), [(30.0, 1.0, 0.0), (-75.0, 1.3, 0.0), (0.0, 0.7, 0.0)])
def test_affine_agrees_with_torchvision(angle: float, scale: float, shear: float) -> None:
    image = make_image(61, 83)
    policy = [{"Affine": {"degrees": [angle, angle], "scale": [scale, scale], "shear": [shear, shear]}}]
    ours = Augmenter(policy)(image, epoch=0, index=0)
    theirs = tv.affine(
        torch.from_numpy(image).permute(2, 0, 1),
        angle=-angle,  # torchvision's affine rotates clockwise
        translate=[0, 0],
        scale=scale,
        shear=[0.0, 0.0],
        interpolation=tv.InterpolationMode.BILINEAR,
    )
    difference = np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy())
    assert difference.mean() < 1.0  # torchvision blends the border differently: a ring of one pixel differs


def test_shear_moves_rows_sideways() -> None:
    image = np.zeros((41, 41, 3), np.uint8)
    image[:, 20] = 255
    sheared = Augmenter([{"Affine": {"shear": [45, 45]}}])(image, epoch=0, index=0)
    columns = sheared[..., 0].argmax(1)
    assert columns[20] == 20 and columns[10] == 10 and columns[30] == 30  # one pixel per row at 45°


def test_signs_match_the_documented_table() -> None:
    """docs/augment.md, "Conventions of other libraries"."""
    image = make_image(61, 61)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    how = {"translate": [0, 0], "scale": 1.0, "interpolation": tv.InterpolationMode.BILINEAR}
    cases = {
        "Rotate": ({"angle": 20.0}, tv.rotate(tensor, 20.0, tv.InterpolationMode.BILINEAR)),
        "Affine": ({"angle": 20.0}, tv.affine(tensor, angle=-20.0, shear=[0.0, 0.0], **how)),
        "Affine x": ({"shear": 20.0}, tv.affine(tensor, angle=0.0, shear=[-20.0, 0.0], **how)),
        "Shear y": ({"shear_y": 20.0}, tv.affine(tensor, angle=0.0, shear=[0.0, -20.0], **how)),
    }
    for name, (args, theirs) in cases.items():
        ours = Augmenter("none").apply(Plan((61, 61), (Step(name.split()[0], args),)), image)
        assert np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy()).mean() < 1.5, name


def test_shift_is_a_fraction_of_the_side() -> None:
    image = make_image(40, 60)
    plan = Plan.from_json(
        '{"version": 1, "size": [40, 60], "steps": [{"op": "Affine", "angle": 0, "shift": [0.25, -0.5], "scale": 1, "shear": 0}]}'
    )
    moved = Augmenter("none").apply(plan, image)
    np.testing.assert_array_equal(moved[10:, :30], image[:30, 30:])
    assert (moved[:10] == 0).all() and (moved[:, 30:] == 0).all()


@pytest.mark.parametrize(
    ("name", "amount", "reference", "bound"),
    [
        ("brightness", 0.7, tv.adjust_brightness, 1.0),
        ("contrast", 0.6, tv.adjust_contrast, 1.0),
        ("saturation", 0.3, tv.adjust_saturation, 1.0),
        ("hue", 0.05, tv.adjust_hue, 2.5),  # Refract rotates about the grey axis, torchvision in HSV
    ],
)
def test_colour_agrees_with_torchvision(name: str, amount: float, reference: Any, bound: float) -> None:
    image = make_image(50, 50) // 2 + 60
    ours = Augmenter([{"ColorJitter": {name: [amount, amount]}}])(image, epoch=0, index=0)
    theirs = reference(torch.from_numpy(image).permute(2, 0, 1), amount).permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - theirs).mean()
    assert difference < bound
    change, expected = (result.astype(float).ravel() - image.ravel() for result in (ours, theirs))
    assert change @ expected > 0.8 * np.linalg.norm(change) * np.linalg.norm(
        expected
    )  # the same direction, not only a small change


def test_a_third_of_the_colour_circle_maps_red_to_green() -> None:
    rotated = Augmenter([{"ColorJitter": {"hue": [1 / 3, 1 / 3]}}])(
        np.full((4, 4, 3), [200, 30, 30], np.uint8), epoch=0, index=0
    )
    assert rotated[0, 0].tolist() == [30, 200, 30]


def test_neutral_colour_draws_change_nothing() -> None:
    image = make_image(20, 20)
    np.testing.assert_array_equal(Augmenter(["ColorJitter"])(image, epoch=0, index=0), image)


def test_two_fused_colour_steps_equal_their_sequence() -> None:
    image = make_image(50, 50) // 2 + 60  # far from 0 and 255, so that no intermediate value is clipped
    first, second = (
        {"ColorJitter": {"contrast": [0.8, 0.8]}},
        {"ColorJitter": {"saturation": [0.5, 0.5], "contrast": [1.1, 1.1]}},
    )
    fused = Augmenter([first, second], seed=1)
    plan = fused.draw((50, 50), epoch=0, index=0)
    one = Augmenter("none").apply(Plan(plan.size, plan.steps[:1]), image)
    in_turn = Augmenter("none").apply(Plan(plan.size, plan.steps[1:]), one)
    assert np.abs(fused.apply(plan, image).astype(int) - in_turn).max() <= 2


def test_geometric_steps_fuse_to_one_sharper_resampling() -> None:
    image = make_image(64, 64)
    rotate_and_undo = [{"Rotate": {"degrees": [17, 17]}}, {"Rotate": {"degrees": [-17, -17]}}]
    np.testing.assert_allclose(Augmenter(rotate_and_undo)(image, epoch=0, index=0).astype(int), image, atol=1)


@pytest.mark.parametrize("factor", [2, 3, 4, 6])
def test_reduction_does_not_alias_a_zone_plate(factor: int) -> None:
    """Rings above the Nyquist frequency of the result must become grey, not new rings."""
    size = 60 * factor
    y, x = np.mgrid[:size, :size] - size / 2
    rings = np.cos(np.pi * (x**2 + y**2) / size)  # one cycle in two pixels at the edge's middle
    plate = np.repeat(np.uint8(127.5 + 127 * rings)[..., None], 3, 2)
    small = Augmenter([{"Resize": {"size": 60}}])(plate, epoch=0, index=0).astype(float)
    unfiltered = plate[::factor, ::factor].astype(float)
    outer = np.hypot(*(np.mgrid[:60, :60] - 29.5)) > 30 * (1.6 / factor)
    assert small[outer].std() < 0.5 * unfiltered[outer].std()


def test_noise_has_the_configured_deviation_and_differs_between_samples() -> None:
    grey = np.full((128, 128, 3), 128, np.uint8)
    augmenter = Augmenter([{"GaussianNoise": {"sigma": [0.1, 0.1]}}])
    noises = [augmenter(grey, epoch=0, index=i).astype(float) - 128 for i in range(4)]
    for noise in noises:
        assert abs(noise.std() - 25.5) < 0.3 and abs(noise.mean()) < 0.5
    assert all(abs(np.corrcoef(noises[0].ravel(), other.ravel())[0, 1]) < 0.02 for other in noises[1:])


@pytest.mark.parametrize("name", ["GaussianNoise", "LaplaceNoise", "SpeckleNoise"])
def test_shared_noise_keeps_a_grey_image_grey_in_both_executors(name: str) -> None:
    grey = np.repeat(make_image(40, 48)[..., :1], 3, axis=2)
    shared, separate = (Augmenter([{name: {"sigma": [0.1, 0.2], "per_channel": per}}]) for per in (False, True))
    plans = [augmenter.draw((40, 48), epoch=0, index=1) for augmenter in (shared, separate)]
    alone = np.stack([shared.apply(plans[0], grey), separate.apply(plans[1], grey)])
    assert (alone[0] == alone[0][..., :1]).all() and (alone[0] != grey).mean() > 0.5
    assert (alone[1] != alone[1][..., :1]).any()
    images = torch.from_numpy(np.stack([grey, grey])).permute(0, 3, 1, 2)
    together = torch_batch.run(plans, images).permute(0, 2, 3, 1).numpy()
    assert np.abs(together.astype(int) - alone).max() <= 1
    with pytest.raises(ValueError, match="per_channel: 1 is neither true nor false"):
        Augmenter([{name: {"per_channel": 1}}])


def test_medical_preset_keeps_a_grey_image_grey() -> None:
    grey = np.repeat(make_image(64, 64)[..., :1], 3, axis=2)
    augmenter = Augmenter("medical-safe")
    for index in range(30):
        result = augmenter(grey, epoch=0, index=index)
        assert (result == result[..., :1]).all()


def test_cutout_zeros_squares_clipped_at_the_edge() -> None:
    image = np.full((32, 32, 3), 200, np.uint8)
    areas = []
    for index in range(300):
        plan = Augmenter([{"Cutout": {"length": 8}}]).draw((32, 32), epoch=0, index=index)
        ((top, left, height, width),) = plan.steps[0].args["boxes"]
        result = Augmenter("none").apply(plan, image)
        assert (result[top : top + height, left : left + width] == 0).all()
        assert (result == 0).sum() == height * width * 3
        areas.append(height * width)
    assert max(areas) == 64 and min(areas) < 32


def test_random_erasing_respects_scale_and_ratio() -> None:
    augmenter = Augmenter([{"RandomErasing": {"p": 1.0, "scale": [0.1, 0.2], "ratio": [0.5, 2.0]}}])
    for index in range(200):
        (step,) = augmenter.draw((100, 80), epoch=0, index=index).steps
        ((_, _, height, width),) = step.args["boxes"]
        assert 0.09 < height * width / 8000 < 0.21 and 0.48 < height / width < 2.1


def test_random_resized_crop_respects_scale_and_ratio() -> None:
    augmenter = Augmenter([{"RandomResizedCrop": {"size": 10, "scale": [0.2, 0.5], "ratio": [0.75, 1.25]}}])
    for index in range(200):
        (step,) = augmenter.draw((100, 80), epoch=0, index=index).steps
        top, left, height, width = step.args["box"]
        assert 0 <= top <= 100 - height and 0 <= left <= 80 - width
        assert 0.18 < height * width / 8000 < 0.52 and 0.7 < width / height < 1.3


def test_jpeg_bytes_and_the_decoded_array_agree() -> None:
    """A reduced decode must not shift the image: its mean difference from the full decode is at most 2 grey levels."""
    image = cv2.resize(make_image(75, 100), (800, 600), interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    decoded = np.array(Image.open(buffer))
    for index in range(20):
        augmenter = Augmenter(
            [{"RandomResizedCrop": {"size": 64, "scale": [0.3, 1.0]}}, {"Rotate": {"degrees": 10}}], seed=4
        )
        from_bytes = augmenter(buffer.getvalue(), epoch=0, index=index)
        from_array = augmenter(decoded, epoch=0, index=index)
        assert np.abs(from_bytes.astype(int) - from_array).mean() < 2.0


def test_alternating_flip_alternates_in_consecutive_epochs() -> None:
    aug = Augmenter(["AlternatingFlip", {"Rotate": {"degrees": 30}}], seed=4)
    flipped = np.array(
        [[aug.draw((8, 8), epoch=e, index=i).steps[0].op == "AlternatingFlip" for i in range(400)] for e in range(4)]
    )
    assert (flipped[0] != flipped[1]).all() and (flipped[0] == flipped[2]).all() and (flipped[1] == flipped[3]).all()
    assert 0.4 < flipped[0].mean() < 0.6
    rotations = {str(aug.draw((8, 8), epoch=e, index=0).steps[-1]) for e in range(4)}
    assert len(rotations) == 4  # the other ops have one random stream per epoch
