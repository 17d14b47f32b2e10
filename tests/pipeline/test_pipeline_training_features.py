"""The training features of a bundle: which images they hold, and what they say about others."""

import hashlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from sklearn.covariance import LedoitWolf
from small_data import make_image, write_image

from refract.augment import Preprocess
from refract.models.bundle.info import BundleError
from refract.models.classifier import Classifier
from refract.models.familiarity import Familiarity, distance_for
from refract.models.folding import WIDEST
from refract.models.head import head_inputs
from refract.models.registry import build
from refract.models.training_features import TrainingFeatures
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.drift.profile import folded
from refract.pipeline.features.embed import Stored
from refract.pipeline.features.model import EmbeddingModel
from refract.pipeline.features.store import FeatureStore
from refract.pipeline.training import training_features
from refract.pipeline.training.training_features import SIDE, training_features_of

PREPROCESS = Preprocess(height=64, width=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    network = build("lenet5", 3, image_size=(64, 64))
    return Classifier(network, mean=PREPROCESS.mean, std=PREPROCESS.std).eval()


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """30 training images, of which one is damaged, and 10 for validation."""
    samples = []
    for number in range(40):
        file = tmp_path / "data" / f"{number:02}.png"
        write_image(file, make_image("red", number))
        samples.append(Sample(str(file), (number % 3,), "train" if number < 30 else "val"))
    Path(samples[5].path).write_bytes(b"no image")
    return Manifest(str(tmp_path / "data"), tuple(samples), ("a", "b", "c"), "multiclass")


def embeddings(classifier: Classifier, samples: list[Sample]) -> np.ndarray:
    images = np.stack([PREPROCESS(sample.read()) for sample in samples])
    with torch.inference_mode(), head_inputs(classifier.network) as features:
        classifier(torch.from_numpy(images).permute(0, 3, 1, 2))
    rows = features[0].numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_features_describe_the_readable_training_images(classifier: Classifier, manifest: Manifest) -> None:
    training = training_features_of(classifier, PREPROCESS, manifest, task="multiclass")
    assert training is not None
    readable = {Path(sample.path).name: sample for sample in manifest.of("train") if "05" not in sample.path}
    assert sorted(training.paths) == sorted(readable) and len(training.validation) == 10
    expected = embeddings(classifier, [readable[path] for path in training.paths])
    np.testing.assert_allclose(training.features.astype(np.float32), expected, atol=1e-3)
    for path, labels, digest, thumbnail in zip(
        training.paths, training.labels, training.sha256, training.thumbnails, strict=True
    ):
        assert labels == readable[path].labels
        assert digest.tobytes() == hashlib.sha256(readable[path].read()).digest()
        assert max(cv2.imdecode(np.frombuffer(thumbnail, np.uint8), cv2.IMREAD_COLOR).shape) == SIDE
    assert training.distance == "mahalanobis"
    held = torch.from_numpy(embeddings(classifier, manifest.of("val")))
    distances = Familiarity(training, CPU).distances(held).numpy()
    np.testing.assert_allclose(training.validation, np.sort(distances), rtol=1e-3)


def test_the_same_images_are_drawn_in_each_training_and_the_size_is_bounded(
    classifier: Classifier, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paths(manifest: Manifest) -> tuple[str, ...]:
        training = training_features_of(classifier, PREPROCESS, manifest, task="multiclass")
        assert training is not None
        return training.paths

    every = paths(manifest)
    monkeypatch.setattr(training_features, "MOST_TRAINING", 12)
    few = paths(manifest.with_samples(manifest.samples[::-1]))
    assert set(few) <= set(every) and len(few) in (11, 12), "one of those drawn may be damaged"
    monkeypatch.setattr(training_features, "MOST_BYTES", 3000)
    assert paths(manifest) == few[: len(paths(manifest))] and 1 <= len(paths(manifest)) < len(few)


def test_without_a_readable_training_image_there_are_no_features(classifier: Classifier, manifest: Manifest) -> None:
    damaged = manifest.with_samples([manifest.samples[5], *manifest.of("val")])
    assert training_features_of(classifier, PREPROCESS, damaged, task="multiclass") is None


def test_images_with_a_non_finite_embedding_are_left_out(classifier: Classifier, manifest: Manifest) -> None:
    def overflow(layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        white = inputs[0].flatten(1).amin(dim=1) > 2
        return output.masked_fill(white[:, None, None, None], torch.inf)

    train, held = Path(manifest.samples[7].path), Path(manifest.samples[35].path)
    for file in (train, held):
        write_image(file, np.full((64, 64, 3), 255, np.uint8))
    first = next(layer for layer in classifier.network.modules() if isinstance(layer, torch.nn.Conv2d))
    hook = first.register_forward_hook(overflow)
    try:
        training = training_features_of(classifier, PREPROCESS, manifest, task="multiclass")
    finally:
        hook.remove()
    assert training is not None and train.name not in training.paths
    assert len(training.paths) == len(training.thumbnails) == len(training.features) == 28
    assert len(training.validation) == 9 and np.isfinite(training.validation).all()


def example(width: int = 700) -> TrainingFeatures:
    rows = folded(np.random.default_rng(0).normal(size=(3, width)).astype(np.float32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return TrainingFeatures(
        width, rows.astype(np.float16), ((0,), (), (1, 2)), np.zeros((3, 32), np.uint8), ("a", "b/ü\n", "c"),
        (b"x", b"", b"yz"), np.array([0.25, 0.5, 1.0, 1.0], np.float32),
    )  # fmt: skip


def test_familiarity_is_the_fraction_of_the_validation_images_that_are_farther() -> None:
    training = example()
    familiarity = Familiarity(training, CPU)
    embedding = np.random.default_rng(0).normal(size=(3, 700)).astype(np.float32)
    opposite = torch.from_numpy(np.concatenate([embedding * 7, -embedding.sum(axis=0, keepdims=True)]))
    assert familiarity(opposite).tolist() == [1.0, 1.0, 1.0, 0.0]
    indices, cosines = familiarity.nearest(embedding[1:2], 2)
    assert indices[0, 0] == 1 and cosines[0, 0] == pytest.approx(1, abs=2e-3) and cosines[0, 1] < 0.5
    middle = np.searchsorted(training.validation, familiarity.distances(opposite).numpy(), side="right")
    assert middle.tolist() == [0, 0, 0, 4]
    assert familiarity(torch.zeros(2, 84)).isnan().all(), "embeddings of another network"


def gaussians(count: int = 200, classes: int = 2) -> TrainingFeatures:
    """Draw unit vectors around a mean for each class; the classes differ in the first features, the images in the last ones."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 40)) * np.linspace(0.02, 0.4, 40)
    rows[np.arange(count), np.arange(count) % classes] += 2
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = tuple((number % classes,) for number in range(count))
    return TrainingFeatures(
        40, rows.astype(np.float16), labels, np.zeros((count, 32), np.uint8), ("p",) * count, (b"",) * count,
        np.array([1.0], np.float32), distance_for(labels),
    )  # fmt: skip


def test_the_distance_is_that_of_mahalanobis_to_the_nearest_class() -> None:
    training = gaussians()
    assert training.distance == "mahalanobis"
    rows = training.features.astype(np.float64)
    classes = np.arange(len(rows)) % 2
    means = np.stack([rows[classes == number].mean(axis=0) for number in (0, 1)])
    precision = LedoitWolf(assume_centered=True).fit(rows - means[classes]).precision_
    gaps = rows[:, None] - means
    expected = np.sqrt(np.einsum("ncd,de,nce->nc", gaps, precision, gaps).min(axis=1))
    distances = Familiarity(training, CPU).distances(torch.from_numpy(rows.astype(np.float32)))
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-3)


def test_a_small_change_in_a_stable_feature_is_less_familiar_than_a_large_one_in_a_varying_feature() -> None:
    training = gaussians()
    stable, varying = training.features[:1].astype(np.float32), training.features[:1].astype(np.float32)
    stable[0, 3] += 0.2
    varying[0, 39] -= 0.3
    nearest, by_class = (
        Familiarity(replace(training, distance=name), CPU).distances(
            torch.from_numpy(np.concatenate([stable, varying]))
        )
        for name in ("nearest", "mahalanobis")
    )
    assert nearest[0] < nearest[1] and by_class[0] > by_class[1]


@pytest.mark.parametrize(("count", "classes"), [(19, 2), (40, 21)])
def test_few_training_images_are_compared_with_the_nearest_one(count: int, classes: int) -> None:
    training = gaussians(count, classes)
    assert training.distance == "nearest"
    assert Familiarity(training, CPU).distances(torch.from_numpy(training.features.astype(np.float32))).max() < 1e-3


def test_equal_training_images_have_finite_distances() -> None:
    training = gaussians()
    training = replace(training, features=np.repeat(training.features[:1], 200, axis=0))
    assert (
        Familiarity(training, CPU).distances(torch.from_numpy(gaussians().features.astype(np.float32))).isfinite().all()
    )


def test_the_features_of_an_older_bundle_are_compared_with_the_nearest_image() -> None:
    arrays = load(gaussians().to_bytes())
    del arrays["distance"]
    assert TrainingFeatures.from_bytes(save(arrays), 2).distance == "nearest"
    arrays["distance"] = np.frombuffer(b"of 2031", np.uint8)
    with pytest.raises(BundleError, match="'of 2031'; known: nearest, mahalanobis; update Refract"):
        TrainingFeatures.from_bytes(save(arrays), 2)


def test_training_features_survive_their_encoding_and_damage_is_reported() -> None:
    training = example()
    read = TrainingFeatures.from_bytes(training.to_bytes(), 3)
    assert (read.width, read.labels, read.paths, read.thumbnails) == (
        training.width, training.labels, training.paths, training.thumbnails,
    )  # fmt: skip
    assert read.features.shape == (3, WIDEST)
    np.testing.assert_array_equal(read.features, training.features)
    np.testing.assert_array_equal(read.validation, training.validation)
    for data, classes in (
        (b"no safetensors", 3),
        (training.to_bytes(), 2),
        (replace(training, paths=("a",)).to_bytes(), 3),
        (replace(training, width=100).to_bytes(), 3),
    ):
        with pytest.raises(BundleError, match="training features"):
            TrainingFeatures.from_bytes(data, classes)


def test_features_from_a_store_are_those_of_the_network(
    classifier: Classifier, manifest: Manifest, tmp_path: Path
) -> None:
    model = EmbeddingModel(classifier, PREPROCESS, "0" * 64)
    stored = Stored(model, FeatureStore(tmp_path / "features", model.key, model.record), "cpu")
    direct, taken = (
        training_features_of(classifier, PREPROCESS, manifest, task="multiclass", stored=source)
        for source in (None, stored)
    )
    assert direct is not None and taken is not None
    assert (taken.paths, taken.labels, taken.thumbnails, taken.width, taken.distance) == (
        direct.paths, direct.labels, direct.thumbnails, direct.width, direct.distance,
    )  # fmt: skip
    np.testing.assert_array_equal(taken.sha256, direct.sha256)
    np.testing.assert_allclose(taken.features, direct.features, atol=1e-3)
    np.testing.assert_allclose(taken.validation, direct.validation, rtol=0.05)
