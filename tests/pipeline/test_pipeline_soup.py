"""`refract soup`: which runs the average has, its batch norms, its bundle, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refract import output
from refract.augment import Preprocess
from refract.models.bundle.bundle import load_bundle
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.pipeline.cli import soup
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.evaluation.compare import read_run
from refract.pipeline.evaluation.evaluate import evaluate
from refract.pipeline.inference.scoring import preprocess_of
from refract.pipeline.training.averages import AverageScorer, WeightSum
from refract.pipeline.training.run import train
from refract.pipeline.training.run_directory import stored_config
from refract.pipeline.training.soup import make_soup

pytestmark = pytest.mark.slow


def config(root: Path, name: str, **trainer: object) -> Config:
    return config_from_dict(
        {
            "data": {"source": "digits", "image_size": 8, "resize": "squash", "batch_size": 128, "val_fraction": 0.2},
            "model": {"name": "cnn", "args": {"widths": [8, 16]}},
            "trainer": {"max_epochs": 1, "run_name": name, "runs_dir": str(root), "device": "cpu", **trainer},
            "tracking": {"enabled": False}, "evaluation": {"robustness": "none"},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `start`; `a` and `b`, which are trained on from it; and `bad`, trained on at a learning rate that ruins the weights."""
    root = tmp_path_factory.mktemp("runs")
    train(config(root, "start", max_epochs=3).changed({"optim.lr": 0.01}))
    fine = {"model.weights": str(root / "start" / "bundle"), "optim.name": "sgd"}
    for name, changes in {"a": {"optim.lr": 0.01}, "b": {"optim.lr": 0.03}, "bad": {"optim.lr": 5.0}}.items():
        train(config(root, name).changed({**fine, **changes}))
    return root


def test_the_greedy_average_is_a_run_without_the_run_that_lowers_its_validation_accuracy(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, target = [root / name for name in ("bad", "a", "b")], tmp_path / "soup"
    with output.applied(output.Modes(json=True)):
        assert soup.main([*map(str, runs), "-o", str(target)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == json.loads((target / "soup.json").read_text())
    members = {Path(member["run"]).name: member for member in result["members"]}
    assert not members["bad"]["averaged"] and members["bad"]["with_it"] < result["score"]
    assert f"not averaged: the average would have {members['bad']['with_it']:.4f}" in captured.err
    best = Path(result["members"][0]["run"])
    assert f"{target} against {best}, the best on validation, on 359 images: accuracy " in captured.err
    assert result["score"] >= max(member["score"] for member in members.values())
    # An ordinary run's bundle: its metrics, calibration and golden samples are those of its weights.
    bundle = load_bundle(target / "bundle")
    assert len(bundle.golden_samples) == 8 and bundle.reference() is not None
    assert bundle.info.data["average of"] == ", ".join(m["run"] for m in result["members"] if m["averaged"])
    manifest, _ = prepare_data(stored_config(target))
    options = {"task": "multiclass", "labels": manifest.labels, "temperature": bundle.info.temperature}
    again = evaluate(bundle.classifier(), preprocess_of(bundle.info), manifest.of("test"), **options)
    assert again.metrics == pytest.approx(bundle.info.metrics, abs=1e-6)
    assert read_run(target).metrics == bundle.info.metrics == result["metrics"]
    assert {"report.html", "report.json", "splits.csv", "config.yaml", "holdout.npz"} <= {
        p.name for p in target.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".soup")] == []
    assert soup.main([*map(str, runs), "-o", str(target)]) == 2
    assert f"refract soup: -o: {target} exists already; choose another name" in capsys.readouterr().err


def test_the_uniform_average_has_the_mean_weights_and_its_own_statistics(root: Path, tmp_path: Path) -> None:
    weight_soup = make_soup([root / "a", root / "bad"], tmp_path / "soup", "uniform")
    assert [member.averaged for member in weight_soup.members] == [True, True]
    a, bad, mean = (
        load_file(run / "bundle" / "weights.safetensors") for run in (root / "a", root / "bad", tmp_path / "soup")
    )
    parameters = [name for name in mean if "running" not in name and mean[name].is_floating_point()]
    assert all(torch.allclose(mean[name], (a[name] + bad[name]) / 2, atol=1e-6) for name in parameters)
    variances = [name for name in mean if name.endswith("running_var")]
    assert variances and not any(torch.allclose(mean[name], (a[name] + bad[name]) / 2, rtol=0.05) for name in variances)


def test_recomputed_statistics_are_those_of_the_training_images() -> None:
    """The input of the first batch norm is a fixed convolution of the images, so its statistics can be computed directly."""
    manifest, _ = prepare_data(config(Path("runs"), "x"))
    classifier = Classifier(build("cnn", 10, image_size=(8, 8), widths=[4]), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    seen: list[torch.Tensor] = []
    norm = next(module for module in classifier.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]) if module.training else None)
    scorer = AverageScorer(classifier, Preprocess(8, 8, resize="squash"), manifest, batch_size=256, seed=0)
    weights = scorer.weights()
    other = {name: value + 1 if name.endswith("running_mean") else value for name, value in weights.items()}
    scorer.recompute_differing([weights, weights])
    assert scorer.norms == ()
    scorer.recompute_differing([weights, other])
    scorer.score(weights, is_average=True)
    count = sum(map(len, seen))
    assert count == len(manifest.of("train")) and norm.running_mean is not None
    expected = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in seen]).mean(dim=0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)
    assert not any(module.training for module in classifier.modules())


def test_the_mean_of_equal_weights_is_exact() -> None:
    weights = {"w": torch.rand(100), "steps": torch.tensor(7)}
    total = WeightSum()
    total.add(weights)
    total.add(weights)
    mean = total.mean_with(weights)
    assert torch.equal(mean["w"], weights["w"]) and mean["w"].dtype == torch.float32 and int(mean["steps"]) == 7


def altered(root: Path, target: Path, change: str, **values: object) -> Path:
    """A copy of the run `a` whose bundle has other values in its record; the checksums are right."""
    from refract.models.bundle.verified_directory import open_verified_directory, write_verified_directory

    shutil.copytree(root / "a", target)
    folder = open_verified_directory(target / "bundle")
    contents = {name: folder.read(name) for name in folder.files}
    record = json.loads(contents["bundle.json"])
    record[change] = {**record[change], **values} if isinstance(record[change], dict) else values[change]
    contents["bundle.json"] = json.dumps(record).encode()
    shutil.rmtree(target / "bundle")
    write_verified_directory(target / "bundle", contents, check=lambda _: None)
    return target


@pytest.mark.parametrize(
    ("change", "values", "words"),
    [
        ("network", {"args": {"widths": [8, 32]}}, r"differ in network.args.widths: \[8, 16\] and \[8, 32\]; average runs with"),
        ("preprocess", {"crop_ratio": 0.5}, r"differ in preprocess.crop_ratio: 0.875 and 0.5; average runs"),
        ("labels", {"labels": [*"0123456789"][::-1]}, r"differ in labels.0: 0 and 9; average runs"),
        ("data", {"fingerprint": "x"}, r"differ in their data or splits, so they have no common validation set; .* trainer.seed, or with"),
    ],
)  # fmt: skip
def test_runs_that_differ_are_refused_with_both_values(
    root: Path, tmp_path: Path, change: str, values: dict[str, object], words: str
) -> None:
    other = altered(root, tmp_path / "other", change, **values)
    with pytest.raises(ConfigError, match=rf"^{root / 'a'} and {other} {words}"):
        make_soup([root / "a", other], tmp_path / "soup")


def test_folds_and_one_run_named_twice_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a run is named twice; name each run once"):
        make_soup([root / "a", root / "b" / ".." / "a"], tmp_path / "soup")
    for fold in (1, 2):
        shutil.copytree(root / "a", tmp_path / f"fold-{fold}")
        text = (root / "a" / "config.yaml").read_text()
        text = text.replace("fold: null", f"fold: {fold}").replace("folds: 0", "folds: 2")
        (tmp_path / f"fold-{fold}" / "config.yaml").write_text(text)
    words = (
        "differ in trainer.fold: 1 and 2. Each was trained on validation samples of the other, .* with trainer.folds: 0"
    )
    with pytest.raises(ConfigError, match=words):
        make_soup([tmp_path / "fold-1", tmp_path / "fold-2"], tmp_path / "soup")


def test_runs_that_start_from_different_weights_get_a_warning(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight_soup = make_soup([root / "start", root / "a"], tmp_path / "soup")
    assert "the runs start from different weights, and averages of such runs are usually worse" in caplog.text
    assert np.isfinite(list(weight_soup.metrics.values())).all()
