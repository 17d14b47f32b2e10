"""A trained classifier on a GPU: explanations, features for drift, and batch scoring."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_data import COLOURS, SIDE, TEMPERATURE, encoded, write_bundle, write_folder

from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, load_bundle
from refract.models.occlusion import Occlusion
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.drift.profile import profile
from refract.pipeline.inference.batch_scoring import Options, score_all
from refract.pipeline.inference.scoring import SampleInput, score

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    golden = [encoded(label, number) for number in range(2) for label in COLOURS]
    return load_bundle(write_bundle(tmp_path_factory.mktemp("bundle") / "b", golden))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "images", 8)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use float32 instead of TF32 in convolutions, so that the results are close to those of the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_a_heat_map_equals_that_of_the_cpu(bundle: Bundle, device: str) -> None:
    image = torch.from_numpy(Preprocess(SIDE, SIDE)(encoded("red", 3))).permute(2, 0, 1)
    expected = Occlusion(bundle.classifier("cpu"), temperature=TEMPERATURE).heat(image, 2)
    heat_map = Occlusion(bundle.classifier(torch.device(device)), temperature=TEMPERATURE).heat(image.to(device), 2)
    assert heat_map.shape == (SIDE, SIDE) and heat_map.device.type == "cpu"
    torch.testing.assert_close(heat_map, expected, atol=0.02, rtol=0)


def test_features_for_drift_equal_those_of_the_cpu(bundle: Bundle, images: Path, device: str) -> None:
    manifest = load_manifest(images)
    asked = {"task": "multiclass", "labels": manifest.labels, "temperature": TEMPERATURE}
    preprocess = Preprocess(SIDE, SIDE)
    expected = profile(bundle.classifier("cpu"), preprocess, manifest.samples, **asked).profile
    device_profile = profile(bundle.classifier(torch.device(device)), preprocess, manifest.samples, **asked).profile
    np.testing.assert_allclose(device_profile.features, expected.features, atol=2e-3)
    np.testing.assert_array_equal(device_profile.answered, expected.answered)
    assert device_profile.statistics.keys() == expected.statistics.keys()


def test_score_writes_the_predictions_of_the_cpu(bundle: Bundle, images: Path, device: str, tmp_path: Path) -> None:
    import pandas as pd

    out = tmp_path / "scores.parquet"
    summary = score_all(bundle.path, images, out, Options(device=device, jobs=1, batch_size=5))
    table = pd.read_parquet(out)
    files = sorted(images.rglob("*.jpg"))
    assert summary.rows == len(files) and table["path"].tolist() == [str(file) for file in files]
    questions = [SampleInput(file.read_bytes) for file in files]
    expected = score(
        bundle.classifier("cpu"), Preprocess(SIDE, SIDE), questions, task="multiclass", temperature=TEMPERATURE
    )
    for probabilities, answer in zip(table["probabilities"], expected, strict=True):
        np.testing.assert_allclose(probabilities, answer, atol=0.02)
