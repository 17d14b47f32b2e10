"""Workspaces of retraining that an earlier version wrote."""

import json
import shutil
from pathlib import Path

from small_data import paint, to_former_layout

from refract.pipeline.config.config import config_from_dict
from refract.pipeline.retraining.run import begin, unfinished, worth_resuming
from refract.pipeline.retraining.steps import STEPS
from refract.pipeline.retraining.workspace import Check, Workspace, read, read_run, workspace_of, write, write_run


def test_a_workspace_of_an_earlier_version_is_read(tmp_path: Path, new_tracking: Path) -> None:
    shutil.copy(new_tracking, tmp_path)
    paint(tmp_path / "images", range(30))
    config = config_from_dict(
        {
            "data": {"source": str(tmp_path / "images"), "image_size": 16, "workers": 0},
            "model": {"name": "lenet5"},
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "model_name": "colors"},
            "retrain": {"folder": str(tmp_path / "retrain")},
        }
    )
    workspace = workspace_of(config)
    finished, interrupted = begin(config, force=False), begin(config, force=False)
    STEPS[0](finished)
    record = read_run(finished) | {"training_run": "runs/colors-1", "ends": 0, "outcome": 0, "version": "1"}
    check: Check = {"level": "none", "summary": "no known image has another label"}
    record |= {"labels": {"changed": check}, "drift": {**check, "checks": {}}, "gate": {"lines": [check]}}
    write_run(finished, record)
    keys = ("run", "snapshot", "snapshot_folder", "inputs", "version", "outcome")
    write(workspace.root / "last.json", {key: value for key, value in record.items() if key in keys})
    last = workspace.last()
    to_former_layout(workspace.root)
    assert read(workspace.root / "nights" / finished.name / "night.json")["night"] == finished.name
    assert "left_out" in read(workspace.root / "nights" / finished.name / "night.json")["snapshot"]
    with workspace.held():
        assert workspace.runs() == [finished, interrupted] and not (workspace.root / "nights").exists()
        assert read_run(finished) == record and workspace.last() == last
        assert unfinished(workspace) == interrupted and worth_resuming(interrupted, config)
    STEPS[0](interrupted)
    assert f"those of run {finished.name};" in read_run(interrupted)["why"]
    assert "night" not in read(interrupted / "run.json")


def test_runs_of_an_earlier_version_join_those_of_this_one(tmp_path: Path) -> None:
    """This version started a run, in a flow that takes no lock, before the workspace was migrated."""
    workspace = Workspace(tmp_path)
    for folder, record in (("nights/20250101-000000-00", "night"), ("runs/20260101-000000-00", "run")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{record}.json").write_text(json.dumps({record: folder.rpartition("/")[2]}))
    with workspace.held():
        assert [read_run(folder)["run"] for folder in workspace.runs()] == ["20250101-000000-00", "20260101-000000-00"]
    assert not (tmp_path / "nights").exists()
