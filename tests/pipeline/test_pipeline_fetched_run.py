"""Copies of runs that another machine fetches and resumes, and older or other runs that must not replace them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from copied_runs import config_of, files, is_finished, keys, killed_after_a_copied_checkpoint, settings, until_newer
from object_server import ObjectServer
from safetensors.torch import load_file
from small_data import Run
from warm_process import WarmProcess

from refract.pipeline.config.config import config_from_dict
from refract.pipeline.training import folds, run_copy
from refract.pipeline.training.fetched_run import fetch
from refract.pipeline.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("new_cache")]


@pytest.mark.parametrize("way", ["url", "auto", "back"])
def test_another_machine_resumes_a_killed_run_with_the_same_result(
    way: str, store: ObjectServer, warm: WarmProcess, painted: Path, tmp_path: Path
) -> None:
    """back: the first machine continues what a second one did, with its older files in the way."""
    killed_after_a_copied_checkpoint(store, warm, painted, tmp_path / "one")
    machine = tmp_path / "other"
    if way == "back":
        killed_after_a_copied_checkpoint(store, warm, painted, machine, "--resume", "auto")
        machine = tmp_path / "one"
        (machine / "runs/colors/notes.txt").write_text("of the user")
    else:
        machine.mkdir()
        (machine / "colors.yaml").write_text(json.dumps(settings(painted, max_epochs=30)))
    arguments = ["--resume", "s3://data/runs/colors"] if way == "url" else ["colors.yaml", "--resume", "auto"]
    done = warm.run(["train", *arguments], cwd=machine, env=dict(os.environ), seconds=240)
    assert done.returncode == 0, done.stderr
    assert "resuming from runs/colors/checkpoints/resume-" in done.stderr
    assert f"downloading s3://data/runs/colors to runs/{'.colors.' if way == 'back' else 'colors'}" in done.stderr
    assert "copy:     s3://data/runs/colors/" in done.stdout
    assert (machine / "runs/colors/notes.txt").exists() == (way == "back")
    assert keys(store) == files(machine / "runs/colors"), (
        "the copy is complete, and has no checkpoint that the run has removed"
    )
    assert is_finished(store)
    again = warm.run(["train", "--resume", "s3://data/runs/colors"], cwd=machine, env=dict(os.environ), seconds=60)
    assert again.returncode == 2 and "runs/colors is finished already" in again.stderr

    undisturbed = train(config_of(painted, max_epochs=30, run_name="undisturbed", copy_to=None, runs_dir=str(tmp_path)))
    assert undisturbed is not None
    weights = load_file(machine / "runs/colors/bundle/weights.safetensors")
    expected = load_file(undisturbed.bundle / "weights.safetensors")
    assert all(weights[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("finished", [True, False])
def test_an_older_state_never_replaces_a_newer_copy(
    finished: bool, store: ObjectServer, warm: WarmProcess, painted: Path, tmp_path: Path
) -> None:
    killed_after_a_copied_checkpoint(store, warm, painted, tmp_path / "one")
    if finished:
        record = json.loads((tmp_path / "one/runs/colors/run.json").read_text())
        store.put("runs/colors/run.json", json.dumps({**record, "finished": True}).encode())
    else:
        store.put("runs/colors/checkpoints/resume-00009999.ckpt", b"of another machine")
    before = keys(store)
    done = warm.run(["train", "--resume", "runs/colors"], cwd=tmp_path / "one", env=dict(os.environ), seconds=240)
    assert done.returncode == 2, done.stderr
    assert "another machine has continued s3://data/runs/colors; move " in done.stderr
    assert "runs/colors away, then resume the copy with `refract train --resume s3://data/runs/colors`" in done.stderr
    assert keys(store) == before and (tmp_path / "one/runs/colors/run.json").exists()
    done = warm.run(["sync", "runs/colors"], cwd=tmp_path / "one", env=dict(os.environ), seconds=60)
    assert done.returncode == 1 and "another machine has continued s3://data/runs/colors" in done.stderr
    assert keys(store) == before


def test_compare_reads_copies(store: ObjectServer, painted: Path, refract: Run) -> None:
    for name, lr in (("slow", 1e-4), ("fast", 1e-2)):
        train(config_from_dict({**settings(painted, run_name=name), "optim": {"lr": lr}}))
    done = refract("compare", "s3://data/runs/slow", "s3://data/runs/fast/")
    assert "fast against slow on " in done.stdout
    assert "copy_to" not in done.stdout and "optim.lr" in done.stdout
    store.client.delete_object(Bucket="data", Key="runs/slow/holdout.npz")
    done = refract("compare", "s3://data/runs/slow", "s3://data/runs/fast", code=2)
    assert "s3://data/runs/slow: not the copy of a finished run: it has no holdout.npz" in done.stderr


@pytest.mark.parametrize("arguments", [["--resume", "runs/colors"], ["colors.yaml", "--resume", "auto"]])
def test_the_copy_of_another_run_is_never_touched(
    arguments: list[str], store: ObjectServer, painted: Path, warm: WarmProcess, tmp_path: Path
) -> None:
    """Of the same name, whether it is ahead or behind."""
    killed_after_a_copied_checkpoint(store, warm, painted, tmp_path / "one")
    for finished in (True, False):
        record = {"created": "2026-01-01", "fingerprint": "of other data", "finished": finished}
        store.put("runs/colors/run.json", json.dumps(record).encode())
        before, local = keys(store), files(tmp_path / "one/runs/colors")
        done = warm.run(["train", *arguments], cwd=tmp_path / "one", env=dict(os.environ), seconds=60)
        assert done.returncode == 2 and "s3://data/runs/colors is not a copy of" in done.stderr
        assert keys(store) == before and files(tmp_path / "one/runs/colors") == local


def test_folds_are_copied_as_they_are_trained_and_resumed(
    store: ObjectServer, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refract: Run
) -> None:
    train_fold = folds._train_fold
    monkeypatch.setattr(run_copy, "POLL_SECONDS", 0.02)

    def stopped(*arguments: Any) -> None:
        train_fold(*arguments)
        if arguments[3] == 1:
            until_newer(store, -1)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folds, "_train_fold", stopped)
        folds.train_folds(config_of(painted, folds=2), name="colors")
    assert "colors/fold-1/bundle/manifest.json" in keys(store) and "colors/fold-2/run.json" not in keys(store)
    shutil.move("runs", "taken")
    done = refract("train", "--resume", "s3://data/runs/colors")
    assert "fold 2 of 2" in done.stderr and "epoch 1/2" in done.stderr
    assert {name for name in keys(store) if "resume-" not in name} == files(Path("runs/colors"))
    assert Path("runs/colors/fold-1/run.json").read_bytes() == Path("taken/colors/fold-1/run.json").read_bytes()


def test_an_unfinished_bundle_of_a_copy_is_not_fetched(store: ObjectServer, tmp_path: Path) -> None:
    for name in ("run.json", "config.yaml", "checkpoints/resume-00000002.ckpt", "bundle/weights.safetensors"):
        store.put(f"runs/colors/{name}", b"{}")
    assert files(fetch("s3://data/runs/colors", tmp_path / "runs")) == {
        "colors/run.json", "colors/config.yaml", "colors/checkpoints/resume-00000002.ckpt"
    }  # fmt: skip


def test_a_copy_never_replaces_a_folder(store: ObjectServer, tmp_path: Path, refract: Run) -> None:
    store.put("runs/colors/run.json", b"{}")
    (tmp_path / "runs/colors").mkdir(parents=True)
    done = refract("train", "--resume", "s3://data/runs/colors/", code=2)
    assert "runs/colors is not a run, and s3://data/runs/colors not its copy; move " in done.stderr
    done = refract("train", "--resume", "s3://data/runs/nothing", code=2)
    assert "s3://data/runs/nothing is not a run: it has no run.json" in done.stderr
