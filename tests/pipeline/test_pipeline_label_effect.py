"""Corrections in a retraining run: their list, their effect on the holdout, and the results on both versions of the holdout."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from small_data import make_image, paint, write_image

from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data.manifest import Manifest, load_manifest
from refract.pipeline.labels.decisions import Action, Decision
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.retraining.champion_drift import champion_drift
from refract.pipeline.retraining.run import begin
from refract.pipeline.retraining.snapshot import WITHOUT_TABLE, Snapshot, accept, take
from refract.pipeline.retraining.steps import run_steps
from refract.pipeline.retraining.workspace import read_run, workspace_of
from refract.pipeline.schedule.on_drift import drift_trigger


def values_of(root: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(root / "images"), "image_size": 16, "workers": 0, "labels": str(root / "labels.db")},
        "augment": {"policy": "none"},
        "model": {"name": "lenet5"},
        "optim": {"lr": 0.01},
        "trainer": {"max_epochs": 4, "runs_dir": str(root / "runs")},
        "evaluation": {"robustness": "none"},
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db", "model_name": "colors"},
        "gate": {"robustness_loss": None, "latency_ratio": None, "calibration_error": None},
        "retrain": {"folder": str(root / "retrain"), "effect_of_labels": True},
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    paint(tmp_path / "images", range(30))
    LabelHistory(tmp_path / "labels.db", create=True)
    return config_from_dict(values_of(tmp_path))


@pytest.fixture
def history(config: Config) -> LabelHistory:
    return LabelHistory(str(config.data.labels))


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def decide(history: LabelHistory, file: Path, action: Action, *labels: str) -> int:
    path = history.relative(file)
    return history.append(Decision(content=digest(file), path=path, action=action, labels=labels, reviewer="ann"))


def taken(config: Config, since: int) -> Snapshot:
    snapshot = take(config, workspace_of(config), since=since)
    accept(workspace_of(config), snapshot)
    return snapshot


def labels_of(manifest: Manifest, *splits: str) -> dict[str, str]:
    return {
        digest(Path(sample.path)): manifest.labels[sample.labels[0]]
        for sample in manifest.samples if sample.split in splits
    }  # fmt: skip


def trained_files(snapshot: Snapshot, label: str) -> list[Path]:
    manifest = load_manifest(snapshot.manifest)
    return [Path(s.path) for s in manifest.of("train") if manifest.labels[s.labels[0]] == label]


def test_corrections_since_the_champion_are_listed_and_reverted(
    config: Config, history: LabelHistory, tmp_path: Path
) -> None:
    first = taken(config, 0)
    assert first.corrections is not None and first.corrections["count"] == 0
    assert not (first.folder / WITHOUT_TABLE).exists()
    red, green, blue = (trained_files(first, label) for label in ("red", "green", "blue"))
    decide(history, red[0], "relabel", "green")  # before the champion
    decide(history, green[0], "confirm", "green")
    decide(history, red[1], "relabel", "green")
    decide(history, red[0], "relabel", "blue")
    decide(history, blue[0], "exclude")
    write_image(tmp_path / "new.png", make_image("green", 99, side=16))
    decide(history, tmp_path / "new.png", "add", "green")
    second = taken(config, 2)
    assert second.corrections is not None
    assert second.corrections["summary"] == (
        "4 images corrected since the champion (decision 2): (not in the data) → green 1, blue → (excluded) 1, "
        "green → blue 1, red → green 1"
    )
    assert (second.corrections["since"], second.corrections["until"], second.corrections["count"]) == (2, 6, 4)
    assert {"before": "red", "after": "green", "count": 1} in second.corrections["pairs"]
    newest = {"path": "new.png", "before": "(not in the data)", "after": "green"}
    assert second.corrections["examples"][0] == newest
    before, now = load_manifest(second.folder / WITHOUT_TABLE), load_manifest(second.manifest)
    assert labels_of(before, "test") == labels_of(now, "test"), "the holdout is the same"
    old, new = (labels_of(one, "train", "val") for one in (before, now))
    changed = {
        content: (old.get(content), new.get(content))
        for content in old.keys() | new
        if old.get(content) != new.get(content)
    }
    assert changed == {
        digest(red[1]): ("red", "green"), digest(red[0]): ("green", "blue"), digest(blue[0]): ("blue", None),
        digest(tmp_path / "new.png"): (None, "green"),
    }  # fmt: skip
    none = taken(config, 6).corrections
    assert none is not None and none["count"] == 0
    assert not (second.folder / WITHOUT_TABLE).exists()
    other = taken(config, 99).corrections
    assert other is not None and other["count"] == 0, "of another history"


def test_corrections_of_the_holdout_alone_leave_nothing_to_train_without(config: Config, history: LabelHistory) -> None:
    first = taken(config, 0)
    manifest = load_manifest(first.manifest)
    sample = manifest.of("test")[0]
    decide(history, Path(sample.path), "relabel", "red" if manifest.labels[sample.labels[0]] != "red" else "blue")
    second = taken(config, 0)
    assert second.corrections is not None and second.corrections["count"] == 1
    assert not (second.folder / WITHOUT_TABLE).exists()


@pytest.mark.slow
def test_a_run_reports_corrections_their_effect_and_both_holdout_versions(
    config: Config, history: LabelHistory, tmp_path: Path, new_tracking: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some red training images are in the folder blue, and a label of the holdout is wrong, until decisions correct both."""
    shutil.copy(new_tracking, tmp_path)
    workspace, client = workspace_of(config), MlflowClient(config.tracking.uri, config.tracking.uri)
    frozen = take(config, workspace)
    accept(workspace, frozen)
    wrong = []
    for file in trained_files(frozen, "red")[:5]:
        wrong.append(file.rename(tmp_path / "images/blue" / f"red-{file.name}"))
    shutil.rmtree(workspace.root / "snapshots")

    def run(config: Config) -> dict[str, Any]:
        folder = begin(config, force=False)
        run_steps(folder)
        return dict(read_run(folder))

    first = run(config)
    assert first["version"] == "1" and first["label_decision"] == 0, first["why"]
    assert first["label_effect"]["summary"] == "not measured: no corrections since the champion"
    assert "versions" not in first["gate"]
    for file in wrong:
        decide(history, file, "relabel", "red")
    manifest = load_manifest(workspace.holdout / "holdout.csv")
    held = next(Path(s.path) for s in manifest.samples if manifest.labels[s.labels[0]] == "green")
    last = decide(history, held, "relabel", "blue")
    second = run(config)
    assert "version" in second, second["why"]
    assert second["label_decision"] == last and second["corrections"]["count"] == len(wrong) + 1
    assert f"blue → red {len(wrong)}" in second["corrections"]["summary"]
    effect = second["label_effect"]
    assert effect["samples"] == 18 and effect["gain"] == pytest.approx(effect["with"] - effect["without"])
    assert (effect["better"] - effect["worse"]) / 18 == pytest.approx(effect["gain"])
    assert f"by {len(wrong) + 1} corrections: accuracy " in effect["summary"]
    assert "report: " not in caplog.text
    now, before = second["gate"]["versions"]
    assert (now["version"], now["decides"], before["version"], before["decides"]) == (2, True, 1, False)
    assert before["corrections"] == "1 image: 1 relabelled (green → blue 1)"
    accuracy = next(line["value"] for line in second["gate"]["lines"] if line["name"] == "accuracy")
    assert now["challenger"] == accuracy and now["champion"] is not None
    assert {abs(round(18 * (now[who] - before[who]))) for who in ("challenger", "champion")} <= {0, 1}
    folder = workspace.run_folder(second["run"])
    assert json.loads((folder / "gate.json").read_text())["versions"] == second["gate"]["versions"]
    page = (folder / "report/report.html").read_text()
    for text in ("Versions of the holdout", "Corrections of labels", "Their effect:", "blue</td><td>red", "p = "):
        assert text in page
    tags = client.get_model_version("colors", second["version"]).tags
    assert tags["label_decision"] == str(last) and tags["labels.effect"] == effect["summary"]
    assert tags["labels.corrections"] == second["corrections"]["summary"]
    assert "holdout version 2: challenger" in tags["gate.versions"]
    artifacts = {one.path for one in client.list_artifacts(second["mlflow_run"])}
    assert {"gate.txt", "retraining.html"} <= artifacts
    runs = client.search_runs(["0", *(one.experiment_id for one in client.search_experiments())])
    without = [one for one in runs if "data.corrections" in one.data.tags]
    assert [one.data.tags["data.corrections"] for one in without] == ["without those since decision 0"]
    assert len(client.search_model_versions("name='colors'")) == 2, "it is not registered"

    # The trigger `--on-drift` measures new data against this champion.
    for number in range(30):
        write_image(tmp_path / "dark" / f"{number}.png", make_image("red", number, side=16) // 5)
    values = values_of(tmp_path)
    (tmp_path / "colors.yaml").write_text(json.dumps(values))
    trigger = drift_trigger(tmp_path / "colors.yaml", "dark", "warn")
    reading = trigger.read("", None)
    champion = second["version"] if second["outcome"] == 0 else "1"
    assert reading.due and reading.mark == champion and "brightness" in reading.summary, reading
    known = dict(reading.state)
    assert champion_drift(config, str(tmp_path / "dark"), {**known, "summary": "as before"})["summary"] == "as before"
    write_image(tmp_path / "dark" / "more.png", make_image("red", 1, side=16) // 5)
    again = champion_drift(config, str(tmp_path / "dark"), {**known, "summary": "as before"})
    assert "of 31 new samples" in again["summary"] and again["data"] != known["data"]
    write_image(tmp_path / "few" / "red.png", make_image("red", 1, side=16))
    few = champion_drift(config, str(tmp_path / "few"), {})
    assert few["level"] is None and few["summary"].startswith("not measured: ")
