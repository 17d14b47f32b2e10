"""Resizing by Pillow and torchvision: the pixels of their own transforms, in preprocessing and in training."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from refract.augment import Augmenter, Plan, Preprocess, decode, image_size, resize_libraries
from refract.augment.executors import torch_batch
from refract.augment.fuse import fuse
from refract.augment.passes import BlendPass, WarpPass
from refract.augment.plan import Step
from refract.augment.resize_libraries import LIBRARIES

SIDES = st.integers(1, 300)
LIBRARY = pytest.mark.parametrize("library", LIBRARIES)


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def transformed(library: str, transform: Callable, pixels: np.ndarray) -> np.ndarray:
    """The result of a transform of torchvision, on an image of Pillow or on a tensor."""
    if library == "pillow":
        return np.asarray(transform(Image.fromarray(pixels)))
    return transform(as_tensor(pixels)).permute(1, 2, 0).numpy()


@LIBRARY
@given(rows=SIDES, columns=SIDES, side=st.integers(1, 80), ratio=st.sampled_from([1.0, 0.95, 0.875, 0.8, 0.5]))
def test_the_centre_equals_that_of_torchvisions_transforms(
    library: str, rows: int, columns: int, side: int, ratio: float
) -> None:
    pixels = noise(rows, columns)
    transform = v2.Compose([v2.Resize(int(side / ratio), antialias=True), v2.CenterCrop(side)])
    got = Preprocess(side, side, crop_ratio=ratio, interpolation=library)(pixels)
    np.testing.assert_array_equal(got, transformed(library, transform, pixels))


@LIBRARY
@given(rows=SIDES, columns=SIDES, height=st.integers(1, 80), width=st.integers(1, 80))
def test_squash_equals_a_plain_resize(library: str, rows: int, columns: int, height: int, width: int) -> None:
    pixels = noise(rows, columns)
    got = Preprocess(height, width, resize="squash", interpolation=library)(pixels)
    np.testing.assert_array_equal(got, transformed(library, v2.Resize((height, width), antialias=True), pixels))


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (96, 40)])
@pytest.mark.parametrize("shape", [(70, 200), (200, 70), (333, 250), (20, 30)])
def test_pillow_gives_the_input_of_timms_evaluation(size: tuple[int, int], shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    transform = create_transform(
        (3, *size), is_training=False, crop_pct=0.875, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
    )
    expected = (transform(Image.fromarray(pixels)) * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(Preprocess(*size, interpolation="pillow")(png(pixels)), expected)


@LIBRARY
def test_a_long_image_takes_little_memory(library: str) -> None:
    pixels = np.broadcast_to(np.arange(60_000, dtype=np.uint8)[None, :, None], (2, 60_000, 3))
    got = Preprocess(200, 200, interpolation=library)(pixels)  # 228 × 6,840,000 pixels before the crop
    assert got.shape == (200, 200, 3) and got.std() > 0


@pytest.mark.parametrize("shape", [(4200, 256), (256, 4200), (40_000, 2), (8400, 512)])
@LIBRARY
def test_the_centre_of_a_long_image_is_that_of_the_whole(library: str, shape: tuple[int, int]) -> None:
    side = 32 if 2 in shape else 1024
    pixels, long = noise(*shape), side * max(shape) // min(shape)
    size = (side, long) if shape[0] == min(shape) else (long, side)
    whole = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    top, left = ((length - side) // 2 for length in size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize_libraries, "MOST_PIXELS", 0)
        got = Preprocess(side, side, crop_ratio=1.0, interpolation=library)(pixels)
    assert np.abs(got - whole[top : top + side, left : left + side]).max() <= 1


@LIBRARY
def test_crops_and_flips_of_a_training_equal_the_librarys(library: str) -> None:
    augmenter = Augmenter([{"RandomResizedCrop": {"size": 40}}, {"HorizontalFlip": {"p": 0.5}}], interpolation=library)
    flips = set()
    for index in range(12):
        pixels = noise(120, 150, index)
        plan = augmenter.draw(image_size(png(pixels)), epoch=0, index=index)
        (crop, *flip) = plan.steps
        flips.add(len(flip))
        top, left, height, width = crop.args["box"]
        resize = v2.Resize((40, 40), antialias=True)
        expected = transformed(library, resize, np.ascontiguousarray(pixels[top : top + height, left : left + width]))
        expected = expected[:, ::-1] if flip else expected
        for image in (pixels, png(pixels)):
            np.testing.assert_array_equal(augmenter(image, epoch=0, index=index), expected)
        (batch,) = torch_batch.run([Plan.from_json(plan.to_json())], as_tensor(pixels)[None])
        np.testing.assert_array_equal(batch.permute(1, 2, 0).numpy(), expected)
    assert flips == {0, 1}


@LIBRARY
def test_rotations_and_borders_stay_refracts(library: str) -> None:
    pixels = noise(60, 80)
    for policy in ([{"Rotate": {"degrees": 30, "p": 1}}], [{"Affine": {"scale": [0.5, 0.6]}}]):
        augmenter, plain = Augmenter(policy, interpolation=library), Augmenter(policy)
        np.testing.assert_array_equal(augmenter(pixels, epoch=0, index=3), plain(pixels, epoch=0, index=3))


@LIBRARY
def test_the_chains_of_augmix_are_resized_by_the_library(library: str) -> None:
    augmenter = Augmenter(["AugMix"], interpolation=library)
    passes = [item for index in range(12) for item in fuse(augmenter.draw((60, 80), epoch=0, index=index))]
    chains = [chain for item in passes if isinstance(item, BlendPass) for _, chain in item.chains]
    warps = [item for chain in chains for item in chain if isinstance(item, WarpPass)]
    assert warps and {warp.interpolation for warp in warps} == {library}


@LIBRARY
def test_a_quarter_rotation_is_resized_by_the_library(library: str) -> None:
    pixels = noise(60, 80)
    steps = (Step("Rot90", {"turns": 1}), Step("Resize", {"box": [0, 0, 80, 60], "size": [30, 20]}))
    plan = Plan((60, 80), steps, interpolation=library)
    turned = Augmenter("none").apply(Plan((60, 80), steps[:1]), pixels)
    expected = LIBRARIES[library](turned, (30, 20), None)
    np.testing.assert_array_equal(Augmenter("none").apply(plan, pixels), expected)


def test_a_box_between_pixels_is_resized_by_pillow() -> None:
    pixels = noise(90, 90)
    augmenter = Augmenter([{"Affine": {"scale": [1.31, 1.31]}}], size=30, interpolation="pillow")
    expected = Image.fromarray(pixels).resize(
        (30, 30), Image.Resampling.BILINEAR, box=(45 - 45 / 1.31,) * 2 + (45 + 45 / 1.31,) * 2
    )
    got = augmenter(pixels, epoch=0, index=0).astype(int)
    assert np.abs(got - np.asarray(expected)).max() <= 1


@LIBRARY
def test_a_jpeg_is_decoded_whole(library: str) -> None:
    buffer = io.BytesIO()
    smooth = np.asarray(Image.fromarray(noise(30, 40)).resize((800, 600), Image.Resampling.BICUBIC))
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    preprocess = Preprocess(64, 64, interpolation=library)
    np.testing.assert_array_equal(preprocess(data), preprocess(decode(data)))
    augmenter = Augmenter("none", size=64, interpolation=library)
    np.testing.assert_array_equal(augmenter(data, epoch=0, index=0), augmenter(decode(data), epoch=0, index=0))


def test_plans_and_preprocessing_are_stored_with_the_library() -> None:
    plan = Augmenter("none", size=8, interpolation="torchvision").draw((20, 20), epoch=0, index=0)
    assert Plan.from_json(plan.to_json()) == plan and plan.interpolation == "torchvision"
    assert "interpolation" not in Preprocess(8, 8).to_dict()
    stored = Preprocess(8, 8, interpolation="pillow").to_dict()
    assert Preprocess.from_dict(stored).interpolation == "pillow"
    for make in (lambda: Preprocess(8, 8, interpolation="lanczos"), lambda: Augmenter("none", interpolation="lanczos")):
        with pytest.raises(ValueError, match="interpolation: 'lanczos' is not one of refract, pillow, torchvision"):
            make()
    with pytest.raises(ValueError, match="not a plan: .*interpolation"):
        Plan.from_json('{"version": 1, "size": [4, 4], "steps": [], "interpolation": "lanczos"}')


def test_the_libraries_differ_by_one_level_at_most() -> None:
    pixels = noise(120, 160)
    results = [Preprocess(48, 48, interpolation=name)(pixels).astype(int) for name in LIBRARIES]
    assert np.abs(results[0] - results[1]).max() == 1
