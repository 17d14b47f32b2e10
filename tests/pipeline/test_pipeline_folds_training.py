"""A training in folds: K runs, out-of-fold predictions, one report, one parent run in MLflow, and resuming."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file
from small_data import COLORS, make_image, table, write_image

from refract import output
from refract.models.bundle.bundle import load_bundle
from refract.pipeline.cli import rerun, train
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.evaluation.folds import spread_of
from refract.pipeline.training.folds import train_folds

pytestmark = pytest.mark.slow

WRONG = {f"{label}/{number:03}.png" for label in COLORS for number in range(0, 100, 6)}
"""Images of another color than their label."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> Path:
    """images/, and the finished training runs/three in three folds."""
    root = tmp_path_factory.mktemp("folds")
    for label in COLORS:
        for number in range(100):
            name = f"{label}/{number:03}.png"
            others = [color for color in COLORS if color != label]
            real = others[number // 6 % 2] if name in WRONG else label
            write_image(root / "images" / name, make_image(real, number + 100 * len(label))[:, :24])
    shutil.copy(new_tracking, root / "mlflow.db")
    train_folds(config(root))
    return root


def config(root: Path) -> Config:
    return config_from_dict(
        {
            "data": {"source": str(root / "images"), "image_size": 24, "workers": 0, "batch_size": 32},
            "model": {"name": "cnn", "args": {"widths": [8, 16]}}, "optim": {"lr": 0.01},
            "trainer": {"max_epochs": 5, "folds": 3, "run_name": "three", "runs_dir": str(root / "runs"), "device": "cpu"},
            "tracking": {"uri": f"sqlite:///{root}/mlflow.db", "model_name": "colors"}, "evaluation": {"robustness": "none"},
        }
    )  # fmt: skip


def test_each_sample_is_predicted_once_by_a_model_that_was_not_trained_on_it(root: Path) -> None:
    run = root / "runs" / "three"
    rows = pd.read_parquet(run / "out_of_fold.parquet")
    assert list(rows) == ["path", "label", "probabilities", "fold", "sha256"]
    splits = {fold: pd.read_csv(run / f"fold-{fold}" / "splits.csv") for fold in (1, 2, 3)}
    tests = [set(each.path[each.split == "test"]) for each in splits.values()]
    assert tests[0] == tests[1] == tests[2] and len(rows) + len(tests[0]) == 300
    for fold, each in splits.items():
        assert set(rows.path[rows.fold == fold]) == set(each.path[each.split == "val"])
    row = rows.iloc[0]
    (answer,) = [bundle_prediction(run / f"fold-{row.fold}" / "bundle", row.path)]
    assert np.allclose(answer, row.probabilities, atol=1e-5)


def bundle_prediction(path: Path, image: str) -> np.ndarray:
    from refract.pipeline.inference.scoring import SampleInput, preprocess_of, score

    bundle = load_bundle(path)
    inputs = [SampleInput(Path(image).read_bytes)]
    options = {"task": bundle.info.task, "temperature": bundle.info.temperature}
    (row,) = score(bundle.classifier(), preprocess_of(bundle.info), inputs, **options)
    assert isinstance(row, np.ndarray)
    return row


def test_the_report_has_the_spread_and_the_planted_label_errors(root: Path) -> None:
    run = root / "runs" / "three"
    numbers = json.loads((run / "report.json").read_text())
    folds = numbers["folds"]
    assert folds["count"] == 3 and {"accuracy", "macro_f1", "nll"} <= set(folds["out_of_fold"]) & set(folds["test"])
    bundles = [load_bundle(run / f"fold-{fold}" / "bundle").info for fold in (1, 2, 3)]
    assert folds["test"]["accuracy"]["values"] == [info.metrics["accuracy"] for info in bundles]
    rows = pd.read_parquet(run / "out_of_fold.parquet")
    labels = np.array(bundles[0].labels)
    right = labels[np.stack(rows.probabilities).argmax(axis=1)] == rows.label
    assert folds["out_of_fold"]["accuracy"]["values"] == pytest.approx(right.groupby(rows.fold).mean().tolist())
    assert numbers["metrics"]["accuracy"] == pytest.approx(right.mean())
    suspects = {"/".join(Path(path).parts[-2:]) for path in numbers["likely_label_errors"]}
    planted = {"/".join(Path(path).parts[-2:]) for path in rows.path} & WRONG
    assert suspects <= planted and len(suspects) > 0.6 * len(planted), (
        len(suspects & planted),
        suspects - planted,
        len(planted),
    )
    html = (run / "report.html").read_text()
    assert "Spread over the folds" in html and "serve none of their bundles" in html


def test_the_interval_allows_for_the_overlap_of_the_training_sets() -> None:
    """For three folds: t(0.975, 2) = 4.3027, times s = 0.02, times the root of 1/3 + 1/2."""
    spread = spread_of("nll", [0.80, 0.82, 0.84])
    assert spread.mean == pytest.approx(0.82) and spread.deviation == pytest.approx(0.02)
    assert (spread.low, spread.high) == pytest.approx((0.82 - 0.078555, 0.82 + 0.078555), abs=1e-5)
    assert spread_of("accuracy", [0.90, 0.96, 1.0]).high == 1


def test_mlflow_has_one_parent_with_the_folds_as_children_and_no_version(root: Path) -> None:
    client = MlflowClient(f"sqlite:///{root}/mlflow.db", f"sqlite:///{root}/mlflow.db")
    runs = {
        run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    }
    assert set(runs) == {"three", "fold-1", "fold-2", "fold-3"}
    parent = runs.pop("three")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.data.tags["folds.run"] for run in runs.values()} == {"three"}
    numbers = json.loads((root / "runs" / "three" / "report.json").read_text())["folds"]
    assert parent.data.metrics["test_accuracy_mean"] == pytest.approx(numbers["test"]["accuracy"]["mean"])
    assert parent.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"report.html", "report.json", "out_of_fold.parquet", "config.yaml", "run.json"}
    assert not client.search_registered_models()


def test_a_killed_training_keeps_finished_folds_and_trains_the_others(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state after a kill: fold 2 had no record yet, fold 3 had lost its bundle, and nothing was assessed."""
    source, run = root / "runs" / "three", tmp_path / "runs" / "three"
    shutil.copytree(source, run)
    text = (run / "config.yaml").read_text().replace("enabled: true", "enabled: false")
    for folder in (run, run / "fold-3"):
        (folder / "config.yaml").write_text(text.replace("fold: null", "fold: 3") if folder != run else text)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "finished": False}))
    for name in ("report.html", "out_of_fold.parquet", "fold-2/run.json"):
        (run / name).unlink()
    shutil.rmtree(run / "fold-3" / "bundle")
    mtime = (run / "fold-1" / "bundle" / "manifest.json").stat().st_mtime_ns
    with output.applied(output.Modes(json=True)):
        assert train.main(["--resume", str(run)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["run_dir"] == str(run) and result["count"] == 3 and result["likely_label_errors"]
    assert "registry: no version of colors" in captured.err and "--trainer.folds 0; " in captured.err
    assert (run / "fold-1" / "bundle" / "manifest.json").stat().st_mtime_ns == mtime
    for fold in (2, 3):
        weights = [load_file(path / f"fold-{fold}" / "bundle" / "weights.safetensors") for path in (source, run)]
        assert all((weights[0][key] == value).all() for key, value in weights[1].items())
    before, after = (pd.read_parquet(path / "out_of_fold.parquet") for path in (source, run))
    assert (before.path == after.path).all() and np.array_equal(
        np.stack(before.probabilities), np.stack(after.probabilities)
    )
    assert train.main(["--resume", str(run)]) == 2
    assert rerun.main([str(run)]) == 2
    errors = capsys.readouterr().err
    assert f"{run} is finished already\n" in errors
    assert f"{run}: has the runs of 3 folds; repeat one of them, such as {run}/fold-1" in errors


def test_several_ranks_are_refused(root: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.folds: 3 trains in one process, got 2 ranks .*; set trainer.devices: 1"
    ):
        train_folds(config(root).changed({"trainer.devices": 2, "trainer.run_name": "ranks"}))


def test_multi_label_folds_are_measured_with_thresholds(tmp_path: Path) -> None:
    sets = ["blue", "red", "blue;red", ""]
    for number in range(64):
        colors = [color for color in sets[number % 4].split(";") if color]
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3))
        halves = [make_image(color, number)[:, :12] for color in (colors * 2)[:2]] or [noise]
        write_image(tmp_path / f"{number:02}.png", np.hstack(halves).astype(np.uint8))
    rows = [[f"{number:02}.png", sets[number % 4]] for number in range(64)]
    values = {
        "data": {"source": str(table(tmp_path / "m.csv", rows, ["path", "label"])), "task": "multilabel", "image_size": 24, "workers": 0},
        "trainer": {"max_epochs": 2, "folds": 2, "run_name": "two", "runs_dir": str(tmp_path / "runs"), "device": "cpu"},
        "model": {"name": "cnn", "args": {"widths": [8]}}, "tracking": {"enabled": False}, "evaluation": {"robustness": "none"},
    }  # fmt: skip
    result = train_folds(config_from_dict(values))
    predictions = pd.read_parquet(result.run_dir / "out_of_fold.parquet")
    by_fold = predictions.groupby("fold").label.value_counts().unstack()
    assert set(by_fold.columns) == set(sets) and by_fold.max().max() - by_fold.min().min() <= 2
    numbers = json.loads((result.run_dir / "report.json").read_text())
    assert {"sample_f1", "macro_f1"} <= set(numbers["folds"]["out_of_fold"]) and "likely_wrong_labels" in numbers
    thresholds = [load_bundle(result.run_dir / f"fold-{fold}" / "bundle").info.thresholds for fold in (1, 2)]
    assert [row["threshold"] for row in numbers["per_class"]] == pytest.approx(np.mean(thresholds, axis=0).tolist())
