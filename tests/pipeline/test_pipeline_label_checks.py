"""Labels that a retraining run does not trust: known images whose label changed, new ones that the champion contradicts."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import COLORS, make_image, write_image

from refract.models.bundle.bundle import Bundle, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.drift.thresholds import Threshold
from refract.pipeline.retraining.data_checks import disagreed, lowered_if_drifted, new_samples
from refract.pipeline.retraining.label_checks import LabelChanges, _more_errors, label_changes, listed
from refract.pipeline.retraining.run import begin
from refract.pipeline.retraining.snapshot import Snapshot, accept, read_snapshot, take
from refract.pipeline.retraining.steps import STEPS, Outcome
from refract.pipeline.retraining.workspace import read_run, workspace_of, write

IMAGES, TEXTS = frozenset({"images"}), frozenset({"texts"})
NAMES = tuple(sorted(COLORS))
snapshot, validate = STEPS[:2]
WARN_AND_STOP = Threshold(0.05, 0.25)


def config_at(root: Path, source: str = "images", **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"source": str(root / source), "image_size": 16, "workers": 0},
        "model": {"name": "lenet5"},
        "tracking": {"model_name": "colors", "uri": f"sqlite:///{root}/mlflow.db"},
        "retrain": {"folder": str(root / "retrain")},
    }
    return config_from_dict({name: values.get(name, {}) | sections.get(name, {}) for name in {**values, **sections}})


def taken(config: Config) -> Snapshot:
    """Of a run that is accepted."""
    taken = take(config, workspace_of(config))
    accept(workspace_of(config), taken)
    return taken


def paint(root: Path, numbers: range, *, named: dict[str, str] | None = None, noise: float = 0.0) -> None:
    """Images of each colour. named: colour → the label that they get instead."""
    rng = np.random.default_rng(numbers.start)
    for color in NAMES:
        for number in numbers:
            pixels = make_image(color, number, side=16) + rng.normal(0, noise, 1)
            target = root / (named or {}).get(color, color) / f"{color}{number:03}.png"
            write_image(target, np.clip(pixels, 0, 255).astype(np.uint8))


def table(file: Path, rows: list[tuple[str, str, str]]) -> None:
    with file.open("w", newline="") as target:
        csv.writer(target, quoting=csv.QUOTE_ALL).writerows([("path", "label", "text"), *rows])


def champion(root: Path, snapshot: Snapshot) -> Bundle:
    """A network that knows the three colours: it answers with the nearest."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}
    classifier = Classifier(build("lenet5", 3, image_size=(16, 16)), **values)
    samples = load_manifest(snapshot.manifest).samples
    images = torch.stack([_tensor(Path(sample.path)) for sample in samples])
    labels = torch.tensor([sample.labels[0] for sample in samples])
    optimiser = torch.optim.Adam(classifier.parameters(), 0.01)
    for _ in range(25):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(classifier(images), labels).backward()
        optimiser.step()
    info = BundleInfo(
        name="colors",
        task="multiclass",
        labels=NAMES,
        network={"name": "lenet5", "image_size": [16, 16], "args": {}},
        preprocess={"height": 16, "width": 16, "resize": "squash", **values},
        created="2026-11-05T03:00:00+00:00",
    )
    golden_samples = [GoldenSample("00.png", samples[0].read(), (0.2, 0.3, 0.5))]
    return load_bundle(save_bundle(root / "bundle", info, classifier.eval(), golden_samples))


def _tensor(path: Path) -> torch.Tensor:
    import cv2

    return torch.from_numpy(cv2.resize(cv2.imread(str(path)), (16, 16))[:, :, ::-1].copy()).permute(2, 0, 1)


def test_known_images_whose_label_changed_are_counted_by_pair(tmp_path: Path) -> None:
    paint(tmp_path / "images", range(20))
    first = taken(config_at(tmp_path))
    for number, file in enumerate(sorted((tmp_path / "images/red").iterdir())):
        if number < 7:
            file.rename(tmp_path / "images" / ("blue" if number < 4 else "green") / f"moved{number}.png")
    paint(tmp_path / "images", range(20, 24))
    changes = label_changes(taken(config_at(tmp_path)), first, IMAGES)
    held = {sample.path for sample in load_manifest(first.manifest).of("test")}
    assert changes.known == 60 - len(held) == 48, "new images are not known ones, and the holdout is kept"
    assert 0 < changes.changed == sum(changes.kinds.values()) <= 7
    assert set(changes.kinds) <= {"red → blue", "red → green"} and changes.kinds["red → blue"] >= 2
    assert changes.text().startswith(f"{changes.changed} of 48 known samples changed label: red → ")
    assert label_changes(first, first, IMAGES).text() == "none of 48 known samples changed label"


def test_multi_label_changes_are_counted_by_label(tmp_path: Path) -> None:
    rows = [(f"images/{NAMES[i % 3]}{i:03}.png", "cat;dog" if i % 2 else "dog", "") for i in range(40)]
    for i, (path, _, _) in enumerate(rows):
        write_image(tmp_path / path, make_image(NAMES[i % 3], i, side=16))
    table(tmp_path / "m.csv", rows)
    first = taken(config_at(tmp_path, "m.csv"))
    trained = {s.path for s in load_manifest(first.manifest, "multilabel").samples if s.split != "test"}
    table(tmp_path / "m.csv", [(p, label.replace("cat;dog", "cat;fox;fox"), t) for p, label, t in rows])
    changes = label_changes(taken(config_at(tmp_path, "m.csv")), first, IMAGES)
    count = sum(str(tmp_path / path) in trained for path, label, _ in rows if label == "cat;dog")
    assert changes.kinds == {"+fox": count, "-dog": count} and changes.changed == count


def test_texts_are_known_by_their_words(tmp_path: Path) -> None:
    rows = [("", "ab"[i % 2], f"number {i}") for i in range(40)]
    table(tmp_path / "m.csv", rows)
    config = config_at(tmp_path, "m.csv", model={"name": "none"}, text={"name": "hashing"})
    first = taken(config)
    table(
        tmp_path / "m.csv",
        [(p, "ab"[i % 2 == 0], t) if i < 20 else (p, label, t) for i, (p, label, t) in enumerate(rows)],
    )
    changes = label_changes(taken(config), first, TEXTS)
    assert changes.known == 32 and set(changes.kinds) == {"a → b", "b → a"} and 8 <= changes.changed <= 20


def test_the_list_is_bounded_and_sorted() -> None:
    kinds = Counter({f"c{i} → d": i for i in range(1, 31)})
    assert listed(kinds).startswith("c30 → d 30, c29 → d 29, ")
    assert listed(kinds).endswith(f"c21 → d 21, and {sum(range(1, 21))} others")


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0.001, 1))
def test_a_level_is_reached_at_the_threshold(known: int, fraction: float, stop: float) -> None:
    changes = LabelChanges(known, int(known * fraction), {})
    level = changes.record(Threshold(None, stop))["level"]
    assert level == ("stop" if changes.fraction >= stop else "none")


@settings(max_examples=30)
@given(st.integers(20, 3000), st.integers(20, 3000), st.data())
def test_more_errors_among_the_new_are_never_more_likely(count: int, held: int, data: Any) -> None:
    held_wrong, wrong = data.draw(st.integers(0, held)), data.draw(st.integers(0, count - 1))
    p, more = (_more_errors(errors, count, held_wrong, held) for errors in (wrong, wrong + 1))
    assert 0 <= more <= p + 1e-12 and p <= 1 + 1e-9
    if wrong / count <= held_wrong / held:
        assert p > 0.3, "as many as on the holdout are no surprise"


def test_the_champion_contradicts_mislabelled_images_and_accepts_right_ones(tmp_path: Path) -> None:
    paint(tmp_path / "images", range(40))
    first = taken(config_at(tmp_path))
    bundle = champion(tmp_path, first)
    paint(tmp_path / "images", range(40, 60))
    second = taken(config_at(tmp_path))
    right = disagreed(bundle, second, new_samples(second, first.folder), None, WARN_AND_STOP)
    assert right["level"] == "none" and right["count"] == 60 and right["wrong"] <= 3

    paint(tmp_path / "images", range(60, 80), named={"red": "green", "green": "red"})
    third = taken(config_at(tmp_path))
    new = new_samples(third, second.folder)
    wrong = disagreed(bundle, third, new, None, WARN_AND_STOP)
    assert wrong["level"] == "stop" and wrong["p"] < 1e-6
    assert 38 <= wrong["wrong"] <= 42 and wrong["kinds"]["green, predicted red"] >= 18
    assert "the champion disagrees with" in wrong["summary"] and "of 60 new labels (6" in wrong["summary"]
    assert disagreed(bundle, third, new, None, Threshold(0.05, None))["level"] == "warn"
    assert disagreed(bundle, third, new, None, Threshold(None, None))["level"] == "none"
    few = replace(new, of_images=new.of_images[:19])
    assert disagreed(bundle, third, few, None, WARN_AND_STOP)["summary"].startswith("new labels not compared")


@pytest.mark.slow
def test_a_run_stops_at_labels_and_accepts_them_on_purpose(tmp_path: Path, new_tracking: Path) -> None:
    import shutil

    from mlflow import MlflowClient

    shutil.copy(new_tracking, tmp_path / "mlflow.db")
    config = config_at(tmp_path, retrain={"folder": str(tmp_path / "retrain"), "drift": "none"})
    paint(tmp_path / "images", range(30))
    client, workspace = MlflowClient(config.tracking.uri, config.tracking.uri), workspace_of(config)

    def checked(config: Config) -> tuple[Path, dict[str, Any]]:
        folder = begin(config, force=False)
        snapshot(folder)
        validate(folder)
        return folder, read_run(folder)

    folder, record = checked(config)
    assert "ends" not in record
    ending = {"run": folder.name, "version": "1", "outcome": 0}
    write(
        workspace.root / "last.json", {key: record[key] for key in ("snapshot", "snapshot_folder", "inputs")} | ending
    )
    bundle = champion(tmp_path, read_snapshot(Path(record["snapshot_folder"]), record["snapshot"]))
    client.create_registered_model("colors")
    client.create_model_version("colors", source=bundle.path.resolve().as_uri())
    client.set_registered_model_alias("colors", "champion", "1")
    client.set_model_version_tag("colors", "1", "snapshot", record["snapshot"]["digest"])

    paint(tmp_path / "images", range(30, 50), named={"red": "green", "green": "red"})
    folder, record = checked(config)
    assert record["ends"] == Outcome.REFUSED
    assert record["why"].startswith("the new labels cannot be trusted: the champion disagrees with ")
    assert record["why"].endswith("accept them with --retrain.disagreement_stop null.")
    config = config.changed({"retrain.disagreement_stop": None})
    _, record = checked(config)
    assert "ends" not in record and record["labels"]["disagreement"]["level"] == "warn"

    for label, other in (("red", "blue"), ("blue", "red")):
        for file in sorted((tmp_path / "images" / label).glob(f"{label}*.png"))[:12]:
            file.rename(tmp_path / "images" / other / file.name)
    folder, record = checked(config)
    assert record["ends"] == Outcome.REFUSED and "known samples changed label: " in record["why"]
    assert "blue → red " in record["why"] and record["why"].endswith("with --retrain.relabelled_stop null.")
    assert f"{folder / 'relabelled.csv'} lists all of them" in record["why"]
    rows = [*csv.DictReader((folder / "relabelled.csv").open(newline="", encoding="utf-8"))]
    assert len(rows) == record["labels"]["changed"]["changed"] and {*rows[0]} == {"path", "was", "is"}
    assert all(Path(row["path"]).parent.name == row["is"] for row in rows), "the files as they lie now"
    assert {(row["was"], row["is"]) for row in rows} == {("red", "blue"), ("blue", "red")}
    config = config.changed({"retrain.relabelled_stop": None})
    _, record = checked(config)
    assert "ends" not in record and record["labels"]["changed"]["level"] == "warn"


def test_thresholds_have_a_range() -> None:
    with pytest.raises(ConfigError, match=r"retrain\.relabelled_stop"):
        config_from_dict({"retrain": {"relabelled_stop": 1.5}})


@pytest.mark.parametrize(("features", "level"), [("none", "stop"), ("warn", "warn"), ("stop", "warn")])
def test_the_champion_does_not_judge_labels_of_images_that_drifted(features: str, level: str) -> None:
    disagreement = lowered_if_drifted(
        {"level": "stop", "summary": "the champion disagrees"}, {"checks": {"features": {"level": features}}}
    )
    assert disagreement["level"] == level and ("drifted" in disagreement["summary"]) == (level == "warn")
    assert lowered_if_drifted({"level": "stop", "summary": "…"}, None)["level"] == "stop"
    assert (
        lowered_if_drifted({"level": "none", "summary": "…"}, {"checks": {"features": {"level": "stop"}}})["level"]
        == "none"
    )
