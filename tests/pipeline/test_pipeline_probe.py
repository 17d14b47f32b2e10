"""Heads fitted on embeddings: probe, knn and prototype."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from refract import cli
from refract.models.bundle.bundle import load_bundle
from refract.models.classifier import Classifier
from refract.models.head import HEADS
from refract.models.registry import build
from refract.pipeline.config.config import ConfigError, load_config
from refract.pipeline.config.defaults import filled
from refract.pipeline.data.manifest import Sample, load_manifest
from refract.pipeline.evaluation.evaluate import evaluate
from refract.pipeline.features import heads
from refract.pipeline.features.heads import Part, fit_head
from refract.pipeline.features.out_of_fold import predict_out_of_fold
from refract.pipeline.features.store import FeatureStore, stored_models
from refract.pipeline.features.training import install_head, why_not_fitted
from refract.pipeline.inference.scoring import preprocess_of
from refract.pipeline.training import fit
from refract.pipeline.training.fit import assemble
from refract.pipeline.training.run import Result, train
from refract.pipeline.training.run_directory import new_run, unfinished

MODES = ("probe", "knn", "prototype")


def blobs(count: int, classes: int = 3, width: int = 16, seed: int = 0, spread: float = 1.0) -> Part:
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * 2
    truth = np.arange(count) % classes
    features = centres[truth] + spread * draw.normal(size=(count, width)) + 3
    return Part(features.astype(np.float32), np.eye(classes, dtype=bool)[truth])


def predicted(head: torch.nn.Module, part: Part) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(head(torch.from_numpy(part.features)).argmax(dim=1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("classes", [2, 3, 11])
def test_each_mode_learns_separable_classes(mode: str, classes: int) -> None:
    fitted = fit_head(mode, blobs(110, classes), blobs(88, classes, seed=1), multilabel=False)
    test = blobs(110, classes, seed=2)
    assert (predicted(fitted.head, test) == test.targets.argmax(axis=1)).mean() > 0.9
    assert fitted.metrics["val_accuracy"] > 0.9


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_probe_is_the_logistic_regression_of_scikit_learn(
    classes: int, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "STRENGTHS", (0.1,))
    monkeypatch.setattr(heads, "TOLERANCE", 1e-7)
    monkeypatch.setattr(heads, "MOST_STEPS", 2000)
    train = blobs(90, classes, spread=3.0)
    keep = np.flatnonzero((np.arange(90) % 3 > 0) | (train.targets.argmax(axis=1) > 0))  # unequal classes
    train = Part(train.features[keep], train.targets[keep])
    fitted = fit_head("probe", train, blobs(30, classes, seed=1), multilabel=False, balanced=balanced)
    scale = np.sqrt((train.features**2).mean())
    weights = "balanced" if balanced else None
    peer = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000, fit_intercept=False, class_weight=weights)
    peer.fit(train.features.astype(float) / scale, train.targets.argmax(axis=1))
    test = blobs(60, classes, seed=2, spread=3.0)
    with torch.no_grad():
        probabilities = fitted.head(torch.from_numpy(test.features)).softmax(dim=1).numpy()
    # For two classes scikit-learn penalises the difference of the two rows of weights, which are penalised here each on its own.
    tolerance = 0.02 if classes > 2 else 0.15
    np.testing.assert_allclose(probabilities, peer.predict_proba(test.features / scale), atol=tolerance)


def test_a_multilabel_probe_is_a_regression_for_each_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "STRENGTHS", (0.1,))
    monkeypatch.setattr(heads, "TOLERANCE", 1e-7)
    draw = np.random.default_rng(3)
    features = draw.normal(size=(200, 8)).astype(np.float32)
    targets = features @ draw.normal(size=(8, 4)) + draw.normal(size=(200, 4)) > 0.5
    part = Part(features, targets)
    fitted = fit_head("probe", part, part, multilabel=True)
    scale = np.sqrt((features**2).mean())
    with torch.no_grad():
        probabilities = fitted.head(torch.from_numpy(features)).sigmoid().numpy()
    for label in range(4):
        peer = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(features / scale, targets[:, label])
        np.testing.assert_allclose(probabilities[:, label], peer.predict_proba(features / scale)[:, 1], atol=0.02)


def test_one_neighbour_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "NEIGHBOURS", (1,))
    train, test = blobs(60, 4, spread=3.0), blobs(50, 4, seed=2, spread=3.0)
    fitted = fit_head("knn", train, test, multilabel=False)
    peer = KNeighborsClassifier(1, metric="cosine").fit(train.features, train.targets.argmax(axis=1))
    assert (predicted(fitted.head, test) == peer.predict(test.features)).all()


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(2, 6), st.booleans(), st.sampled_from(["probe", "knn"]))
def test_few_images_a_class_and_no_validation_set_give_finite_logits(
    images: int, classes: int, multilabel: bool, mode: str
) -> None:
    train, none = blobs(images * classes, classes), blobs(0, classes)
    fitted = fit_head(mode, train, none, multilabel=multilabel)
    assert torch.isfinite(fitted.head(torch.from_numpy(train.features))).all()


def test_a_neighbour_head_takes_its_samples_from_the_state_dict() -> None:
    part = blobs(30)
    head = fit_head("knn", part, part, multilabel=False).head
    other = HEADS["knn"](16, 3)
    other.load_state_dict(head.state_dict())
    values = torch.from_numpy(blobs(20, seed=5).features)
    assert torch.equal(other(values), head(values))


def test_balanced_weights_raise_the_recall_of_a_rare_class() -> None:
    common, rare = blobs(300, 2, spread=6.0), blobs(300, 2, spread=6.0, seed=4)
    rows = np.flatnonzero(common.targets[:, 0] | (np.arange(300) % 20 == 1))
    train = Part(common.features[rows], common.targets[rows])
    recalls = [
        (predicted(fit_head("probe", train, rare, multilabel=False, balanced=balanced).head, rare) == 1)[
            rare.targets[:, 1]
        ].mean()
        for balanced in (False, True)
    ]
    assert recalls[1] > recalls[0] + 0.1


def out_of_fold(part: Part, contents: list[str], choice: str = "1 neighbours", mode: str = "knn") -> dict[int, int]:
    """Return row → predicted class of the samples that have an out-of-fold prediction."""
    samples = [Sample(str(row), (int(label),)) for row, label in enumerate(part.targets.argmax(axis=1))]
    held_out = predict_out_of_fold(mode, choice, part, samples, contents, multilabel=False, balanced=False, seed=0)
    predicted = held_out.logits.argmax(axis=1).tolist()
    return {int(sample.path): label for sample, label in zip(held_out.samples, predicted, strict=True)}


def test_no_head_is_measured_on_a_sample_or_a_copy_that_it_was_fitted_on() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(200) % 4
    part = Part(np.repeat(draw.normal(size=(100, 16)), 2, axis=0).astype(np.float32), np.eye(4, dtype=bool)[labels])
    part.targets[1::2] = part.targets[
        ::2
    ]  # two copies of each image have the same label, which the image does not show
    labels = part.targets.argmax(axis=1)
    apart = out_of_fold(part, [str(row) for row in range(200)])
    together = out_of_fold(part, [str(row // 2) for row in range(200)])
    right = [np.mean([labels[row] == label for row, label in predictions.items()]) for predictions in (apart, together)]
    assert len(apart) == len(together) == 200 and right[0] > 0.7 and right[1] < 0.5


def test_a_label_that_only_one_fold_has_is_not_checked() -> None:
    part = blobs(61, 3)
    part.targets[60] = False
    targets = np.concatenate([part.targets, np.arange(61)[:, None] == 60], axis=1)
    predictions = out_of_fold(Part(part.features, targets), [str(row) for row in range(61)], "C = 1", "probe")
    assert sorted(predictions) == list(range(60))
    two = blobs(2, 2)
    assert out_of_fold(two, ["a", "b"]) == {}, "the other fold has no sample of the class"


def trained(folder: Path, **values: object) -> Result:
    settings: dict[str, object] = {
        "data.source": folder, "data.workers": 0, "model.name": "resnet20", "trainer.precision": "fp32", "trainer.run_name": "run",
        "tracking.enabled": "false", "evaluation.robustness": "none", **values,
    }  # fmt: skip
    result = train(load_config(None, [f"--{key}={value}" for key, value in settings.items()]))
    assert result is not None
    return result


@pytest.mark.parametrize("mode", MODES)
def test_training_by_a_mode_writes_an_ordinary_bundle(
    mode: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "refract.pipeline"):
        result = trained(folder, **{"model.mode": mode})
    assert result.metrics["accuracy"] > 0.9
    bundle = load_bundle(result.bundle)
    assert bundle.info.network["args"] == ({} if mode == "probe" else {"head": "knn" if mode == "knn" else "cosine"})
    golden = bundle.golden_samples[0]
    from refract.pipeline.inference.scoring import SampleInput, preprocess_of, score

    rows = score(
        bundle.classifier(), preprocess_of(bundle.info), [SampleInput(lambda: golden.data)], task=bundle.info.task,
        temperature=bundle.info.temperature,
    )  # fmt: skip
    np.testing.assert_allclose(next(iter(rows)), golden.probabilities, atol=1e-4)
    history = json.loads((result.run_dir / "history.json").read_text())
    assert len(history) == 1
    assert {"train_loss", "val_loss", "val_accuracy"} <= {*history[0]}
    assert "augment.policy, optim and trainer.max_epochs have no effect" in caplog.text


def test_a_second_training_takes_the_embeddings_from_the_store(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "refract.pipeline"):
        trained(folder, **{"model.mode": "probe"})
        first = caplog.text
        trained(folder, **{"model.mode": "knn", "trainer.run_name": "second"})
    assert "48 embeddings computed, 0 from" in first
    assert "0 embeddings computed, 48 from" in caplog.text


def weights_of(result: Result) -> dict[str, torch.Tensor]:
    return load_bundle(result.bundle).classifier().network.state_dict()


def test_linear_then_fine_tune_starts_from_the_probe_and_trains_all_layers(folder: Path) -> None:
    probe = weights_of(trained(folder, **{"model.mode": "probe"}))
    values = {"model.mode": "linear-then-fine-tune", "trainer.max_epochs": 1, "augment.policy": "none"}
    still = trained(folder, **values, **{"trainer.run_name": "still", "optim.lr": 1e-9, "optim.weight_decay": 0})
    assert load_bundle(still.bundle).info.config["model"]["unfreeze_epochs"] == 0
    assert json.loads((still.run_dir / "history.json").read_text())[0]["val_accuracy"] > 0.9
    for key in ("head.weight", "stem.0.weight"):
        torch.testing.assert_close(weights_of(still)[key], probe[key], rtol=1e-4, atol=1e-5)
    moved = weights_of(trained(folder, **values, **{"trainer.run_name": "moved"}))
    assert all((moved[key] - probe[key]).abs().max() > 1e-4 for key in ("head.weight", "stem.0.weight"))


@pytest.mark.parametrize(
    "key", ["model.head=mlp", "text.name=hashing", "trainer.devices=2", "model.weights=models:/a/1"]
)
def test_linear_then_fine_tune_trains_its_head_by_epochs_where_embeddings_do_not_fit(key: str) -> None:
    config = load_config(None, ["--model.mode=linear-then-fine-tune", f"--{key}"])
    assert filled(config).model.unfreeze_epochs == 1
    assert filled(config.changed({"model.unfreeze_epochs": 3})).model.unfreeze_epochs == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model.mode": "linear-then-fine-tune", "model.head": "mlp"},
            "model.head: mlp is not linear; set model.unfreeze_epochs: 1",
        ),
        ({"model.mode": "gradual"}, "0 with gradual trains all layers at once; set model.mode: fine-tune"),
    ],
)
def test_no_epochs_of_the_head_alone_are_refused_where_nothing_fits_it(
    folder: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(folder, **{"model.unfreeze_epochs": 0, **values})


def test_torchrun_trains_the_head_by_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["--model.mode=linear-then-fine-tune"])
    assert filled(config).model.unfreeze_epochs == 0
    for key, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    assert filled(config).model.unfreeze_epochs == 1


def test_the_head_of_large_data_is_trained_by_epochs_unless_the_user_fits_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"data.source": folder, "data.workers": 0, "data.image_size": 24, "model.mode": "linear-then-fine-tune"}
    config = load_config(None, [f"--{key}={value}" for key, value in values.items()])
    assembly = assemble(config)
    assert assembly.config.model.unfreeze_epochs == 0
    monkeypatch.setattr(fit, "LARGEST_FIT", len(assembly.manifest.of("train")) * fit.FEW_LABELS - 1)
    assert assemble(config).config.model.unfreeze_epochs == 1
    assert assemble(config.changed({"model.unfreeze_epochs": 0})).module.unfreeze_epochs == 0


def test_a_network_that_cannot_have_a_fitted_head_trains_it_by_epochs(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fastnet's head has no bias, and its logits are scaled."""
    settings = {
        "data.source": folder, "data.workers": 0, "data.image_size": 24, "model.name": "fastnet",
        "model.mode": "linear-then-fine-tune", "trainer.device": "cpu", "tracking.enabled": "false",
    }  # fmt: skip
    config = load_config(None, [f"--{key}={value}" for key, value in settings.items()])
    with caplog.at_level(logging.INFO, "refract.pipeline"):
        assembly = assemble(config)
    assert assembly.config.model.unfreeze_epochs == assembly.module.unfreeze_epochs == 1
    assert "the head is trained alone for one epoch: fastnet has a Linear as its last layer" in caplog.text
    run = new_run(assembly.config, "fast", {"fingerprint": "f", "versions": {}})
    assert unfinished(config, "fast") == run.path, "--resume auto finds it"
    with pytest.raises(ConfigError, match="but fastnet has a Linear as its last layer.*set model.unfreeze_epochs: 1"):
        assemble(config.changed({"model.unfreeze_epochs": 0}))


class Scaled(torch.nn.Linear):
    """A layer that is not linear in the sense of a fitted head, although its class is derived from one."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(values)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([torch.nn.Flatten(), torch.nn.Linear(192, 5)], None),
        ([torch.nn.Conv2d(3, 5, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()], None),
        ([torch.nn.Flatten(), torch.nn.Linear(192, 5), torch.nn.LogSoftmax(1)], "computes more after its last layer"),
        ([torch.nn.Flatten(), torch.nn.Linear(192, 5), torch.nn.Softplus()], "computes more after its last layer"),
        ([torch.nn.Flatten(), torch.nn.Linear(192, 5, bias=False)], "has a Linear as its last layer, not a linear"),
        ([torch.nn.Flatten(), Scaled(192, 5)], "has a Scaled as its last layer"),
        ([torch.nn.Conv2d(3, 5, 8), torch.nn.Flatten()], "has a Conv2d as its last layer"),
    ],
)
def test_a_head_is_fitted_only_if_it_is_linear_and_last(layers: list[torch.nn.Module], reason: str | None) -> None:
    network = torch.nn.Sequential(*layers)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)  # as those of a new head
    classifier = Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3).train()
    assert str(why_not_fitted(classifier, (8, 8))).startswith(str(reason))
    assert classifier.training and all((parameter == 0).all() for parameter in network.parameters())


def test_the_labels_of_all_images_are_checked(folder: Path) -> None:
    classes = sorted(path.name for path in folder.iterdir())
    wrong = set()
    for place, other in zip(classes, classes[1:] + classes[:1], strict=True):
        moved = (folder / place / "03.jpg").rename(folder / other / f"from-{place}.jpg")
        wrong.add(str(moved))
    run_dir = trained(folder, **{"model.mode": "knn"}).run_dir
    report = json.loads((run_dir / "report.json").read_text())
    assert report["labels_checked"] == 60
    assert set(report["likely_label_errors"]) == wrong
    assert "The labels of 60 samples were checked" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.head": "mlp"}, "model.head: mlp cannot be combined with model.mode: probe"),
        ({"trainer.devices": 2}, "fits in one process"),
        ({"trainer.quantization_aware": True}, "adapts all layers, which model.mode: probe does not train"),
        ({"text.name": "hashing"}, "text.name: none"),
    ],
)
def test_a_setting_that_excludes_the_mode_is_refused(folder: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(folder, **{"model.mode": "probe", **values})


def test_a_network_whose_last_layer_cannot_be_fitted_is_refused() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 3, 3))
    with pytest.raises(ConfigError, match="the last layer of net is a Conv2d.*set model.mode: feature-extract"):
        install_head(network, torch.nn.Linear(8, 3), "net")


def test_prototypes_of_multi_label_data_are_refused(tmp_path: Path, folder: Path) -> None:
    paths = sorted(folder.rglob("*.jpg"))
    table = "path,label\n" + "\n".join(f"{path},{'a;b' if row % 2 else 'a'}" for row, path in enumerate(paths))
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(ConfigError, match="needs one label per image"):
        trained(tmp_path / "labels.csv", **{"model.mode": "prototype"})


def test_the_monitored_score_of_multi_label_is_the_mean_average_precision(tmp_path: Path, folder: Path) -> None:
    paths = sorted(folder.rglob("*.jpg"))
    rows = [f"{path},{path.parent.name}{';all' if row % 5 else ''}" for row, path in enumerate(paths)]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(rows))
    result = trained(tmp_path / "labels.csv", **{"model.mode": "probe"})
    history = json.loads((result.run_dir / "history.json").read_text())
    bundle = load_bundle(result.bundle)
    samples = [s for s in load_manifest(result.run_dir / "splits.csv", "multilabel").samples if s.split == "val"]
    measured = evaluate(
        bundle.classifier(), preprocess_of(bundle.info), samples, task="multilabel", labels=bundle.info.labels
    )
    assert history[0]["val_map"] == pytest.approx(measured.metrics["mean_average_precision"], abs=0.02)


def test_training_keeps_the_test_images_in_the_list_of_the_source(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(build("resnet20", 3, image_size=(32, 32)).state_dict(), tmp_path / "weights.safetensors")
    given = ["--model", "resnet20", "--weights", str(tmp_path / "weights.safetensors"), "--image-size", "32"]
    assert cli.main(["embed", str(folder), *given]) == 0
    trained(folder, **{"model.mode": "probe", "model.weights": tmp_path / "weights.safetensors", "data.image_size": 32})
    ((key, record),) = stored_models(Path("features"))
    assert len(FeatureStore(Path("features"), key, record).samples()) == 60


def test_search_finds_the_model_of_a_training_in_its_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(folder, **{"model.mode": "probe", "data.crop_ratio": 0.5})
    image = str(min(folder.rglob("*.jpg")))
    assert cli.main(["search", "features", image, "--top", "1"]) == 0
    assert "1.000" in capsys.readouterr().out
