"""Copies of runs in an object store: what they hold at each moment, and failures of the store."""

import itertools
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from threading import Event

import pytest
from copied_runs import (
    config_of,
    files,
    is_finished,
    keys,
    settings,
)
from mlflow import MlflowClient
from object_server import ObjectServer
from small_data import Run
from warm_process import WarmProcess

from refract.cli import main as refract_main
from refract.errors import RefractError
from refract.models.bundle.bundle import load_bundle
from refract.pipeline.config.config import ConfigError, config_from_dict
from refract.pipeline.files import write_atomically
from refract.pipeline.tracking.journal import Journal
from refract.pipeline.training import run_copy
from refract.pipeline.training.callbacks.checkpoints import newest
from refract.pipeline.training.fetched_run import fetch
from refract.pipeline.training.run import train
from refract.pipeline.training.run_copy import RunCopy
from refract.pipeline.training.run_directory import RECORD
from refract.remote import client
from refract.remote.client import RemoteError
from refract.remote.store import RemoteObject

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("new_cache")]


def test_a_copy_can_be_resumed_from_each_state(
    store: ObjectServer, painted: Path, tmp_path: Path, new_tracking: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Fetch the copy after each upload, as if the machine had been taken away then."""
    shutil.copy(new_tracking, tmp_path)
    upload, states = client.upload, list[set[str]]()

    def uploaded(path: Path, url: str) -> RemoteObject:
        item = upload(path, url)
        if f"colors/{RECORD}" in keys(store) and not is_finished(store):
            runs = tmp_path / f"state-{len(states)}"
            run = fetch("s3://data/runs/colors", runs)
            Journal(run)
            assert newest(run / "checkpoints") or not list(run.glob("checkpoints/resume-*"))
            if (run / "bundle").exists():
                load_bundle(run / "bundle")
            states.append(files(run))
            shutil.rmtree(runs)
        return item

    monkeypatch.setattr(run_copy, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(client, "upload", uploaded)
    values = settings(painted, max_epochs=3) | {"tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    with caplog.at_level(logging.WARNING):
        result = train(config_from_dict(values))
    assert result is not None and result.not_copied is None, result
    assert "not up to date" not in caplog.text, "the assertions above run in the thread that copies"
    assert any("colors/bundle/manifest.json" in state for state in states)
    assert any("colors/journal.delivered.json" in state for state in states)
    assert any("/resume-" in name for state in states for name in state)


def test_a_slow_upload_never_leaves_the_copy_without_a_checkpoint(
    store: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each upload takes longer than the training needs for two checkpoints."""
    run, upload, step = tmp_path / "colors", client.upload, itertools.count()
    (run / "checkpoints").mkdir(parents=True)
    (run / RECORD).write_text("{}")

    def write_checkpoint() -> None:
        number = next(step)
        write_atomically(run / "checkpoints/best.ckpt", bytes(1000 + number))
        write_atomically(run / f"checkpoints/resume-{number:08}.ckpt", b"weights")
        (run / f"checkpoints/resume-{number - 2:08}.ckpt").unlink(missing_ok=True)

    def slow(path: Path, url: str) -> RemoteObject:
        for _ in range(3):
            write_checkpoint()
        return upload(path, url)

    write_checkpoint()
    monkeypatch.setattr(client, "upload", slow)
    copy = RunCopy(run, "s3://data/runs")
    before = ""
    for _ in range(3):
        copy.update()
        checkpoints = sorted(key for key in keys(store) if "/resume-" in key)
        assert 1 <= len(checkpoints) <= 2 and checkpoints[-1] > before, "and it is a newer one"
        before = checkpoints[-1]


def test_a_checkpoint_follows_its_files_and_the_record_of_a_finished_run_is_last(
    store: ObjectServer, painted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_copy, "POLL_SECONDS", 0.05)
    train(config_of(painted, max_epochs=6))
    written = [
        path.partition("/runs/colors/")[2].partition("?")[0] for method, path in store.proxy.writes if method == "PUT"
    ]
    assert written[:2] == ["config.yaml", "run.json"], "a copy can be written before the training starts"
    assert written[-1] == "run.json"
    bundle = [name for name in written if name.startswith("bundle/")]
    assert bundle[-1] == "bundle/manifest.json" and bundle.count("bundle/manifest.json") == 1
    repeated = {name for name in written if written.count(name) > 1}
    assert repeated <= {"run.json", "checkpoints/best.ckpt"}


def test_a_run_with_the_name_of_another_copy_does_not_start(store: ObjectServer, painted: Path) -> None:
    store.put("runs/colors/run.json", b"{}")
    with pytest.raises(ConfigError, match=r"s3://data/runs/colors exists already; set another trainer\.run_name"):
        train(config_of(painted))
    assert not Path("runs/colors").exists(), "the name is free"
    assert keys(store) == {"colors/run.json"}


@pytest.mark.parametrize("name", ["colors?versionId=3", "colors?token=x"])
def test_a_name_that_a_url_cannot_have_is_refused(name: str, store: ObjectServer, painted: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.run_name: .* has a question mark"):
        train(config_of(painted, run_name=name))
    assert not Path("runs", name).exists() and not keys(store)


def test_a_missing_bucket_is_named_before_the_training(store: ObjectServer, painted: Path) -> None:
    with pytest.raises(
        RemoteError, match=r"s3://typo/runs/colors/config\.yaml: there is no such bucket; check the URL"
    ):
        train(config_of(painted, copy_to="s3://typo/runs"))
    assert not Path("runs/colors").exists()


def test_a_first_copy_that_fails_halfway_leaves_nothing(
    store: ObjectServer, painted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = client.upload

    def broken(path: Path, url: str) -> RemoteObject:
        if url.endswith(RECORD):
            raise RemoteError("the network is gone")
        return upload(path, url)

    with monkeypatch.context() as patch:
        patch.setattr(client, "upload", broken)
        with pytest.raises(RemoteError, match="the network is gone"):
            train(config_of(painted))
    assert not Path("runs/colors").exists() and not keys(store), "the name is free on both sides"
    train(config_of(painted))


def test_a_stopped_training_does_not_wait_for_a_store_that_hangs(
    store: ObjectServer, painted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released, update = Event(), RunCopy.update

    def hanging(copy: RunCopy) -> None:
        if copy._uploaded is not None:
            released.wait(60)
        update(copy)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunCopy, "update", hanging)
    monkeypatch.setattr(run_copy, "LAST_SECONDS", 0.2)
    monkeypatch.setattr("refract.pipeline.training.run.evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        train(config_of(painted))
    assert "the copy of the run is not up to date: s3://data/runs/colors was not reached in 0.2 s" in caplog.text
    released.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "run copy"]:
        thread.join(30)


def test_files_that_the_user_deletes_stay_in_the_copy(store: ObjectServer, painted: Path, refract: Run) -> None:
    train(config_of(painted))
    before = keys(store)
    shutil.rmtree("runs/colors/bundle")
    refract("sync", "runs/colors")
    assert keys(store) == before


def test_a_training_that_mlflow_refuses_leaves_no_copy(
    store: ObjectServer, painted: Path, tmp_path: Path, new_tracking: Path
) -> None:
    shutil.copy(new_tracking, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiments = MlflowClient(uri, uri)
    experiments.delete_experiment(experiments.create_experiment("deleted"))
    values = settings(painted) | {"tracking": {"uri": uri, "experiment": "deleted"}}
    with pytest.raises(RefractError, match="deleted"):
        train(config_from_dict(values))
    assert not Path("runs/colors").exists() and not keys(store), "the name is free on both sides"


@pytest.mark.parametrize("lost", ["the folder", "its files"])
def test_the_copy_of_a_lost_folder_stays(lost: str, store: ObjectServer, tmp_path: Path) -> None:
    run = tmp_path / "colors"
    (run / "checkpoints").mkdir(parents=True)
    (run / RECORD).write_text("{}")
    copy = RunCopy(run, "s3://data/runs")
    for step in (1, 2):
        write_atomically(run / f"checkpoints/resume-{step:08}.ckpt", b"weights")
        copy.update()
    before = keys(store)
    shutil.rmtree(run)
    if lost == "its files":
        run.mkdir()
        copy.update()
    else:
        with pytest.raises(FileNotFoundError):
            copy.update()
    copy.remove_unstarted()
    assert keys(store) == before


def test_two_machines_that_train_the_same_run_do_not_mix_its_copy(store: ObjectServer, tmp_path: Path) -> None:
    record = json.dumps({"created": "now", "fingerprint": "x"})
    for machine in ("one", "other"):
        (tmp_path / machine / "colors").mkdir(parents=True)
        (tmp_path / machine / "colors" / RECORD).write_text(record)
    one, other = (RunCopy(tmp_path / machine / "colors", "s3://data/runs") for machine in ("one", "other"))
    one.update()
    (tmp_path / "other/colors/notes.txt").write_text("of the other one")
    other.update()
    (tmp_path / "one/colors/notes.txt").write_text("of the first one")
    one.update()
    (tmp_path / "other/colors/notes.txt").write_text("again")
    with pytest.raises(ConfigError, match="another machine writes s3://data/runs/colors, as notes.txt has changed"):
        other.update()


def test_a_copy_whose_objects_were_lost_is_completed(store: ObjectServer, tmp_path: Path) -> None:
    (tmp_path / "colors").mkdir()
    (tmp_path / "colors" / RECORD).write_text("{}")
    copy = RunCopy(tmp_path / "colors", "s3://data/runs")
    copy.update()
    store.client.delete_object(Bucket="data", Key=f"runs/colors/{RECORD}")
    copy.update()
    assert keys(store) == {f"colors/{RECORD}"}


def test_an_outage_warns_once_for_each_checkpoint(
    store: ObjectServer, painted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = RunCopy.update

    def refused_later(copy: RunCopy) -> None:
        if copy._uploaded is not None:
            raise RemoteError("the network is gone")
        update(copy)

    monkeypatch.setattr(RunCopy, "update", refused_later)
    monkeypatch.setattr(run_copy, "POLL_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING):
        result = train(config_of(painted, checkpoint_seconds=900))  # one checkpoint, at the end of the last epoch
    assert result is not None and result.not_copied is not None and "the network is gone" in result.not_copied
    assert caplog.text.count("the copy of the run is not up to date: the network is gone") == 1


def test_a_store_that_cannot_be_written_is_named_before_the_training(store: ObjectServer, painted: Path) -> None:
    store.proxy.refuses_writes = True
    with pytest.raises(RemoteError, match=r"s3://data/runs/colors/config\.yaml.*access denied"):
        train(config_of(painted))
    assert not Path("runs/colors").exists()


def test_a_copy_that_failed_is_completed_by_sync(
    store: ObjectServer, painted: Path, refract: Run, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    update = RunCopy.update

    def refused_later(copy: RunCopy) -> None:
        update(copy)
        store.proxy.refuses_writes = True

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(RunCopy, "update", refused_later)
        patch.setattr(run_copy, "POLL_SECONDS", 0.05)
        Path("colors.yaml").write_text(json.dumps(settings(painted)))
        assert refract_main(["train", "colors.yaml"]) == 1
    printed = capsys.readouterr()
    assert "bundle:   runs/colors/bundle" in printed.out, "the training itself is complete"
    assert "NOT COPIED: the run in runs/colors is complete, but its copy is not: s3://data/runs/colors/" in printed.err
    assert "refract sync runs/colors completes it" in printed.err
    assert "trainer.copy_to: the copy of the run is not up to date" in caplog.text
    assert keys(store) == {"colors/config.yaml", "colors/run.json"}
    done = refract("sync", "runs/colors", code=1)
    assert "runs/colors: its copy is not complete" in done.stderr

    store.proxy.refuses_writes = False
    again = refract("train", "--resume", "s3://data/runs/colors", code=2)
    assert "runs/colors is finished already; `refract sync runs/colors` completes its copy" in again.stderr
    done = refract("sync", "runs/colors")
    assert "runs/colors: s3://data/runs/colors is complete" in done.stdout
    assert keys(store) == files(Path("runs/colors"))
    store.proxy.writes.clear()
    refract("sync", "runs")
    assert store.proxy.writes == [], "what the copy has is not sent again"


def test_a_stop_copies_the_last_checkpoint(
    store: ObjectServer, warm: WarmProcess, painted: Path, tmp_path: Path
) -> None:
    (tmp_path / "colors.yaml").write_text(json.dumps(settings(painted, max_epochs=300, checkpoint_seconds=900)))
    started = warm.start(["train", "colors.yaml"], cwd=tmp_path, env=dict(os.environ))
    with started.output:
        assert any("epoch 2/300" in line for line in started.output)
        started.terminate()
        assert started.wait(60) == 75
    assert keys(store) == files(tmp_path / "runs/colors")
    assert any("/checkpoints/resume-" in key for key in keys(store))


@pytest.mark.parametrize("url", ["runs", "https://host/runs", "s3://", "s3://user:secret@data/runs", "hf://owner/name"])
def test_copies_need_an_object_store(url: str, painted: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.copy_to: .* is not a folder's URL at s3://, gs:// or az:// without credentials"
    ) as error:
        config_of(painted, copy_to=url)
    assert "secret" not in str(error.value)
