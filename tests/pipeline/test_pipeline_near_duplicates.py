"""Near-duplicates: images of val and test that are saved copies of training images."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from small_data import config_of, write_image

from refract.pipeline.data.near_duplicates import NEAREST, _candidates, difference_hash
from refract.pipeline.data.prepare import prepare_data


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train and test images; three test images are training images, saved again in other ways."""
    root = tmp_path_factory.mktemp("scenes")
    for number in range(60):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (96, 96), interpolation=cv2.INTER_CUBIC)
        if number in (58, 59):  # laid out as another one, but with other things in it
            like = np.random.default_rng(number - 30).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            noise = np.random.default_rng(number).integers(-90, 90, (96, 96, 3))
            blur = cv2.resize(like, (96, 96), interpolation=cv2.INTER_CUBIC).astype(int)
            pixels = np.clip(
                128 + (blur - 128) // 4 + cv2.GaussianBlur(noise.astype(np.float32), (0, 0), 2) * 3, 0, 255
            )
        split = "train" if number < 40 else "test"
        write_image(root / split / "ab"[number % 2] / f"{number:02}.png", pixels.astype(np.uint8))
    for number, change in enumerate((0.5, 0.8, 1.3)):
        pixels = cv2.imread(str(root / "train" / "ab"[number % 2] / f"{number:02}.png"))
        smaller = cv2.resize(pixels, None, fx=change, fy=change, interpolation=cv2.INTER_AREA)
        brighter = cv2.convertScaleAbs(smaller, alpha=0.9, beta=20)
        cv2.imwrite(
            str(root / "test" / "ab"[number % 2] / f"again{number}.jpg"), brighter, [cv2.IMWRITE_JPEG_QUALITY, 60]
        )
    return root


def test_test_images_that_resemble_a_training_image_are_found(scenes: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, _ = prepare_data(config_of(scenes))
    pairs = {(Path(path).name, Path(other).name) for path, other in manifest.near}
    # val was drawn from train, so the original of a copy may be in val.
    trained = {Path(sample.path).name for sample in manifest.of("train")}
    wanted = {(f"again{n}.jpg", f"{n:02}.png") for n in range(3) if f"{n:02}.png" in trained}
    assert len(wanted) >= 2 and pairs == wanted
    assert f"{len(wanted)} images of test are near-duplicates of training images, such as" in caplog.text


def test_a_data_set_of_similar_images_takes_little_time_and_memory() -> None:
    pairs = _candidates([b"a" * 16] * 1_000, [b"a" * 16] * 20_000)
    assert len(pairs) == 1_000 and all(len(others) == NEAREST for _, others in pairs), "not every pair"
    others = [bytes([n]) + b"b" * 15 for n in (3, 1, 0, 255)]
    assert _candidates([b"\0" + b"b" * 15, b"c" * 16], others) == [(0, [2, 1, 0])], (
        "the nearest first; eight bits are too many"
    )


def test_copies_among_similar_images_are_found(tmp_path: Path) -> None:
    """A fixed camera: the same background, with a different fine detail in each image."""
    ground = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for number in range(24):
        fine = np.random.default_rng(number + 1).integers(-45, 46, (36, 36, 1))
        pixels = cv2.resize(ground, (144, 144), interpolation=cv2.INTER_NEAREST).astype(int)
        pixels = np.clip(pixels + np.kron(fine, np.ones((4, 4, 1), int)), 0, 255).astype(np.uint8)
        write_image(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", pixels)
        if number >= 12:
            (tmp_path / "test" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "test" / "ab"[number % 2] / f"{number}.jpg"), pixels[:, :, ::-1])
    manifest, _ = prepare_data(config_of(tmp_path, val_fraction=0.05))
    trained = {Path(sample.path).stem for sample in manifest.of("train")}
    pairs = {Path(a).stem: Path(b).stem for a, b in manifest.near if "/test/" in a}
    assert pairs == {str(n): str(n) for n in range(12, 24) if str(n) in trained} and len(pairs) >= 10


def test_images_with_little_structure_have_no_hash() -> None:
    flat = np.full((32, 32, 3), 90, np.uint8)
    strokes = flat.copy()
    strokes[8:24, 14:18] = 255
    assert difference_hash(flat) == difference_hash(strokes) == difference_hash(flat[:10]) == b""
    falling = np.repeat(np.arange(200, 40, -5, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    slope = np.clip(falling.astype(int) + 4 * np.arange(32)[:, None, None], 0, 255).astype(np.uint8)
    assert len(difference_hash(slope)) == 16 and len(difference_hash(slope[::-1, ::-1])) == 16
