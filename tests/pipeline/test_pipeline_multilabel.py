"""A multi-label classifier end to end: its thresholds, the metrics, and the commands that use them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_data import COLORS, Run, make_image, write_image

from refract.augment import Preprocess
from refract.models.bundle.bundle import Bundle, load_bundle
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.data.manifest import Sample, load_manifest
from refract.pipeline.evaluation.evaluate import probabilities_of, truth_of
from refract.pipeline.evaluation.multilabel import set_errors
from refract.pipeline.evaluation.robustness import Effort, measure_robustness
from refract.pipeline.retraining.gate import measure
from refract.pipeline.training.run import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train runs/m on m.csv: each row has a colour and, for dark images, `dark`; every tenth row of val and test lacks its colour."""
    root = tmp_path_factory.mktemp("multilabel")
    rows = []
    for label in COLORS:
        for number in range(60):
            dark = number % 8 == 0
            pixels = make_image(label, number) // (3 if dark else 1)
            write_image(root / "images" / f"{label}-{number:02}.png", pixels)
            split = "train" if number < 30 else "val" if number < 45 else "test"
            names = [label] if split == "train" or number % 10 else []
            rows.append(
                {"path": f"images/{label}-{number:02}.png", "label": ";".join(names + ["dark"] * dark), "split": split}
            )
    pd.DataFrame(rows).to_csv(root / "m.csv", index=False)
    values = {
        "data": {"source": str(root / "m.csv"), "task": "multilabel", "image_size": 24, "workers": 0, "batch_size": 16},
        "model": {"name": "cnn", "args": {"widths": [8, 16]}}, "optim": {"lr": 0.005},
        "trainer": {"max_epochs": 4, "run_name": "m", "runs_dir": str(root / "runs"), "device": "cpu"},
        "tracking": {"enabled": False}, "evaluation": {"precision": 0.99, "robustness": "quick"},
    }  # fmt: skip
    train(config_from_dict(values))
    return root


@pytest.fixture(scope="module")
def bundle(root: Path) -> Bundle:
    return load_bundle(root / "runs" / "m" / "bundle")


@pytest.fixture(scope="module")
def report(root: Path) -> dict:
    return json.loads((root / "runs" / "m" / "report.json").read_text())


@pytest.fixture(scope="module")
def held(root: Path, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Return (predicted labels of the test images by the bundle's thresholds, truth)."""
    manifest = load_manifest(root / "m.csv", "multilabel")
    given = probabilities_of(
        bundle.classifier(), Preprocess.from_dict(bundle.info.preprocess), manifest.of("test"), task="multilabel",
        temperature=bundle.info.temperature,
    )  # fmt: skip
    return given >= np.float32(bundle.info.thresholds), truth_of(manifest.of("test"), "multilabel", 4)


def test_thresholds_are_chosen_and_used_by_the_metrics(bundle: Bundle, report: dict, held) -> None:
    info, (answers, truth) = bundle.info, held
    assert len(info.thresholds) == 4 and all(0 < value < 1 for value in info.thresholds)
    assert set(info.thresholds) != {0.5}
    assert info.metrics["subset_accuracy"] == pytest.approx((answers == truth).all(axis=1).mean())
    assert (
        info.metrics["sample_f1"] == pytest.approx(1 - set_errors(answers, truth).mean())
        and info.metrics["sample_f1"] > 0.6
    )
    assert [row["threshold"] for row in report["per_class"]] == list(info.thresholds)
    assert {"macro_f1", "micro_f1", "sample_f1", "subset_accuracy"} == set(report["intervals"])
    for name, (low, high) in report["intervals"].items():
        assert low < info.metrics[name] <= high
    assert all("calibration_error" in row and len(row["f1_interval"]) == 2 for row in report["per_class"])


def test_the_report_has_the_sections_of_a_single_label_report(root: Path, report: dict) -> None:
    assert (
        report["robustness"]["interval"][0]
        < report["robustness"]["mean_corruption_error"]
        < report["robustness"]["interval"][1]
    )
    assert len(report["robustness"]["errors"]) == 19 and 0 < report["abstaining"]["abstain_below"] <= 1
    wrong = report["likely_wrong_labels"]
    assert wrong and {row["kind"] for row in wrong[:3]} == {"missing"}, "colours were taken away"
    assert all(int(Path(row["path"]).stem[-2:]) % 10 == 0 for row in wrong[:3])
    html = (root / "runs" / "m" / "report.html").read_text()
    for words in (
        "Risk and coverage",
        "Labels that are likely wrong",
        "likely missing: ",
        "<th>threshold</th>",
        "sample F1",
    ):
        assert words in html


def test_predict_score_and_evaluate_use_the_bundles_thresholds(
    refract: Run, root: Path, bundle: Bundle, report: dict, held, tmp_path: Path
) -> None:
    answers, truth = held
    table = pd.read_csv(root / "m.csv", keep_default_na=False)
    test = table[table.split == "test"].assign(path=lambda rows: [str(root / path) for path in rows.path])
    test.to_csv(tmp_path / "test.csv", index=False)
    printed = refract("score", bundle.path, "test.csv", "-o", "s.parquet", "--jobs", 1).stdout
    scored = pd.read_parquet(tmp_path / "s.parquet")
    named = [[bundle.info.labels[k] for k in np.flatnonzero(row)] for row in answers]
    assert [list(labels) for labels in scored.labels] == named
    lines = refract("predict", bundle.path, *test.path[:6], "--json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["labels"] for row in rows] == named[:6]
    assert [row["abstain"] for row in rows] == scored.abstain[:6].tolist()
    labelled = test.label.to_numpy() != ""
    exact = int((answers == truth).all(axis=1)[labelled].sum())
    assert (
        f"labels are exactly the manifest's in {exact} of {labelled.sum()}" in printed
        and "mean F1 of a row's labels" in printed
    )
    again = refract(
        "evaluate", bundle.path, root / "m.csv", "--robustness", "quick", "--json", "e.json", "--report", "rep"
    ).stdout
    evaluation = json.loads((tmp_path / "e.json").read_text())
    assert evaluation["metrics"]["macro_f1"] == pytest.approx(bundle.info.metrics["macro_f1"])
    assert evaluation["robustness"]["mean_corruption_error"] == pytest.approx(bundle.info.metrics["corruption_error"])
    assert "threshold" in again and "error under corruptions" in again and "95 % interval" in again
    assert (tmp_path / "rep" / "report.html").is_file()


def test_runs_are_compared_by_subset_accuracy_and_drift_is_measured(refract: Run, root: Path, bundle: Bundle) -> None:
    run = root / "runs" / "m"
    assert "subset accuracy +0.0000" in refract("compare", run, run).stdout
    refract("drift", bundle.path, root / "m.csv")


def test_robustness_counts_labels_that_the_classifier_lacks(root: Path, bundle: Bundle) -> None:
    samples = load_manifest(root / "m.csv", "multilabel").of("test")
    strange = [Sample(sample.path, (*sample.labels, -1)) for sample in samples]
    options = {"task": "multilabel", "thresholds": bundle.info.thresholds, "temperature": bundle.info.temperature}
    known, unknown = (
        measure_robustness(bundle.classifier(), Preprocess(24, 24), some, Effort(10, (1,)), **options)
        for some in (samples, strange)
    )
    assert unknown.clean > known.clean and unknown.mean_error > known.mean_error


def test_the_gate_measures_robustness(root: Path, bundle: Bundle) -> None:
    manifest = load_manifest(root / "m.csv", "multilabel")
    held = manifest.with_samples(manifest.of("test"))
    measured = measure(bundle, held, True)
    assert measured.error is not None and 0 < measured.error < 1
