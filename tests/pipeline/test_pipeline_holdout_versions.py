"""Decisions on images of the frozen holdout make new versions of it; earlier ones stay readable."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
from small_data import paint

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from refract.pipeline.labels.decisions import Action, Decision
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.retraining.holdout_versions import difference, load_version, versions
from refract.pipeline.retraining.snapshot import Snapshot, accept, take
from refract.pipeline.retraining.workspace import Workspace, workspace_of


@pytest.fixture
def config(tmp_path: Path) -> Config:
    paint(tmp_path / "images", range(15))
    LabelHistory(tmp_path / "labels.db", create=True)
    return config_from_dict(
        {
            "data": {"source": str(tmp_path / "images"), "image_size": 16, "labels": str(tmp_path / "labels.db")},
            "model": {"name": "lenet5"},
            "tracking": {"model_name": "colors"},
            "retrain": {"folder": "retrain"},  # a relative path, as by default
        }
    )


@pytest.fixture
def history(config: Config) -> LabelHistory:
    return LabelHistory(str(config.data.labels))


def taken(config: Config) -> Snapshot:
    snapshot = take(config, workspace_of(config))
    accept(workspace_of(config), snapshot)
    return snapshot


def held(snapshot: Snapshot, label: str | None = None) -> list[Sample]:
    """The snapshot's samples of the holdout, of one label or of all."""
    manifest = load_manifest(snapshot.manifest)
    return [one for one in manifest.of("test") if label is None or manifest.labels[one.labels[0]] == label]


def decide(history: LabelHistory, content: str, action: Action, *labels: str) -> int:
    return history.append(
        Decision(content=content, path=f"{content}.png", action=action, labels=labels, reviewer="ann")
    )


def content(sample: Sample) -> str:
    return hashlib.sha256(sample.read()).hexdigest()


def labels_of(manifest: Manifest) -> dict[str, str]:
    return {content(one): manifest.labels[one.labels[0]] for one in manifest.samples}


def test_each_correction_is_a_version_and_earlier_ones_stay_readable(
    config: Config, history: LabelHistory, caplog: pytest.LogCaptureFixture
) -> None:
    folder = workspace_of(config).holdout
    first = taken(config)
    assert taken(config) == first and len(versions(folder)) == 1, "nothing has changed"
    red, blue = held(first, "red"), held(first, "blue")
    number = decide(history, content(red[0]), "relabel", "green")
    decide(history, content(blue[0]), "exclude")
    with caplog.at_level(logging.INFO):
        second = taken(config.changed({"data.labels": f"{config.data.labels}@2"}))
    assert "holdout: decisions correct 2 images: 1 relabelled (red → green 1), 1 excluded" in caplog.text
    assert second.holdout != first.holdout and len(held(second)) == len(held(first)) - 1
    trained = {content(s) for s in load_manifest(second.manifest).samples if s.split != "test"}
    assert content(blue[0]) not in trained, "an excluded image is not trained on"
    history.undo(number, reviewer="ann")
    history.undo(2, reviewer="ann")
    assert taken(config).holdout == first.holdout, "the frozen labels are back"
    listed = versions(folder)
    assert [(one.number, one.digest, one.samples) for one in listed] == [
        (1, first.holdout, 9), (2, second.holdout, 8), (3, first.holdout, 9)
    ]  # fmt: skip
    assert listed[1].decision == 2 and listed[1].corrections == "2 images: 1 relabelled (red → green 1), 1 excluded"
    before, after = (load_version(folder, digest, "multiclass") for digest in (first.holdout, second.holdout))
    assert before is not None and after is not None
    assert labels_of(before)[content(red[0])] == "red" and labels_of(after)[content(red[0])] == "green"
    assert content(blue[0]) in labels_of(before) and content(blue[0]) not in labels_of(after)
    assert difference(before, after).text() == listed[1].corrections
    assert load_version(folder, "0" * 64, "multiclass") is None
    table = load_manifest(second.manifest)
    in_snapshot = table.with_samples(table.of("test"))
    assert difference(after, in_snapshot).count == 0, "the same samples by another path"


def test_the_lines_of_the_list_only_grow(config: Config, history: LabelHistory) -> None:
    folder, first = workspace_of(config).holdout, taken(config)
    lines = (folder / "versions.jsonl").read_text()
    decide(history, content(held(first, "red")[0]), "relabel", "green")
    taken(config)
    assert (folder / "versions.jsonl").read_text().startswith(lines)
    (folder / "versions.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"versions.jsonl: cannot be read .*; restore it, or move it away"):
        versions(folder)


def test_a_version_of_a_refused_run_does_not_take_effect(config: Config, history: LabelHistory) -> None:
    workspace, first = workspace_of(config), taken(config)
    decide(history, content(held(first, "red")[0]), "relabel", "green")
    take(config, workspace)
    assert [one.digest for one in versions(workspace.holdout)] == [first.holdout]


def test_a_label_that_no_training_image_has_does_not_apply(
    config: Config, history: LabelHistory, caplog: pytest.LogCaptureFixture
) -> None:
    first = taken(config)
    for sample in held(first, "red")[:2]:
        decide(history, content(sample), "relabel", "orange")
    second = taken(config)
    assert second.holdout == first.holdout
    assert "decisions whose labels no training image has, and that do not apply: 2" in caplog.text


def test_a_merged_class_is_merged_in_the_holdout(config: Config, history: LabelHistory, tmp_path: Path) -> None:
    first = taken(config)
    for file in (tmp_path / "images/red").iterdir():
        decide(history, hashlib.sha256(file.read_bytes()).hexdigest(), "relabel", "green")
    second = taken(config)
    assert second.counts["test"] == {"blue": 3, "green": 6} and not held(second, "red")
    assert sum(first.counts["test"].values()) == 9


def test_a_correction_applies_to_an_image_that_the_source_has_lost(
    config: Config, history: LabelHistory, tmp_path: Path
) -> None:
    first = taken(config)
    sample = held(first, "red")[0]
    for file in (tmp_path / "images/red").iterdir():
        if file.read_bytes() == sample.read():
            file.unlink()
    decide(history, content(sample), "relabel", "blue")
    assert len(held(taken(config), "blue")) == 4


def test_a_workspace_of_an_earlier_version_gets_versions(config: Config, history: LabelHistory) -> None:
    workspace, first = workspace_of(config), taken(config)
    for file in workspace.holdout.glob("version*"):
        file.unlink()
    accept(workspace, first)
    assert not versions(workspace.holdout), "of a run that an earlier Refract started"
    decide(history, content(held(first, "red")[0]), "relabel", "green")
    second = taken(config)
    assert [one.digest for one in versions(workspace.holdout)] == [second.holdout]


def test_an_undone_decision_restores_a_label_that_was_frozen_with_it(
    config: Config, history: LabelHistory, tmp_path: Path
) -> None:
    red = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "images/red").iterdir()]
    numbers = [decide(history, one, "relabel", "green") for one in red[:10]]
    first = taken(config)
    wrong = {content(sample) for sample in held(first, "green")} & {*red}
    assert wrong and f"(red → green {len(wrong)})" in versions(workspace_of(config).holdout)[0].corrections
    for number in numbers:
        history.undo(number, reviewer="ann")
    second = taken(config)
    assert {one for one, label in labels_of(load_manifest(second.manifest)).items() if label == "red"} == {*red}
    assert taken(config) == second


def test_classes_are_merged_in_the_run_that_freezes_other_data(
    config: Config, history: LabelHistory, tmp_path: Path
) -> None:
    paint(tmp_path / "held", range(20, 24))
    images = [*(tmp_path / "images/red").iterdir(), *(tmp_path / "held/red").iterdir()]
    numbers = [decide(history, hashlib.sha256(file.read_bytes()).hexdigest(), "relabel", "green") for file in images]
    config = config.changed({"gate.holdout": str(tmp_path / "held")})
    assert taken(config).counts["test"] == {"blue": 4, "green": 8}
    for number in numbers:
        history.undo(number, reviewer="ann")
    assert taken(config).counts["test"] == {"blue": 4, "green": 4, "red": 4}


def test_a_table_of_a_version_that_was_cut_off_is_not_compared(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    folder, first = workspace_of(config).holdout, taken(config)
    (table,) = folder.glob("version-*.csv")
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-2]))
    assert load_version(folder, first.holdout, "multiclass") is None
    assert "is not the table of version" in caplog.text


def test_a_changed_image_of_a_version_is_named(config: Config) -> None:
    workspace: Workspace = workspace_of(config)
    first = taken(config)
    next((workspace.holdout / "files").rglob("*.png")).write_bytes(b"other")
    with pytest.raises(DataError, match="1 images of the frozen holdout are gone or have changed"):
        load_version(workspace.holdout, first.holdout, "multiclass")
    assert json.loads((workspace.holdout / "versions.jsonl").read_text())["number"] == 1
