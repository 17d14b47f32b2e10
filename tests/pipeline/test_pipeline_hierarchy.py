"""The class hierarchy: its table, the threshold, the metrics, and a trained bundle that backs off in `evaluate`, `predict` and `score`."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import Run, make_image, table, write_image

from refract.models.bundle.bundle import Bundle, load_bundle
from refract.models.hierarchy import NO_NODE, Hierarchy
from refract.pipeline.config.config import ConfigError, config_from_dict
from refract.pipeline.data.hierarchy import read_hierarchy
from refract.pipeline.data.manifest import DataError, Sample
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.evaluation.evaluate import measured
from refract.pipeline.evaluation.hierarchy import LEAST, back_off_numbers, back_off_threshold, with_levels
from refract.pipeline.evaluation.measures import mean_interval
from refract.pipeline.evaluation.report import make_report
from refract.pipeline.inference.pyfunc import BundleModel
from refract.pipeline.inference.scoring import SampleInput, preprocess_of, score
from refract.pipeline.labels.decisions import Decision
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.training.provenance import inputs
from refract.pipeline.training.run import train
from refract.pipeline.training.run_directory import RECORD, resume_run, stored_config
from refract.pipeline.training.soup import make_soup

TWINS = {"crimson": "red", "navy": "blue", "green": "green", "red": "red", "sky": "blue"}
"""Label → colour of its images: two pairs of classes cannot be distinguished."""
LABELS = tuple(TWINS)
ROWS = [["crimson", "warm"], ["red", "warm"], ["navy", "cold"], ["sky", "cold"], ["green", "cold"], ["warm", ""]]
COLOURS = Hierarchy(LABELS, {**{label: parent for label, parent in ROWS if parent}, "warm": None, "cold": None})
NESTED = Hierarchy(
    tuple("abcdefg"),
    {
        "a": "two",
        "b": "two",
        "two": "four",
        "c": "four",
        "d": "four",
        "e": "three",
        "f": "three",
        "g": "three",
        "four": None,
        "three": None,
    },
)


def test_a_table_gives_the_hierarchy_and_a_class_without_a_row_is_a_root(tmp_path: Path, caplog) -> None:
    rows = [["warm", "any"], *ROWS[1:-1], [" crimson\u200b", " warm "], ["cold", "any"]]
    for name in ("c.csv", "c.tsv"):
        file = table(tmp_path / name, rows, ["Label", "parent"])
        if name == "c.tsv":
            file.write_text(file.read_text().replace(",", "\t"))
        hierarchy = read_hierarchy(file, LABELS)
        assert hierarchy.path("crimson") == ("any", "warm", "crimson") and hierarchy.path("green") == (
            "any",
            "cold",
            "green",
        )
    with caplog.at_level(logging.WARNING):
        hierarchy = read_hierarchy(table(tmp_path / "few.csv", ROWS[:2], ["label", "parent"]), LABELS)
    assert hierarchy.path("sky") == ("sky",) and hierarchy.groups.tolist() == [5]
    assert "3 classes have no row in" in caplog.text and "navy, green, sky" in caplog.text


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([*ROWS, ["crimson", "cold"]], "line 8: 'crimson' has the parent 'cold', but the parent 'warm' in .*, line 2"),
        ([*ROWS, ["cold", "warm"], ["cold", ""]], "line 9: 'cold' has no parent, but the parent 'warm' in .*, line 8"),
        ([*ROWS, ["cold", "cold"]], "line 8: the parents of 'cold' form a cycle: cold → cold"),
        ([*ROWS[:-1], ["warm", "cold"], ["cold", "warm"]], "line 7: the parents of 'warm' form a cycle: warm → cold → warm"),
        ([*ROWS, ["sky", "cold"], ["cold", "green"]], "line 9: the parent 'green' of 'cold' is a class of the data"),
        ([*ROWS, ["crimsn", "warm"]], "line 8: 'crimsn' is neither a class .* did you mean 'crimson'"),
        ([*ROWS, ["", "warm"]], "line 8: the label is empty"),
        ([[label, ""] for label in LABELS], "t.csv: no parent has several classes"),
    ],
)  # fmt: skip
def test_an_error_in_the_table_names_its_line(tmp_path: Path, rows: list[list[str]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_hierarchy(table(tmp_path / "t.csv", rows, ["label", "parent"]), LABELS)


def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'parent'; columns: label, group"):
        read_hierarchy(table(tmp_path / "t.csv", ROWS, ["label", "group"]), LABELS)
    with pytest.raises(DataError, match=r"data.hierarchy: .*t.json is not a table; accepted: .csv, .tsv, .parquet"):
        read_hierarchy(tmp_path / "t.json", LABELS)
    with pytest.raises(DataError, match="none.csv: cannot be read"):
        read_hierarchy(tmp_path / "none.csv", LABELS)


def test_multi_label_data_is_refused_with_the_reason(tmp_path: Path) -> None:
    rows = [[f"{number}.png", label] for number, label in enumerate(("red;blue", "red", "blue") * 4)]
    for number in range(len(rows)):
        write_image(tmp_path / f"{number}.png", make_image("red", number))
    file = table(tmp_path / "m.csv", rows, ["path", "label"])
    values = {"data": {"source": str(file), "hierarchy": "c.csv"}, "tracking": {"enabled": False}}
    with pytest.raises(ConfigError, match=r"data.hierarchy: c.csv: the data is multi-label. .*remove the key"):
        train(config_from_dict(values))


def test_the_threshold_of_parents_is_at_least_one_half() -> None:
    rows = np.array([[0.3, 0.25, 0, 0.45, 0], [0.05, 0.4, 0, 0.05, 0.5]])
    assert back_off_threshold(COLOURS, rows, np.array([0, 1]), 0.6, 1.0) == 0.5
    assert back_off_threshold(COLOURS, rows, np.array([1, 0]), 0.6, 1.0) == 1, "both parents are wrong"
    assert back_off_threshold(COLOURS, rows, np.array([1, 1]), 0.6, 1.0) == pytest.approx((0.75 + 0.9) / 2)
    assert back_off_threshold(COLOURS, rows, np.array([0, 1]), 0.0, 1.0) == 1, "each class is accepted"


def test_a_parent_of_exactly_one_half_counts_for_the_threshold() -> None:
    rows = np.array([[0.3, 0.25, 0, 0.45, 0]] * 9 + [[0.25, 0.25, 0, 0.25, 0.25]] * 9)
    truth = np.array([0] * 9 + [4] * 9)  # where both parents have one half, the smaller one is predicted: warm
    threshold = back_off_threshold(COLOURS, rows, truth, 0.6, 0.9)
    nodes = COLOURS.answers(rows, 0.6, threshold)
    assert COLOURS.contains(nodes, truth)[nodes != NO_NODE].mean() >= 0.9


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 40), below=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    precision=st.sampled_from([0.3, 0.6, 0.8, 0.95, 1.0]),
)  # fmt: skip
def test_the_threshold_is_the_lowest_at_which_the_parents_reach_the_precision(
    seed: int, count: int, below: float, precision: float
) -> None:
    draw = np.random.default_rng(seed)
    rows = draw.dirichlet([0.4] * 7, count).round(2) + 1e-3
    rows /= rows.sum(axis=1, keepdims=True)
    truth = np.array([draw.choice(7, p=row) for row in rows])
    threshold = back_off_threshold(NESTED, rows, truth, below, precision)

    def parents_at(value: float) -> np.ndarray:
        nodes = NESTED.answers(rows, below, value)
        return np.where(nodes >= 7, nodes, NO_NODE)

    def reaches(value: float) -> bool:
        nodes = parents_at(value)
        return bool(NESTED.contains(nodes, truth)[nodes != NO_NODE].mean() >= precision) if nodes.max() >= 0 else False

    values = np.unique(NESTED.probabilities(rows).round(12))
    candidates = [LEAST, *(value for value in (values[1:] + values[:-1]) / 2 if value > LEAST)]
    assert threshold == 1 or reaches(threshold)
    lower = [value for value in candidates if value < threshold and (parents_at(value) != parents_at(threshold)).any()]
    assert LEAST <= threshold <= 1 and not any(map(reaches, lower))


def test_the_metrics_of_the_hierarchy() -> None:
    truth, predicted = [0, 0, 1, 1, 2, 3, 3, 4], [0, 3, 1, 4, 0, 3, 3, 1]
    rows = np.full((8, 5), 0.05, np.float32)
    rows[np.arange(8), predicted] = 0.8
    samples = [Sample(f"{i}.png", (label,)) for i, label in enumerate(truth)]
    evaluation = with_levels(measured(rows, samples, task="multiclass", labels=LABELS), COLOURS)
    right = np.array([True, True, True, True, False, True, True, True])
    assert evaluation.metrics["accuracy"] == 0.5 and evaluation.metrics["accuracy_level_1"] == 7 / 8
    assert evaluation.intervals["accuracy_level_1"] == mean_interval(right)
    assert "accuracy_level_2" not in evaluation.metrics, "the classes"
    assert evaluation.metrics["lca_height"] == pytest.approx((1 + 1 + 2 + 1) / 4)
    low, high = evaluation.intervals["lca_height"]
    assert 1 <= low < evaluation.metrics["lca_height"] < high <= 2
    everything = back_off_numbers(evaluation, COLOURS, 0.5, 0.5)
    assert (everything["coverage"], everything["precision"], everything["count"]) == (1, 0.5, 8)
    backed = back_off_numbers(evaluation, COLOURS, 0.9, 0.82)
    assert [(row["level"], row["count"], row["precision"]) for row in backed["answers"]] == [
        (None, 0, None),
        (1, 8, 7 / 8),
    ]
    assert back_off_numbers(evaluation, COLOURS, 1.0, 1.0)["coverage"] == 0
    perfect = measured(rows, [Sample("a", (label,)) for label in predicted], task="multiclass", labels=LABELS)
    assert "lca_height" not in with_levels(perfect, COLOURS).metrics, "without errors there is no height"


def test_the_report_says_whether_a_bundle_without_certain_classes_predicts_parents(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", make_image("red", 1))
    samples = [Sample(str(tmp_path / "a.png"), (label,)) for label in range(4)]
    rows = np.array([[0.5, 0, 0, 0.5, 0]] * 4, np.float32)
    evaluation = with_levels(measured(rows, samples, task="multiclass", labels=LABELS), COLOURS)
    for threshold, words in (
        (0.9, "abstains on every sample, and predicts parents only, as no class"),
        (1.0, "abstains on every sample, as none"),
    ):
        options = {"facts": {}, "precision": 0.95, "abstain_below": 1.0, "back_off": threshold}
        steps = make_report("r", evaluation, LABELS, **options).numbers["summary"]["next"]
        assert f"Add validation samples: the bundle {words} reaches the wanted precision." in steps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> Path:
    """images/ and runs/colours, a run in MLflow whose bundle cannot distinguish two pairs of classes."""
    root = tmp_path_factory.mktemp("hierarchy")
    for index, (label, color) in enumerate(TWINS.items()):
        for number in range(40):
            write_image(root / "images" / label / f"{number:02}.png", make_image(color, 100 * index + number))
    table(root / "classes.csv", ROWS, ["label", "parent"])
    shutil.copy(new_tracking, root / "mlflow.db")
    values = {
        "data": {"source": str(root / "images"), "hierarchy": str(root / "classes.csv"), "image_size": 24, "workers": 0,
                 "batch_size": 16, "val_fraction": 0.3, "test_fraction": 0.3},
        "model": {"name": "cnn", "args": {"widths": [8, 16]}},
        "trainer": {"max_epochs": 6, "run_name": "colours", "runs_dir": str(root / "runs"), "device": "cpu"},
        "tracking": {"uri": f"sqlite:///{root / 'mlflow.db'}"}, "evaluation": {"precision": 0.9, "robustness": "none"},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(config_from_dict(values))
    return root


@pytest.fixture(scope="module")
def bundle(place: Path) -> Bundle:
    return load_bundle(place / "runs" / "colours" / "bundle")


def test_the_run_stores_the_hierarchy_and_its_metrics(place: Path, bundle: Bundle) -> None:
    from mlflow import MlflowClient

    info, run = bundle.info, place / "runs" / "colours"
    assert info.tree is not None and info.tree.path("sky") == ("cold", "sky") and 0.5 < info.abstain_below <= 1
    report = json.loads((run / "report.json").read_text())
    assert report["metrics"]["accuracy"] < 0.8 < 0.9 <= report["metrics"]["accuracy_level_1"]
    assert report["intervals"]["accuracy_level_1"][0] < report["metrics"]["accuracy_level_1"]
    back_off = report["back_off"]
    assert (back_off["class_threshold"], back_off["threshold"]) == (info.abstain_below, info.hierarchy["threshold"])
    assert back_off["coverage"] > 0.9 < back_off["precision"] and 0.5 <= back_off["threshold"] < 1
    classes, parents = back_off["answers"]
    assert classes["count"] > 0 and parents["count"] > 0 and parents["level"] == 1
    assert classes["count"] + parents["count"] == back_off["count"]
    assert report["abstaining"]["coverage"] == classes["coverage"] < 0.5, "a hierarchy takes no class away"
    html = (run / "report.html").read_text()
    assert "a parent of level 1" in html and "accuracy_level_1" in html
    assert info.metrics["back_off_coverage"] == back_off["coverage"]
    (tracked,) = MlflowClient(f"sqlite:///{place / 'mlflow.db'}").search_runs(["1"])
    for name in ("accuracy_level_1", "lca_height", "back_off_precision"):
        assert tracked.data.metrics[f"test_{name}"] == pytest.approx(info.metrics[name])
    assert "Class hierarchy: where it abstains" in (run / "model_card.md").read_text()
    assert "data.hierarchy" in json.loads((run / "run.json").read_text())["inputs"]


@pytest.mark.slow
def test_evaluate_reports_the_same_without_the_table(refract: Run, place: Path, bundle: Bundle, tmp_path: Path) -> None:
    shutil.move(place / "classes.csv", place / "elsewhere.csv")
    try:
        done = refract("evaluate", bundle.path, place / "images", "--json", "e.json", "--report", "rep")
    finally:
        shutil.move(place / "elsewhere.csv", place / "classes.csv")
    evaluation = json.loads((tmp_path / "e.json").read_text())
    for name in ("accuracy_level_1", "lca_height"):
        assert evaluation["metrics"][name] == pytest.approx(bundle.info.metrics[name], abs=1e-4)
    assert evaluation["back_off"]["coverage"] == pytest.approx(bundle.info.metrics["back_off_coverage"])
    assert "predicted parents of level 1: " in done.stdout and "accuracy_level_1" in done.stdout
    assert json.loads((tmp_path / "rep" / "report.json").read_text())["back_off"] == evaluation["back_off"]


def test_predict_and_score_back_off_alike(refract: Run, place: Path, bundle: Bundle, tmp_path: Path) -> None:
    files = [place / "images" / label / f"{number:02}.png" for label in LABELS for number in range(8)]
    info = bundle.info
    images = [(lambda file=file: file.read_bytes()) for file in files]
    rows = np.stack(list(score(
        bundle.classifier(), preprocess_of(info), [SampleInput(image, "", True) for image in images], task=info.task,
        temperature=info.temperature,
    )))  # fmt: skip
    wanted = info.back_offs(rows)
    assert any(wanted) and not all(wanted)
    lines = refract("predict", bundle.path, *files, "--json").stdout.splitlines()
    for line, back_off, row in zip(map(json.loads, lines), wanted, rows, strict=True):
        assert line.get("backed_off", {}).get("label") == (back_off and back_off.label)
        assert line["abstain"] == (info.abstain_below >= 1 or bool(row.max() < info.abstain_below)), (
            "also with a parent"
        )
    from_mlflow = BundleModel(bundle, device="cpu").predict(
        pd.DataFrame({"image": [file.read_bytes() for file in files]})
    )
    assert from_mlflow["backed_off"].tolist() == [back_off.label if back_off else "" for back_off in wanted]
    assert from_mlflow["abstain"].tolist() == [json.loads(line)["abstain"] for line in lines]
    shown = refract("predict", bundle.path, files[0]).stdout
    assert f": {wanted[0].label} {wanted[0].confidence:.1%}  (" in shown
    (tmp_path / "bad.png").write_bytes(b"no image")
    table(tmp_path / "m.csv", [[str(file)] for file in [*files, tmp_path / "bad.png"]], ["path"])
    refract("score", bundle.path, "m.csv", "-o", "s.parquet")
    scored = pq.read_table(tmp_path / "s.parquet").to_pylist()
    for record, line in zip(scored, map(json.loads, lines), strict=False):
        parent = line.get("backed_off")
        assert record["abstain"] == line["abstain"] and record["backed_off"] == (parent and parent["label"])
        if parent:
            assert record["backed_off_level"] == 1
            assert record["backed_off_confidence"] == pytest.approx(parent["confidence"], abs=1e-3)
    assert scored[-1]["error"] and scored[-1]["backed_off"] is scored[-1]["abstain"] is None


def test_an_average_of_runs_keeps_their_hierarchy(place: Path, bundle: Bundle, tmp_path: Path) -> None:
    runs = [shutil.copytree(place / "runs" / "colours", tmp_path / "runs" / name) for name in ("a", "b")]
    shutil.move(place / "classes.csv", place / "elsewhere.csv")
    try:
        soup = make_soup(runs, tmp_path / "soup", "uniform")
    finally:
        shutil.move(place / "elsewhere.csv", place / "classes.csv")
    info = load_bundle(tmp_path / "soup" / "bundle").info
    assert info.hierarchy["parents"] == bundle.info.hierarchy["parents"] and "accuracy_level_1" in soup.metrics


def test_a_class_that_a_label_history_adds_has_its_place(tmp_path: Path) -> None:
    for number in range(12):
        for label in ("red", "navy", "sky"):
            write_image(
                tmp_path / "images" / label / f"{number:02}.png", make_image(TWINS[label], 100 * len(label) + number)
            )
    file = table(tmp_path / "classes.csv", ROWS[:4], ["label", "parent"])
    data = {"source": str(tmp_path / "images"), "image_size": 16, "hierarchy": str(file)}
    with pytest.raises(DataError, match="line 2: 'crimson' is neither a class"):
        prepare_data(config_from_dict({"data": data}))
    history = LabelHistory(tmp_path / "labels.db", create=True)
    for image in sorted((tmp_path / "images" / "red").iterdir())[:6]:
        content = hashlib.sha256(image.read_bytes()).hexdigest()
        decision = Decision(
            content=content, path=history.relative(image), action="relabel", labels=("crimson",), reviewer="ann"
        )
        history.append(decision)
    manifest, _ = prepare_data(config_from_dict({"data": data | {"labels": str(tmp_path / "labels.db")}}))
    assert manifest.labels == ("crimson", "navy", "red", "sky") and manifest.hierarchy.path("crimson") == (
        "warm",
        "crimson",
    )


def test_a_run_whose_table_has_changed_is_not_resumed(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "runs" / "colours", tmp_path / "runs" / "colours")
    record = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != "finished"}))
    changed = table(tmp_path / "classes.csv", [*ROWS, ["warm", ""]], ["label", "parent"])
    with pytest.raises(DataError, match="the file of data.hierarchy has changed"):
        resume_run(run, record | {"inputs": inputs(stored_config(run).changed({"data.hierarchy": str(changed)}))})
