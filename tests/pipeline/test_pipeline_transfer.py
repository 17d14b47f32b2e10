"""Transfer learning from real ImageNet weights, EfficientNet-Lite0's, on shapes in random colours: Refract's defaults learn them."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_data import write_image

from benchmarks.pretrained import NAME
from refract.models.bundle.bundle import load_bundle
from refract.models.registry import build
from refract.pipeline.config.config import load_config
from refract.pipeline.config.defaults import HEAD_ALONE
from refract.pipeline.training.run import Result, train

pytestmark = pytest.mark.slow


def shape(label: str, number: int) -> np.ndarray:
    """A disc or a square of a random colour, size and place on noise of another colour, 96 × 96 pixels."""
    draw = np.random.default_rng([number, *label.encode()])
    image = np.clip(draw.integers(0, 256, 3) + draw.normal(0, 20, (96, 96, 3)), 0, 255).astype(np.uint8)
    (x, y), radius, colour = draw.integers(35, 61, 2).tolist(), int(draw.integers(18, 30)), draw.integers(0, 256, 3)
    if label == "disc":
        cv2.circle(image, (x, y), radius, colour.tolist(), -1)
    else:
        cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), colour.tolist(), -1)
    return image


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    for label in ("disc", "square"):
        for number in range(40):
            split = "train" if number < 20 else "val" if number < 30 else "test"
            write_image(root / split / label / f"{number:02}.png", shape(label, number))
    return root


def trained(shapes: Path, lite0: Path, runs: Path, **more: object) -> Result:
    values = {
        "data.source": shapes, "data.image_size": 96, "data.workers": 0, "data.batch_size": 8, "augment.policy": "fine-tune",
        "model.name": NAME, "model.weights": lite0, "trainer.max_epochs": 3, "trainer.precision": "fp32",
        "trainer.runs_dir": runs, "tracking.enabled": "false", "evaluation.robustness": "none", **more,
    }  # fmt: skip
    result = train(load_config(None, [f"--{key}={value}" for key, value in values.items()]))
    assert result is not None
    return result


def test_a_head_on_pretrained_features_learns_and_the_run_stores_the_defaults(
    shapes: Path, lite0: Path, tmp_path: Path
) -> None:
    result = trained(shapes, lite0, tmp_path, **{"model.mode": "feature-extract"})
    info = load_bundle(result.bundle).info
    assert result.metrics["accuracy"] >= 0.9
    assert info.preprocess["mean"] == [0.5] * 3 and info.preprocess["std"] == [0.5] * 3, "timm's, for that network"
    assert info.config["optim"]["lr"] == HEAD_ALONE


def test_the_first_loss_on_pretrained_weights_is_that_of_uniform_predictions(lite0: Path) -> None:
    network = build(NAME, 7, image_size=(64, 64), weights=str(lite0)).train()
    logits = network(torch.rand(4, 3, 64, 64))
    assert torch.nn.functional.cross_entropy(logits, torch.arange(4)).item() == pytest.approx(math.log(7), abs=1e-6)
