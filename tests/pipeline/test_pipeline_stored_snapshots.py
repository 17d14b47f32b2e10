"""The removal of old snapshots, and what stays of them."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from small_data import paint

from refract.pipeline.cli import rerun
from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.retraining.snapshot import Snapshot, accept, take
from refract.pipeline.retraining.stored_snapshots import RECORD, remove_old, remove_unused, trained_before
from refract.pipeline.retraining.workspace import workspace_of, write, write_run
from refract.pipeline.training.run_directory import write_config


def config_at(root: Path, keep: int | None = 1) -> Config:
    return config_from_dict(
        {
            "data": {"source": str(root / "images"), "image_size": 16},
            "model": {"name": "lenet5"},
            "tracking": {"model_name": "colors", "uri": f"sqlite:///{root}/mlflow.db"},
            "retrain": {"folder": str(root / "retrain"), "keep_snapshots": keep},
        }
    )


def taken(config: Config, age: int, *, accepted: bool = True) -> Snapshot:
    """Take a snapshot that is `age` seconds old."""
    snapshot = take(config, workspace_of(config))
    if accepted:
        accept(workspace_of(config), snapshot)
    record = snapshot.folder / RECORD
    os.utime(record, (record.stat().st_mtime - age,) * 2)
    return snapshot


def three(root: Path, config: Config) -> list[Snapshot]:
    """Take three snapshots, oldest first, of more and more images."""
    snapshots = []
    for number in range(3):
        paint(root / "images", range(10 * number, 10 * number + 10))
        snapshots.append(taken(config, age=10 - number))
    return snapshots


def stored(config: Config) -> set[str]:
    return {path.name for path in (workspace_of(config).root / "snapshots").iterdir() if path.is_dir()}


def names(snapshots: Sequence[Snapshot]) -> set[str]:
    return {snapshot.folder.name for snapshot in snapshots}


def test_images_of_removed_snapshots_are_not_held_out_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_at(tmp_path)
    paint(tmp_path / "images", range(10))
    first = taken(config, age=10)
    trained = [Path(s.path) for s in load_manifest(first.manifest).samples if s.split != "test" and "red" in s.path]
    (tmp_path / "images/crimson").mkdir()
    for path in trained[3:]:
        path.rename(tmp_path / "images/crimson" / path.name)
    shutil.move(tmp_path / "images/crimson", tmp_path / "crimson")
    second = taken(config, age=5)
    assert remove_old(workspace_of(config), 1, ()) == [first.folder.name]
    assert stored(config) == names([second])

    shutil.move(tmp_path / "crimson", tmp_path / "images/crimson")
    with caplog.at_level(logging.WARNING):
        third = taken(config, age=0)
    assert third.counts["test"]["crimson"] == 0, "a model may have been trained on each of them"
    assert "the holdout has no image of crimson" in caplog.text


def test_snapshots_of_versions_with_an_alias_stay(
    tmp_path: Path, new_tracking: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(new_tracking, tmp_path)
    config = config_at(tmp_path)
    first, second, third = three(tmp_path, config)
    client = MlflowClient(config.tracking.uri, config.tracking.uri)
    client.create_registered_model("colors")
    for snapshot in (first, second):
        client.create_model_version("colors", str(tmp_path), tags={"snapshot": snapshot.digest})
    client.set_registered_model_alias("colors", "champion", "1")
    with caplog.at_level(logging.INFO):
        remove_unused(workspace_of(config), config.retrain.keep_snapshots, "colors", str(config.tracking.uri))
    assert stored(config) == names([first, third])
    assert f"snapshots: removed {second.folder.name}; retrain.keep_snapshots is 1" in caplog.text


def test_a_run_on_a_removed_snapshot_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_at(tmp_path)
    first, *_ = three(tmp_path, config)
    run = tmp_path / "runs" / "colors-1"
    write_config(config.changed({"data.source": str(first.manifest)}), run)
    assert remove_old(workspace_of(config), 1, ()) and rerun.main([str(run)]) == 2
    assert (
        f"cannot be repeated, as its data are gone: {first.manifest}. `refract retrain` removes"
        in capsys.readouterr().err
    )


def test_null_keeps_all_snapshots(tmp_path: Path) -> None:
    config = config_at(tmp_path, keep=None)
    snapshots = three(tmp_path, config)
    remove_unused(workspace_of(config), config.retrain.keep_snapshots, "colors", "sqlite:///does/not/exist.db")
    assert stored(config) == names(snapshots)


def test_snapshots_of_unfinished_runs_and_of_the_last_accepted_one_stay(tmp_path: Path, new_tracking: Path) -> None:
    shutil.copy(new_tracking, tmp_path)
    config = config_at(tmp_path)
    workspace = workspace_of(config)
    snapshots = three(tmp_path, config)
    MlflowClient(config.tracking.uri, config.tracking.uri).create_registered_model("colors")
    write(workspace.root / "last.json", {"snapshot": snapshots[0].record()})
    for number, (snapshot, ended) in enumerate(zip(snapshots, ({"outcome": 0}, {}, {"outcome": 0}), strict=True)):
        (workspace.root / "runs" / f"{number}").mkdir(parents=True)
        record: Any = {"snapshot": snapshot.record(), **ended}
        write_run(workspace.root / "runs" / f"{number}", record)
    remove_unused(workspace, config.retrain.keep_snapshots, "colors", str(config.tracking.uri))
    assert stored(config) == names(snapshots), "the first is the last accepted one, and the second is in use"
    write(workspace.root / "last.json", {"snapshot": snapshots[2].record()})
    remove_unused(workspace, config.retrain.keep_snapshots, "colors", str(config.tracking.uri))
    assert stored(config) == names(snapshots[1:])


@pytest.mark.parametrize("content", [None, b"no database at all" * 100])
def test_without_mlflow_nothing_is_removed(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_at(tmp_path)
    snapshots = three(tmp_path, config)
    if content is not None:
        (tmp_path / "mlflow.db").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        remove_unused(workspace_of(config), config.retrain.keep_snapshots, "colors", f"sqlite:///{tmp_path}/mlflow.db")
    assert stored(config) == names(snapshots)
    assert "snapshots: old ones stay for now: " in caplog.text


def test_a_snapshot_that_no_run_accepted_leaves_nothing(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    paint(tmp_path / "images", range(10))
    taken(config, age=10)
    trained = trained_before(workspace_of(config))
    paint(tmp_path / "images", range(10, 30))
    refused = taken(config, age=5, accepted=False)
    for path in (tmp_path / "images").glob("*/0[12]*.png"):
        path.unlink()
    latest = taken(config, age=0)
    remove_old(workspace_of(config), 1, ())
    assert stored(config) == names([latest]) != names([refused])
    assert trained_before(workspace_of(config)) == trained


def test_a_removal_that_was_killed_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_at(tmp_path)
    snapshots = three(tmp_path, config)
    trained = trained_before(workspace_of(config))

    def killed(path: Path) -> None:
        (path / RECORD).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_old(workspace_of(config), 1, ())
    assert trained_before(workspace_of(config)) == trained
    remove_old(workspace_of(config), 1, ())
    assert stored(config) == names(snapshots[2:])
    assert trained_before(workspace_of(config)) == trained
