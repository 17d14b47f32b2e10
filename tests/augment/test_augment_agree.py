"""Ops agree with their equivalents in Pillow and torchvision, exactly or within the tolerance of each test."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageEnhance, ImageOps

from refract.augment import Augmenter
from refract.augment.executors import torch_batch
from refract.augment.ops.filters import Sharpen
from refract.augment.plan import Plan, Step


def make_image(height: int = 61, width: int = 83) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c)) + np.cos(y / (7 + c)) + (x > width / 2) for c in range(3)]
    return np.uint8(200 * (np.stack(waves, -1) + 2) / 5.001 + 20)


IMAGE = make_image()
PIL_IMAGE = Image.fromarray(IMAGE)
TENSOR = torch.from_numpy(IMAGE).permute(2, 0, 1)


def ours(name: str, **args: Any) -> np.ndarray:
    return Augmenter("none").apply(Plan(IMAGE.shape[:2], (Step(name, args),)), IMAGE)


def in_batch(name: str, **args: Any) -> np.ndarray:
    return torch_batch.run([Plan(IMAGE.shape[:2], (Step(name, args),))], TENSOR[None])[0].permute(1, 2, 0).numpy()


EXACT = {
    "HorizontalFlip": ({}, IMAGE[:, ::-1]),
    "VerticalFlip": ({}, IMAGE[::-1]),
    "Transpose": ({}, IMAGE.transpose(1, 0, 2)),
    "Rot90 1": ({"turns": 1}, np.rot90(IMAGE, 1)),
    "Rot90 2": ({"turns": 2}, np.rot90(IMAGE, 2)),
    "Rot90 3": ({"turns": 3}, np.rot90(IMAGE, 3)),
    "Invert": ({}, np.array(ImageOps.invert(PIL_IMAGE))),
    "Solarize": ({"threshold": 90}, np.array(ImageOps.solarize(PIL_IMAGE, 90))),
    "Posterize": ({"bits": 3}, np.array(ImageOps.posterize(PIL_IMAGE, 3))),
    "AutoContrast": ({}, np.array(ImageOps.autocontrast(PIL_IMAGE))),
    "Equalize": ({}, np.array(ImageOps.equalize(PIL_IMAGE))),
    "ChannelShuffle": ({"order": [2, 0, 1]}, IMAGE[..., [2, 0, 1]]),
}


@pytest.mark.parametrize("case", EXACT)
def test_both_executors_equal_the_reference(case: str) -> None:
    args, expected = EXACT[case]
    name = case.split()[0]
    np.testing.assert_array_equal(ours(name, **args), expected)
    np.testing.assert_array_equal(in_batch(name, **args), expected)


def pil(enhance: Any, factor: float) -> np.ndarray:
    return np.array(enhance(PIL_IMAGE).enhance(factor))


def tensor(result: torch.Tensor) -> np.ndarray:
    return result.permute(1, 2, 0).numpy()


CLOSE = [
    # name, arguments, reference, largest difference, in grey levels
    ("Brightness", {"factor": 1.3}, pil(ImageEnhance.Brightness, 1.3), 1),
    ("Contrast", {"factor": 0.6}, pil(ImageEnhance.Contrast, 0.6), 1),
    ("Saturation", {"factor": 0.3}, pil(ImageEnhance.Color, 0.3), 1),
    ("Saturation", {"factor": 1.7}, pil(ImageEnhance.Color, 1.7), 2),
    ("Grayscale", {}, np.array(PIL_IMAGE.convert("L").convert("RGB")), 1),
    ("Gamma", {"gamma": 1.8}, tensor(tv.adjust_gamma(TENSOR, 1.8)), 1),
    ("Sharpen", {"factor": 2.5}, tensor(tv.adjust_sharpness(TENSOR, 2.5)), 2),
    ("Sharpen", {"factor": 0.0}, pil(ImageEnhance.Sharpness, 0.0), 1),
    ("GaussianBlur", {"sigma": 1.4}, tensor(tv.gaussian_blur(TENSOR, [11, 11], [1.4, 1.4])), 1),
    (
        "JPEGCompression",
        {"quality": 40},
        tensor(tv.jpeg(TENSOR, 40)),
        12,
    ),  # their encoder's DCT is another; see the mean below
]


@pytest.mark.parametrize(("name", "args", "expected", "bound"), CLOSE, ids=[f"{row[0]}-{row[1]}" for row in CLOSE])
def test_both_executors_agree_within_rounding(name: str, args: dict, expected: np.ndarray, bound: int) -> None:
    assert np.abs(ours(name, **args).astype(int) - expected).max() <= bound
    assert np.abs(in_batch(name, **args).astype(int) - expected).max() <= bound


@pytest.mark.parametrize("size", [(2, 5), (3, 3), (3, 7)])
def test_sharpen_agrees_on_tiny_images(size: tuple[int, int]) -> None:
    """The pixels at the edge stay, so an image of two rows has none to change."""
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    sharpened = Sharpen.on_image({"factor": 2.0}, image)
    batch = Sharpen.on_batch([{"factor": 2.0}], torch.from_numpy(image).permute(2, 0, 1)[None])
    assert np.abs(sharpened.astype(int) - batch[0].permute(1, 2, 0).numpy()).max() <= 1
    assert (sharpened != image).any() == (min(size) > 2)


def test_jpeg_compression_on_average() -> None:
    difference = np.abs(ours("JPEGCompression", quality=40).astype(int) - tensor(tv.jpeg(TENSOR, 40)))
    assert difference.mean() < 1.2 < np.abs(ours("JPEGCompression", quality=40).astype(int) - IMAGE).mean()


def test_perspective() -> None:
    height, width = IMAGE.shape[:2]
    shares = [[0.1, 0.05], [0.02, 0.12], [0.15, 0.1], [0.0, 0.08]]
    inwards = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    corners = [(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)]
    moved = [
        [c[0] + i[0] * s[0] * width, c[1] + i[1] * s[1] * height]
        for c, i, s in zip(corners, inwards, shares, strict=True)
    ]
    theirs = tv.perspective(
        TENSOR, [list(c) for c in corners], moved, interpolation=tv.InterpolationMode.BILINEAR, fill=[0.0]
    )
    # torchvision moves pixel centres, Refract moves corners: half a pixel at the edge. torchvision also blends the border differently.
    difference = np.abs(ours("Perspective", corners=shares).astype(int) - tensor(theirs))
    assert np.median(difference) <= 2 and difference.mean() < 4
    both = np.abs(ours("Perspective", corners=shares).astype(int) - in_batch("Perspective", corners=shares))
    assert both.mean() <= 1


TORCHVISIONS = {"constant": "constant", "edge": "edge", "reflect": "symmetric", "reflect101": "reflect"}


@pytest.mark.parametrize("border", TORCHVISIONS)
def test_borders_match_torchvisions_padding_modes(border: str) -> None:
    height, width = IMAGE.shape[:2]
    padded = tensor(tv.pad(TENSOR, [20, 20, 20, 20], padding_mode=TORCHVISIONS[border]))
    for top, left in ((-20, -20), (20, 20), (-7, 13), (3, -20)):
        args = {"box": [top, left, height, width], "size": [height, width], "border": border}
        expected = padded[20 + top :, 20 + left :][:height, :width]
        np.testing.assert_array_equal(ours("PadAndCrop", **args), expected)
        np.testing.assert_array_equal(in_batch("PadAndCrop", **args), expected)
        plan = Plan((height, width), (Step("PadAndCrop", args),))
        np.testing.assert_array_equal(Augmenter("none").apply_mask(plan, IMAGE), expected)


@pytest.mark.parametrize("border", ["reflect", "reflect101"])
def test_warp_reflects_the_image_at_its_border(border: str) -> None:
    """The result equals the warp of an image padded with that border, in both executors."""
    height, width = IMAGE.shape[:2]
    around = 90
    mode: Any = {"reflect": "symmetric", "reflect101": "reflect"}[border]
    padded = np.pad(IMAGE, ((around, around), (around, around), (0, 0)), mode=mode)
    size = padded.shape[:2]
    args = {"angle": 33.0, "scale": 0.8, "shear": 8.0}
    wide = Augmenter("none").apply(Plan(size, (Step("Affine", args),)), padded)
    expected = wide[around : around + height, around : around + width].astype(int)
    assert np.abs(ours("Affine", **args, border=border) - expected).max() <= 1
    assert np.abs(in_batch("Affine", **args, border=border) - expected).max() <= 2


def keys_cubic(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """PyTorch's bicubic samples of an image at pixel centres (x, y), the last pixels repeated beyond the edge."""
    height, width = image.shape[:2]
    grid = torch.from_numpy(np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1))[None]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    sampled = torch.nn.functional.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return sampled[0].permute(1, 2, 0).clamp(0, 255).numpy()


@pytest.mark.parametrize("size", [(90, 140), (50, 70), (45, 140)])
def test_bicubic_resize_matches_pytorch(size: tuple[int, int]) -> None:
    args = {"box": [5, 7, 50, 70], "size": list(size), "interpolation": "bicubic"}
    crop = TENSOR[None, :, 5:55, 7:77].double()
    theirs = torch.nn.functional.interpolate(crop, size=size, mode="bicubic", align_corners=False)[0].clamp(0, 255)
    for result in (ours("RandomResizedCrop", **args), in_batch("RandomResizedCrop", **args)):
        assert np.abs(result - tensor(theirs).astype(float)).max() <= 1.01
    bilinear = ours("RandomResizedCrop", **{**args, "interpolation": "bilinear"})
    assert size == (50, 70) or np.abs(bilinear - tensor(theirs)).max() > 4


def test_chain_is_bicubic_if_one_of_its_ops_is() -> None:
    height, width = 61, 83
    noise = np.random.default_rng(0).integers(60, 200, (height, width, 3), dtype=np.uint8)
    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    x, y = x[:, ::-1], y[:, ::-1]  # the flip that follows the rotation
    expected = keys_cubic(noise, cos * x - sin * y + width / 2 - 0.5, sin * x + cos * y + height / 2 - 0.5)
    rotate = Step("Rotate", {"angle": 20.0, "border": "edge", "interpolation": "bicubic"})
    plan = Plan((height, width), (rotate, Step("HorizontalFlip")))
    bilinear = Plan((height, width), (Step("Rotate", {"angle": 20.0, "border": "edge"}), Step("HorizontalFlip")))
    # OpenCV quantises subpixel positions to 1/32.
    assert np.abs(Augmenter("none").apply(plan, noise) - expected).mean() < 1.5
    assert np.abs(Augmenter("none").apply(bilinear, noise) - expected).mean() > 6
    images = torch.from_numpy(np.stack([noise, noise])).permute(0, 3, 1, 2)
    both = torch_batch.run([plan, bilinear], images).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(both[0], Augmenter("none").apply(plan, noise))
    assert np.abs(both[1].astype(int) - Augmenter("none").apply(bilinear, noise)).mean() <= 1


def test_exact_hue_rotates_in_hsv() -> None:
    for turns in (0.08, -0.3, 0.5):
        plan = Plan(IMAGE.shape[:2], (Step("Hue", {"turns": turns}),), exact=True)
        theirs = tensor(tv.adjust_hue(TENSOR, turns))
        assert np.abs(Augmenter("none").apply(plan, IMAGE).astype(int) - theirs).max() <= 2
        batch = torch_batch.run([plan], TENSOR[None])[0].permute(1, 2, 0).numpy()
        assert np.abs(batch.astype(int) - theirs).max() <= 2


def test_exact_jitter_equals_torchvisions_sequence() -> None:
    args = {"contrast": 1.6, "hue": 0.1, "brightness": 1.4, "saturation": 0.5}
    theirs = tv.adjust_saturation(tv.adjust_brightness(tv.adjust_hue(tv.adjust_contrast(TENSOR, 1.6), 0.1), 1.4), 0.5)
    plan = Plan(IMAGE.shape[:2], (Step("ColorJitter", args),), exact=True)
    assert Plan.from_json(plan.to_json()) == plan
    assert np.abs(Augmenter("none").apply(plan, IMAGE).astype(int) - tensor(theirs)).max() <= 4
    fused = Plan(plan.size, plan.steps)
    assert np.abs(Augmenter("none").apply(fused, IMAGE).astype(int) - tensor(theirs)).mean() > 4, (
        "torchvision clips intermediate values"
    )


def test_fused_tables_equal_their_sequence() -> None:
    steps = (
        Step("Gamma", {"gamma": 0.6}),
        Step("Equalize", {}),
        Step("Posterize", {"bits": 4}),
        Step("AutoContrast", {}),
    )
    in_turn = IMAGE
    for step in steps:
        in_turn = Augmenter("none").apply(Plan(IMAGE.shape[:2], (step,)), in_turn)
    np.testing.assert_array_equal(Augmenter("none").apply(Plan(IMAGE.shape[:2], steps), IMAGE), in_turn)


@pytest.mark.parametrize("name", ["GaussianNoise", "LaplaceNoise"])
def test_additive_noise_has_the_configured_deviation(name: str) -> None:
    grey = np.full((128, 128, 3), 128, np.uint8)
    noise = Augmenter([{name: {"sigma": [0.05, 0.05]}}])(grey, epoch=0, index=0).astype(float) - 128
    assert abs(noise.std() - 12.75) < 0.25 and abs(noise.mean()) < 0.3


def test_signal_dependent_noise_grows_with_the_signal() -> None:
    for name, args, powers in (("PoissonNoise", {"photons": 100}, 0.5), ("SpeckleNoise", {"sigma": 0.1}, 1.0)):
        spread = []
        for level in (40, 160):
            flat = np.full((128, 128, 3), level, np.uint8)
            spread.append(Augmenter([{name: args}])(flat, epoch=0, index=0).astype(float).std())
        assert spread[1] / spread[0] == pytest.approx(4**powers, rel=0.05)
        expected = (160 * 255 / 100) ** 0.5 if name == "PoissonNoise" else 16
        assert spread[1] == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("name", ["SaltAndPepper", "PixelDropout"])
def test_fraction_of_changed_pixels(name: str) -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    result = Augmenter([{name: {"amount": [0.25, 0.25]}}])(grey, epoch=0, index=0)
    assert (result == result[..., :1]).all(), "all channels of a pixel change together"
    assert (result[..., 0] != 128).mean() == pytest.approx(0.25, abs=0.015)
    if name == "SaltAndPepper":
        assert (result[..., 0] == 0).mean() == pytest.approx((result[..., 0] == 255).mean(), abs=0.01)


def test_motion_blur_follows_its_direction() -> None:
    dot = np.zeros((41, 41, 3), np.uint8)
    dot[20, 20] = 255
    for degrees, expected in ((0, (1, 9)), (90, (9, 1))):
        blurred = Augmenter([{"MotionBlur": {"length": 9, "degrees": [degrees, degrees]}}])(dot, epoch=0, index=0)[
            ..., 0
        ]
        rows, columns = np.nonzero(blurred > 14)
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == expected
    up = Augmenter([{"MotionBlur": {"length": 9, "degrees": [45, 45]}}])(dot, epoch=0, index=0)[..., 0]
    assert up[18, 22] > 10 and up[22, 22] < 3, "45 degrees counter-clockwise rises to the right"


def test_elastic_moves_by_alpha_and_smoothly() -> None:
    from refract.augment.ops.deform import ElasticDeform

    moves = []
    for offset in range(0, 200_000, 997):
        x, _ = ElasticDeform.maps({"alpha": 3.0, "sigma": 8.0, "offset": offset}, (96, 96))
        moves.append(x - np.arange(96))
    inner = np.array(moves)[:, 16:-16, 16:-16]  # the outermost grid values repeat at the border
    assert np.std(inner) == pytest.approx(3, rel=0.05)
    assert np.abs(np.diff(moves, axis=2)).max() < 3, "the displacement is smooth"


def test_grid_distortion_keeps_the_frame() -> None:
    from refract.augment.ops.deform import GridDistortion

    x, y = GridDistortion.maps({"rows": [1, 1.5, 0.5], "columns": [0.7, 1.3]}, (60, 90))
    assert x.min() >= -0.5 and x.max() <= 89.5 and (np.diff(x, axis=1) > 0).all() and (np.diff(y, axis=0) > 0).all()
    even, _ = GridDistortion.maps({"rows": [1, 1], "columns": [1, 1]}, (60, 90))
    np.testing.assert_allclose(even, np.broadcast_to(np.arange(90), (60, 90)), atol=1e-4)


def test_colour_temperature_is_orange_below_and_blue_above_6500_kelvin() -> None:
    grey = np.full((4, 4, 3), 120, np.uint8)
    for kelvin, order in ((2500, (2, 1, 0)), (15000, (0, 1, 2))):
        pixel = Augmenter("none").apply(Plan((4, 4), (Step("ColorTemperature", {"kelvin": kelvin}),)), grey)[0, 0]
        assert tuple(np.argsort(pixel)) == order
        assert pixel @ np.array([0.299, 0.587, 0.114]) == pytest.approx(120, abs=1)
    same = Augmenter("none").apply(Plan((4, 4), (Step("ColorTemperature", {"kelvin": 6500}),)), grey)
    np.testing.assert_array_equal(same, grey)


def test_grid_mask_covers_the_configured_fraction() -> None:
    white = np.full((240, 200, 3), 255, np.uint8)
    fractions = [
        (Augmenter([{"GridMask": {"spacing": 0.1, "ratio": 0.5}}])(white, epoch=0, index=i) == 0).mean()
        for i in range(40)
    ]
    assert np.mean(fractions) == pytest.approx(0.25, abs=0.02)


def test_hide_and_seek_paints_the_mean() -> None:
    result = Augmenter([{"HideAndSeek": {"cells": 2, "hide": 1.0}}])(IMAGE, epoch=0, index=0)
    np.testing.assert_allclose(result.reshape(-1, 3), np.broadcast_to(IMAGE.mean((0, 1)), (61 * 83, 3)), atol=0.51)


def test_fused_plan_stays_within_the_documented_bound_of_the_sequence() -> None:
    """docs/augment.md documents a mean difference of 4 grey levels with the imagenet preset."""
    image = np.ascontiguousarray(np.kron(make_image(), np.ones((4, 4, 1), np.uint8)))
    augmenter = Augmenter("imagenet", seed=0)
    differences = []
    for index in range(60):
        plan = augmenter.draw(image.shape[:2], epoch=0, index=index)
        exact = augmenter.apply(dataclasses.replace(plan, exact=True), image)
        differences.append(np.abs(augmenter.apply(plan, image).astype(int) - exact).mean())
    assert 0.5 < np.mean(differences) < 4, np.mean(differences)


@pytest.mark.parametrize(
    ("size", "policy", "to"),
    [
        ((100, 1000), [], 224),  # one side enlarged, the other reduced
        ((1000, 100), ["Rot90"], 224),
        ((150, 233), [{"ShortestSide": {"size": 224}}, {"RandomCrop": {"size": 224}}], None),
        ((150, 233), [{"RandomResizedCrop": {"size": [224, 64]}}, "HorizontalFlip", "Rot90"], None),
        ((31, 57), [{"Resize": {"size": [64, 20]}}, {"RandomCrop": {"size": [40, 15]}}, "Transpose"], None),
    ],
)
def test_edges_are_not_blended_with_the_border(size, policy, to) -> None:
    white = np.full((*size, 3), 255, np.uint8)
    data = simplejpeg.encode_jpeg(white, 95, "RGB", "444")
    augmenter = Augmenter(policy, seed=2, size=to)
    for index in range(20):
        plan = augmenter.draw(size, epoch=0, index=index)
        assert augmenter.apply(plan, white).min() == 255, plan
        assert augmenter.apply(plan, data).min() == 255, plan
        assert torch_batch.run([plan], torch.from_numpy(white).permute(2, 0, 1)[None]).min() == 255, plan


def test_border_appears_only_in_the_padding() -> None:
    policy = [{"Pad": {"size": [20, 40]}}, {"Resize": {"size": [60, 120]}}]  # left and right of the image, not above it
    white = np.full((20, 20, 3), 255, np.uint8)
    plan = Augmenter(policy).draw((20, 20), epoch=0, index=0)
    for result in (
        Augmenter("none").apply(plan, white),
        torch_batch.run([plan], torch.from_numpy(white).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy(),
    ):
        assert (result[:, 33:87] == 255).all() and (result[:, :27] == 0).all() and (result[:, 93:] == 0).all()
