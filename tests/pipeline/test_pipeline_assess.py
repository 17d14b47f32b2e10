"""The assessment after a training, `refract evaluate`, the report, and `refract compare`."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import font_manager
from small_data import COLORS, Run, make_image, write_image

from refract.augment import Preprocess
from refract.models.bundle.bundle import load_bundle
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.pipeline.config.config import ConfigError
from refract.pipeline.data.manifest import Sample, load_manifest
from refract.pipeline.evaluation import plots
from refract.pipeline.evaluation.compare import against, read_run
from refract.pipeline.evaluation.confusion import Confusion
from refract.pipeline.evaluation.evaluate import evaluate
from refract.pipeline.evaluation.report import make_report
from refract.pipeline.evaluation.robustness import FULL, QUICK, Effort, measure_robustness
from refract.pipeline.evaluation.slices import slices

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ with a name that is HTML, and some images under a wrong label."""
    root = tmp_path_factory.mktemp("assessed")
    for label in COLORS:
        for number in range(60):
            real = label if number % 6 else "red"
            write_image(
                root / "images" / label / f"{number:02}<b>.png", make_image(real, number + 100 * len(label))[:, :24]
            )
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> Path:
    from refract.pipeline.config.config import config_from_dict
    from refract.pipeline.training.run import train

    for name, rate, epochs, robustness in (("good", 0.003, 12, "quick"), ("bad", 1e-7, 2, "none")):
        values = {
            "data": {"source": str(root / "images"), "image_size": 24, "workers": 0, "batch_size": 16,
                     "val_fraction": 0.3, "test_fraction": 0.3},
            "model": {"name": "cnn", "args": {"widths": [8, 16]}}, "optim": {"lr": rate},
            "trainer": {"max_epochs": epochs, "run_name": name, "runs_dir": str(root / "runs"), "device": "cpu"},
            "tracking": {"enabled": False}, "evaluation": {"precision": 0.99, "robustness": robustness},
        }  # fmt: skip
        train(config_from_dict(values))
    return root / "runs"


def test_the_bundle_is_calibrated_on_validation_and_has_an_abstention_threshold(runs: Path) -> None:
    info = load_bundle(runs / "good" / "bundle").info
    numbers = json.loads((runs / "good" / "report.json").read_text())
    assert {"network", "test set", "training", "temperature", "time per image"} == set(numbers["facts"])
    assert info.temperature != 1 and f"{info.temperature:.3f}" == numbers["facts"]["temperature"]
    assert (
        info.abstain_below == numbers["abstaining"]["abstain_below"] > 0
        and numbers["abstaining"]["wanted_precision"] == 0.99
    )
    assert {"accuracy", "macro_f1", "nll", "calibration_error", "risk_coverage_area", "corruption_error"} <= set(
        info.metrics
    )
    low, high = numbers["intervals"]["accuracy"]
    assert low < numbers["metrics"]["accuracy"] < high
    robust = numbers["robustness"]
    assert robust["images"] == 50 and len(robust["errors"]) == 19 and set(robust["errors"]["fog"]) == {"1", "3", "5"}
    with np.load(runs / "good" / "holdout.npz") as stored:
        assert (stored["probabilities"].argmax(1) == stored["truth"]).mean() == pytest.approx(info.metrics["accuracy"])


def test_the_report_is_one_escaped_file_without_external_resources(runs: Path) -> None:
    html = (runs / "good" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) > 8 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r'"data:[^"]*"', "", html) and "<script" not in html
    assert "&lt;b&gt;.png" in html and "<b>.png" not in html
    assert "Most confident errors" in html and "Labels that are likely wrong" in html
    good, bad = (
        json.loads((runs / name / "report.json").read_text())["likely_label_errors"] for name in ("good", "bad")
    )
    assert all(int(Path(path).name[:2]) % 6 == 0 for path in good), "every sixth is mislabelled"
    assert not bad, "a network that learned nothing judges no label"


@pytest.mark.usefixtures("drawn_charts")
def test_evaluate_reproduces_the_metrics_and_writes_a_report(
    refract: Run, root: Path, runs: Path, tmp_path: Path
) -> None:
    refract(
        "evaluate", runs / "good" / "bundle", root / "images", "--json", "e.json", "--report", "rep", "--robustness", "quick"
    )  # fmt: skip
    wanted = load_bundle(runs / "good" / "bundle").info.metrics
    evaluation = json.loads((tmp_path / "e.json").read_text())
    for name in ("accuracy", "nll", "calibration_error"):
        assert evaluation["metrics"][name] == pytest.approx(wanted[name], abs=1e-4)
    assert evaluation["robustness"]["mean_corruption_error"] == pytest.approx(wanted["corruption_error"])
    report = json.loads((tmp_path / "rep" / "report.json").read_text())
    assert report["metrics"] == evaluation["metrics"] and (tmp_path / "rep" / "report.html").stat().st_size > 50_000


def test_evaluate_accepts_images_of_one_class_and_a_test_set_alone(refract: Run, runs: Path, tmp_path: Path) -> None:
    for number in range(4):
        write_image(tmp_path / "new" / "red" / f"{number}.png", make_image("red", 900 + number))
    shutil.copytree(tmp_path / "new", tmp_path / "split" / "test")
    for source in ("new", "split"):
        printed = refract("evaluate", runs / "good" / "bundle", source, "--json", "e.json", "--report", "rep").stdout
        assert (
            "on 4 images of" in printed and "2 labels have no images and count as 0 in macro_f1: blue, green" in printed
        )
        evaluation = json.loads((tmp_path / "e.json").read_text())
        assert evaluation["metrics"]["accuracy"] == 1 and [row["count"] for row in evaluation["per_class"]] == [0, 0, 4]


@pytest.mark.usefixtures("drawn_charts")
def test_runs_are_compared_on_their_common_test_samples(refract: Run, runs: Path, tmp_path: Path) -> None:
    printed = refract("compare", runs / "bad", runs / "good", "--curves", "c.png").stdout
    assert re.search(r"^optim\.lr +1e-07 +0\.003$", printed, re.MULTILINE) and "run_name" not in printed
    match = re.search(
        r"good against bad on 54 images: accuracy \+(\S+), 95 % interval \+(\S+) to \+(\S+), McNemar p = (\S+):",
        printed,
    )
    assert match and "more than chance" in printed
    value, low, high = (float(number) for number in match.groups()[:3])
    accuracies = [load_bundle(runs / name / "bundle").info.metrics["accuracy"] for name in ("bad", "good")]
    assert value == pytest.approx(accuracies[1] - accuracies[0], abs=1e-4) and low < value < high
    assert (tmp_path / "c.png").stat().st_size > 5000
    assert "within chance" in refract("compare", runs / "good", runs / "good").stdout
    assert "not the folder of a finished run" in refract("compare", runs / "good", tmp_path, code=2).stderr


def test_corruptions_are_seeded_and_raise_the_error(root: Path) -> None:
    samples = load_manifest(root / "images").samples
    torch.manual_seed(0)
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    few = Effort(12, (1, 3, 5))
    one, again = (measure_robustness(classifier, Preprocess(32, 32), samples, few) for _ in range(2))
    assert one == again and one.by_severity()[0] == one.clean
    assert one.interval[0] < one.mean_error < one.interval[1] and one.clean_interval[0] < one.clean_interval[1]
    assert measure_robustness(classifier, Preprocess(32, 32), samples, few, seed=1) != one
    chosen = [sample.labels[0] for sample in samples[:: len(samples) // 90][:90]]  # sorted by class
    assert len(set(chosen)) == 3
    seen = measure_robustness(classifier, Preprocess(32, 32), samples[:30] + samples[-60:], few)
    assert seen.images == 12, "spread over all of them"
    full = measure_robustness(classifier, Preprocess(32, 32), samples[:4], FULL)
    assert full.images == 4 and list(full.by_severity()) == [0, 1, 2, 3, 4, 5]


class Rough(torch.nn.Module):
    """Predict 1 where neighbouring pixels differ by over 12 grey levels on average. Noise of deviation d makes that 2 d / √π."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rough = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3)) - 12 / 255
        return torch.stack([-rough, rough], dim=1)


@pytest.mark.parametrize("cell", ["inf", "-inf", "1e400", "NA", ""])
def test_missing_and_infinite_cells_of_a_numeric_column_are_in_no_quantile_slice(cell: str) -> None:
    values = [str(n) for n in range(80)] + [cell]
    parts = slices([Sample(str(i), (0,), metadata={"hour": v}) for i, v in enumerate(values)], np.ones(81, dtype=bool))
    assert [(part.value, part.count) for part in parts] == [
        ("0 … 19.75", 20), ("19.75 … 39.5", 20), ("39.5 … 59.25", 20), ("59.25 … 79", 20),
    ]  # fmt: skip


def test_many_slices_are_not_marked_by_chance() -> None:
    rng = np.random.default_rng(0)
    marked = 0
    for _ in range(100):
        samples = [Sample(str(i), (0,), metadata={"site": str(rng.integers(20))}) for i in range(600)]
        marked += any(part.worse for part in slices(samples, rng.random(600) < 0.9))
    assert marked <= 12


def test_evaluate_shows_near_duplicates_of_training_images(refract: Run, tmp_path: Path) -> None:
    for number in range(40):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC)
        write_image(tmp_path / "s" / "ab"[number % 2] / f"{number}.png", pixels)
        if number < 20:
            write_image(tmp_path / "s" / "ab"[number % 2] / f"{number}.jpg", pixels)
    (tmp_path / "c.yaml").write_text(
        "{data: {source: s, image_size: 32, workers: 0}, tracking: {enabled: false}, evaluation: {robustness: none}}"
    )
    printed = refract(
        "train", "c.yaml", "--model.name", "cnn", "--trainer.max_epochs", 1, "--trainer.run_name", "r"
    ).stderr
    refract("evaluate", "runs/r/bundle", "s", "--report", "again", "--json", "e.json")
    reports = [json.loads((tmp_path / where / "report.json").read_text()) for where in ("runs/r", "again")]
    one, again = (report["near_duplicates"] for report in reports)
    assert (
        one == again
        and len(one["pairs"]) > 2
        and f"{len(one['pairs'])} images of test are near-duplicates of training images" in printed
    )
    assert all(Path(a).stem == Path(b).stem for a, b in one["pairs"])
    assert json.loads((tmp_path / "e.json").read_text())["near_duplicates"] == one["pairs"]
    (tmp_path / "m.csv").write_text("path,label\ns/a/0.png,a;b\ns/b/1.png,b\n")
    assert "1 labels are not labels of the bundle: a;b" in refract("evaluate", "runs/r/bundle", "m.csv", code=2).stderr


def test_runs_with_different_labels_of_the_same_images_are_not_compared(runs: Path, tmp_path: Path) -> None:
    one = read_run(runs / "good")
    path = next(iter(one.labels))
    other = replace(one, labels={**one.labels, path: ("green" if one.labels[path] != ("green",) else "red",)})
    with pytest.raises(ConfigError, match=r"1 common test samples differ, such as "):
        against(one, other)


def test_noise_has_its_deviation_in_grey_levels(tmp_path: Path) -> None:
    for number in range(8):
        write_image(tmp_path / "ab"[number % 2] / f"{number}.png", np.full((32, 32, 3), 100 + number, np.uint8))
    samples = [replace(sample, labels=(0,)) for sample in load_manifest(tmp_path).samples]
    classifier = Classifier(Rough(), mean=(0.0,) * 3, std=(1.0,) * 3)
    robustness = measure_robustness(classifier, Preprocess(32, 32), samples, QUICK)
    assert robustness.clean == 0 and robustness.noise == {4: 0, 8: 0, 16: 1, 32: 1, 64: 1}


@pytest.fixture(scope="module")
def cameras(root: Path) -> Path:
    """A manifest whose camera `b` took the mislabelled images, with a number per row and a few duplicates."""
    rows = [
        {"path": str(root / "images" / label / f"{number:02}<b>.png"), "label": label, "camera": "b<i>" if number % 6 == 0 else "a",
         "hour": number, "note": f"{label} {number}", "split": "test" if number >= 30 else "val" if number >= 24 else "train"}
        for label in COLORS for number in range(60)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(root / "cameras.csv", index=False)
    return root / "cameras.csv"


def test_slices_follow_the_columns_of_the_manifest(refract: Run, cameras: Path, runs: Path, tmp_path: Path) -> None:
    printed = refract("evaluate", runs / "good" / "bundle", cameras, "--report", "rep").stdout
    parts = json.loads((tmp_path / "rep" / "report.json").read_text())["slices"]
    by_name = {(part["column"], part["value"]): part for part in parts}
    assert {part["column"] for part in parts} == {"camera", "hour"}, "a note identifies single images"
    a, b = by_name["camera", "a"], by_name["camera", "b<i>"]
    assert (a["count"], b["count"]) == (75, 15) and b["worse"] and not a["worse"]
    assert b["right"] == pytest.approx(1 / 3, abs=0.1) and b["low"] < b["right"] < b["high"] < a["right"]
    hours = [part for part in parts if part["column"] == "hour"]
    assert len(hours) == 30 and sum(part["count"] for part in hours) == 90
    assert re.search(r"camera = b<i> +0\.\d+ correct of 15", printed)
    html = (tmp_path / "rep" / "report.html").read_text()
    assert "<td>b&lt;i&gt;</td>" in html


def test_numeric_columns_are_sliced_by_quantiles() -> None:
    samples = [Sample(str(n), (0,), metadata={"size": f"{n / 7}", "odd": "x" if n % 2 else ""}) for n in range(100)]
    parts = slices(samples, np.arange(100) >= 25)
    assert [(part.column, part.count, part.right) for part in parts] == [
        ("size", 25, 0.0), ("size", 25, 1.0), ("size", 25, 1.0), ("size", 25, 1.0), ("odd", 50, 0.74), ("odd", 50, 0.76),
    ]  # fmt: skip
    assert [part.worse for part in parts] == [True, False, False, False, False, False] and parts[4].value == "(empty)"


def test_the_multi_label_report_has_galleries_of_errors_and_near_duplicates(tmp_path: Path) -> None:
    for label in COLORS:
        for number in range(12):
            write_image(tmp_path / label / f"{number:02}.png", make_image(label, number))
    samples = [
        Sample(str(tmp_path / label / f"{number:02}.png"), (k,))
        for k, label in enumerate(COLORS)
        for number in range(12)
    ]
    torch.manual_seed(0)
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    evaluation = evaluate(classifier, Preprocess(32, 32), samples, task="multilabel", labels=tuple(COLORS))
    assert evaluation.right.tolist() == ((evaluation.probabilities >= 0.5) == evaluation.truth).all(axis=1).tolist()
    near = [(samples[0], samples[1])]
    report = make_report("r", evaluation, tuple(COLORS), facts={}, precision=0.95, abstain_below=None, near=near)
    errors = report.galleries["Most confident errors"]
    off = np.abs(evaluation.probabilities - evaluation.truth)[evaluation.predicted != evaluation.truth].max()
    assert f"missed {1 - off:.0%}" in errors[0]["caption"] or f"{off:.0%}, labelled" in errors[0]["caption"]
    (pair,) = report.galleries["Near-duplicates of training images"]
    assert pair["caption"] == "blue ~ blue" and pair["src"].startswith("data:image/jpeg")
    assert report.numbers["near_duplicates"]["right_without_them"] == pytest.approx(evaluation.right[1:].mean())


def draw(labels: list[str], path: Path) -> None:
    """Draw the confusion matrix of a perfect classifier."""
    right = np.arange(len(labels))
    plots.save(plots.confusion_of(Confusion.of(right, right, len(labels)), labels), path)


@pytest.mark.usefixtures("drawn_charts")
def test_charts_keep_their_layout_whatever_the_users_matplotlibrc_sets(tmp_path: Path) -> None:
    import matplotlib

    charts = []
    for settings in ({}, {"figure.autolayout": True}):
        with matplotlib.rc_context(settings):
            draw(["red", "green", "blue"], tmp_path / "chart.png")
        charts.append((tmp_path / "chart.png").read_bytes())
    assert charts[0] == charts[1]


@pytest.mark.usefixtures("drawn_charts")
def test_labels_with_dollar_signs_are_drawn_literally(tmp_path: Path) -> None:
    draw(["$5_$10", "a_$"], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.usefixtures("drawn_charts")
def test_letters_missing_from_all_fonts_are_logged_once_without_a_matplotlib_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plots, "_fonts", lambda: ["DejaVu Sans"])
    plots._warn_missing_letters.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a.png", "b.png"):
            draw(["四角", "丸"], tmp_path / name)
    assert caplog.text.count("letters that no installed font has") == 1
    assert (tmp_path / "b.png").stat().st_size > 1000 and "DejaVu Sans" in plots.FONTS


def test_a_font_installed_after_matplotlibs_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = font_manager.fontManager.ttflist
    file = next(font.fname for font in listed if font.fname.endswith("DejaVuSerif.ttf"))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in listed if font.name != "DejaVu Serif"])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [file, __file__])
    monkeypatch.setattr(plots, "FONTS", ("DejaVu Sans", "DejaVu Serif", "None Such"))
    assert plots._fonts.__wrapped__() == ["DejaVu Sans", "DejaVu Serif"]
