"""Near-duplicates that embeddings show: crops, flips and rotations of one photo, and no two photos of one class."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_data import write_image

from refract.pipeline.config.config import load_config
from refract.pipeline.data.manifest import Sample
from refract.pipeline.features import near_duplicates
from refract.pipeline.features.near_duplicates import similar_pairs
from refract.pipeline.training.run import train

SCENES = 12


def scene(number: int, side: int = 120) -> np.ndarray:
    """Return an image with structures of several sizes, as a photo has, uint8 (side, side, 3)."""
    draw = np.random.default_rng(number)
    pixels = np.zeros((side, side, 3))
    for cells in (3, 8, 20):
        pixels += cv2.resize(draw.uniform(0, 85, (cells, cells, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def rotated(pixels: np.ndarray) -> np.ndarray:
    side = len(pixels)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), 6, 1)
    return cv2.warpAffine(pixels, turn, (side, side), borderMode=cv2.BORDER_REFLECT_101)


def saved_again(pixels: np.ndarray) -> np.ndarray:
    small = cv2.resize(pixels, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    return cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "crop": lambda pixels: pixels[:102, 9:111],
    "flip": lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
    "rotation": rotated,
    "saved again": saved_again,
    "brightness": lambda pixels: cv2.convertScaleAbs(pixels, alpha=1.2, beta=10),
}


def sample(pixels: np.ndarray, name: str) -> Sample:
    return Sample(name, (0,), data=cv2.imencode(".png", pixels)[1].tobytes())


TRAIN = [sample(scene(number), f"train {number}") for number in range(SCENES)]
DIRECTIONS = np.eye(SCENES, 16, dtype=np.float32)
"""Embeddings of the training scenes."""


def pairs(measured: list[Sample], vectors: np.ndarray) -> list[tuple[int, int]]:
    return similar_pairs(measured, vectors.astype(np.float32), TRAIN, DIRECTIONS, torch.device("cpu"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_photo_is_found_and_a_similar_other_photo_is_not(change: str) -> None:
    changed = [sample(CHANGES[change](scene(number)), f"{change} {number}") for number in range(SCENES)]
    assert pairs(changed, DIRECTIONS * 7) == [(number, number) for number in range(SCENES)]
    assert pairs(changed, np.roll(DIRECTIONS, 1, axis=0)) == [], "the embedding is that of another photo"
    others = [sample(CHANGES[change](scene(100 + number)), f"{change} {number}") for number in range(SCENES)]
    assert pairs(others, DIRECTIONS) == []


def test_the_nearest_of_several_candidates_is_taken_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [sample(CHANGES["crop"](scene(number)), f"crop {number}") for number in range(SCENES)]
    mixed = DIRECTIONS + 0.8 * np.roll(DIRECTIONS, 1, axis=0)
    weaker = 0.8 * DIRECTIONS + np.roll(DIRECTIONS, 1, axis=0)
    monkeypatch.setattr(near_duplicates, "LEAST_COSINE", 0.5)
    expected = [(number, number) for number in range(SCENES)]
    assert pairs(changed, mixed) == pairs(changed, weaker) == expected
    monkeypatch.setattr(near_duplicates, "ROWS", 5)
    monkeypatch.setattr(near_duplicates, "COLUMNS", 4)
    assert pairs(changed, mixed) == pairs(changed, weaker) == expected
    monkeypatch.setattr(near_duplicates, "CANDIDATES", 1)
    assert pairs(changed, mixed) == expected and pairs(changed, weaker) == []


def test_of_the_images_of_a_fixed_camera_only_a_copy_is_found() -> None:
    ground = scene(0).astype(int)
    shots = []
    for number in range(2 * SCENES):
        fine = np.random.default_rng(number).integers(-9, 10, (30, 30, 1))
        shots.append(np.clip(ground + np.kron(fine, np.ones((4, 4, 1), int)), 0, 255).astype(np.uint8))
    train = [sample(shot, f"shot {number}") for number, shot in enumerate(shots[:SCENES])]
    measured = [sample(shot, f"new {number}") for number, shot in enumerate(shots[SCENES:])]
    measured[3] = sample(saved_again(shots[5]), "copy")
    vectors = np.ones((SCENES, 16), np.float32) + 0.1 * DIRECTIONS
    measured_vectors = vectors.copy()
    measured_vectors[3] = vectors[5]
    assert similar_pairs(measured, measured_vectors, train, vectors, torch.device("cpu")) == [(3, 5)]


def test_images_on_an_empty_ground_are_not_compared() -> None:
    flat = np.full((64, 64, 3), 250, np.uint8)
    flat[20:40, 30:36] = 10
    train = [sample(flat, "a")]
    again = [sample(np.roll(flat, 2, axis=0), "b")]
    assert similar_pairs(again, DIRECTIONS[:1], train, DIRECTIONS[:1], torch.device("cpu")) == []


def test_a_diverged_alignment_shows_no_near_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "findTransformECC", lambda image, other, warp, *_: warp.fill(np.nan))
    assert pairs([sample(scene(0), "again")], DIRECTIONS[:1]) == []


def test_a_training_reports_flipped_training_images_in_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(near_duplicates, "CANDIDATES", SCENES)  # the network has random weights
    monkeypatch.setattr(near_duplicates, "LEAST_COSINE", 0.0)
    for number in range(SCENES):
        split = ("train", "train", "val")[number % 3]
        write_image(tmp_path / "data" / split / "ab"[number // 6] / f"{number}.png", scene(number))
    for number in range(SCENES, 2 * SCENES - 2):
        write_image(tmp_path / "data" / "test" / "ab"[number % 2] / f"{number}.png", scene(number))
    for number in (0, 1):
        write_image(tmp_path / "data" / "test" / "a" / f"flip{number}.png", scene(number)[:, ::-1])
    write_image(tmp_path / "data" / "val" / "b" / "flip6.png", scene(6)[:, ::-1])
    settings = {
        "data.source": tmp_path / "data", "data.workers": 0, "model.name": "resnet20", "model.mode": "probe",
        "tracking.enabled": "false", "evaluation.robustness": "none",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "refract.pipeline"):
        result = train(load_config(None, [f"--{key}={value}" for key, value in settings.items()]))
    assert result is not None
    report = json.loads((result.run_dir / "report.json").read_text())
    file_pairs = {(Path(path).name, Path(other).name) for path, other in report["near_duplicates"]["pairs"]}
    assert file_pairs == {("flip0.png", "0.png"), ("flip1.png", "1.png")}
    assert "3 further images of val and test resemble training images by their embeddings" in caplog.text
