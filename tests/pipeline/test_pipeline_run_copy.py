"""Copies of runs in an object store: what they hold at each moment, and how another machine resumes from them."""

import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from mlflow import MlflowClient
from object_server import ObjectServer
from safetensors.torch import load_file
from small_data import Run, paint
from warm_process import WarmProcess

from refract.cli import main as refract_main
from refract.errors import RefractError
from refract.models.bundle.bundle import load_bundle
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.files import write_atomically
from refract.pipeline.tracking.journal import Journal
from refract.pipeline.training import folds, run_copy
from refract.pipeline.training.callbacks.checkpoints import newest
from refract.pipeline.training.fetched_run import fetch
from refract.pipeline.training.run import train
from refract.pipeline.training.run_copy import RunCopy
from refract.pipeline.training.run_directory import RECORD
from refract.remote import client
from refract.remote.client import RemoteError
from refract.remote.store import RemoteObject

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("new_cache")]


@pytest.fixture(scope="module")
def one_server() -> Iterator[ObjectServer]:
    server = ObjectServer()
    yield server
    server.close()


@pytest.fixture
def server(one_server: ObjectServer) -> ObjectServer:
    """Without copies of other tests."""
    for key in keys(one_server):
        one_server.client.delete_object(Bucket="data", Key=f"runs/{key}")
    one_server.proxy.writes.clear()
    one_server.proxy.refuses_writes = False
    return one_server


@pytest.fixture
def images(tmp_path: Path) -> Path:
    paint(tmp_path / "images", range(12))
    return tmp_path / "images"


def settings(images: Path, **trainer: object) -> dict[str, dict[str, object]]:
    return {
        "data": {"source": str(images), "image_size": 16, "batch_size": 8, "workers": 0},
        "augment": {"policy": [{"HorizontalFlip": {"p": 0.5}}]},
        "model": {"name": "cnn", "args": {"widths": [4, 8]}},
        "trainer": {
            "max_epochs": 2, "run_name": "colors", "device": "cpu", "checkpoint_seconds": 0, "copy_to": "s3://data/runs", **trainer
        },
        "tracking": {"enabled": False}, "evaluation": {"robustness": "none"},
    }  # fmt: skip


def config_of(images: Path, **trainer: object) -> Config:
    return config_from_dict(settings(images, **trainer))


def keys(server: ObjectServer) -> set[str]:
    objects = server.client.list_objects_v2(Bucket="data", Prefix="runs/").get("Contents", ())
    return {item["Key"].removeprefix("runs/") for item in objects}


def files(run: Path) -> set[str]:
    names = {path.relative_to(run.parent).as_posix() for path in run.rglob("*") if path.is_file()}
    return {name for name in names if "/." not in name}


def is_finished(server: ObjectServer) -> bool:
    record = server.client.get_object(Bucket="data", Key="runs/colors/run.json")["Body"].read()
    return bool(json.loads(record).get("finished"))


def newest_step(server: ObjectServer) -> int:
    return max((int(key[-13:-5]) for key in keys(server) if "/checkpoints/resume-" in key), default=-1)


def until_newer(server: ObjectServer, step: int) -> None:
    """Wait until the copy has a checkpoint after this step."""
    deadline = time.monotonic() + 60
    while newest_step(server) <= step:
        assert time.monotonic() < deadline, keys(server)
        time.sleep(0.02)


def killed_after_a_copied_checkpoint(
    server: ObjectServer, warm: WarmProcess, images: Path, machine: Path, *arguments: str
) -> None:
    """Start a training in the folder `machine`, and kill it once its copy has a new checkpoint."""
    machine.mkdir()
    (machine / "colors.yaml").write_text(json.dumps(settings(images, max_epochs=30)))
    code = (
        "import sys, refract.pipeline.training.run_copy as run_copy\n"
        "run_copy.POLL_SECONDS = 0.05\n"
        "import refract.cli; sys.exit(refract.cli.main(sys.argv[1:]))"
    )
    local = [int(path.stem[-8:]) for path in machine.parent.glob("*/runs/colors/checkpoints/resume-*.ckpt")]
    step = max([newest_step(server), *local])
    started = warm.popen(["train", "colors.yaml", *arguments], cwd=machine, code=code)
    until_newer(server, step)
    started.kill()
    started.communicate()
    assert not (machine / "runs/colors/bundle").exists()


@pytest.mark.parametrize("way", ["url", "auto", "back"])
def test_another_machine_resumes_a_killed_run_with_the_same_result(
    way: str, server: ObjectServer, warm: WarmProcess, images: Path, tmp_path: Path
) -> None:
    """back: the first machine continues what a second one did, with its older files in the way."""
    killed_after_a_copied_checkpoint(server, warm, images, tmp_path / "one")
    machine = tmp_path / "other"
    if way == "back":
        killed_after_a_copied_checkpoint(server, warm, images, machine, "--resume", "auto")
        machine = tmp_path / "one"
        (machine / "runs/colors/notes.txt").write_text("of the user")
    else:
        machine.mkdir()
        (machine / "colors.yaml").write_text(json.dumps(settings(images, max_epochs=30)))
    arguments = ["--resume", "s3://data/runs/colors"] if way == "url" else ["colors.yaml", "--resume", "auto"]
    done = warm.run(["train", *arguments], cwd=machine, env=dict(os.environ), seconds=240)
    assert done.returncode == 0, done.stderr
    assert "resuming from runs/colors/checkpoints/resume-" in done.stderr
    assert f"downloading s3://data/runs/colors to runs/{'.colors.' if way == 'back' else 'colors'}" in done.stderr
    assert "copy:     s3://data/runs/colors/" in done.stdout
    assert (machine / "runs/colors/notes.txt").exists() == (way == "back")
    assert keys(server) == files(machine / "runs/colors"), (
        "the copy is complete, and has no checkpoint that the run has removed"
    )
    assert is_finished(server)
    again = warm.run(["train", "--resume", "s3://data/runs/colors"], cwd=machine, env=dict(os.environ), seconds=60)
    assert again.returncode == 2 and "runs/colors is finished already" in again.stderr

    undisturbed = train(config_of(images, max_epochs=30, run_name="undisturbed", copy_to=None, runs_dir=str(tmp_path)))
    assert undisturbed is not None
    weights = load_file(machine / "runs/colors/bundle/weights.safetensors")
    expected = load_file(undisturbed.bundle / "weights.safetensors")
    assert all(weights[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("finished", [True, False])
def test_an_older_state_never_replaces_a_newer_copy(
    finished: bool, server: ObjectServer, warm: WarmProcess, images: Path, tmp_path: Path
) -> None:
    killed_after_a_copied_checkpoint(server, warm, images, tmp_path / "one")
    if finished:
        record = json.loads((tmp_path / "one/runs/colors/run.json").read_text())
        server.put("runs/colors/run.json", json.dumps({**record, "finished": True}).encode())
    else:
        server.put("runs/colors/checkpoints/resume-00009999.ckpt", b"of another machine")
    before = keys(server)
    done = warm.run(["train", "--resume", "runs/colors"], cwd=tmp_path / "one", env=dict(os.environ), seconds=240)
    assert done.returncode == 2, done.stderr
    assert "another machine has continued s3://data/runs/colors; move " in done.stderr
    assert "runs/colors away, then resume the copy with `refract train --resume s3://data/runs/colors`" in done.stderr
    assert keys(server) == before and (tmp_path / "one/runs/colors/run.json").exists()
    done = warm.run(["sync", "runs/colors"], cwd=tmp_path / "one", env=dict(os.environ), seconds=60)
    assert done.returncode == 1 and "another machine has continued s3://data/runs/colors" in done.stderr
    assert keys(server) == before


def test_compare_reads_copies(server: ObjectServer, images: Path, refract: Run) -> None:
    for name, lr in (("slow", 1e-4), ("fast", 1e-2)):
        train(config_from_dict({**settings(images, run_name=name), "optim": {"lr": lr}}))
    done = refract("compare", "s3://data/runs/slow", "s3://data/runs/fast/")
    assert "fast against slow on " in done.stdout
    assert "copy_to" not in done.stdout and "optim.lr" in done.stdout
    server.client.delete_object(Bucket="data", Key="runs/slow/holdout.npz")
    done = refract("compare", "s3://data/runs/slow", "s3://data/runs/fast", code=2)
    assert "s3://data/runs/slow: not the copy of a finished run: it has no holdout.npz" in done.stderr


def test_a_copy_can_be_resumed_from_each_state(
    server: ObjectServer, images: Path, tmp_path: Path, new_tracking: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Fetch the copy after each upload, as if the machine had been taken away then."""
    shutil.copy(new_tracking, tmp_path)
    upload, states = client.upload, list[set[str]]()

    def uploaded(path: Path, url: str) -> RemoteObject:
        item = upload(path, url)
        if f"colors/{RECORD}" in keys(server) and not is_finished(server):
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
    values = settings(images, max_epochs=3) | {"tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    with caplog.at_level(logging.WARNING):
        result = train(config_from_dict(values))
    assert result is not None and result.not_copied is None, result
    assert "not up to date" not in caplog.text, "the assertions above run in the thread that copies"
    assert any("colors/bundle/manifest.json" in state for state in states)
    assert any("colors/journal.delivered.json" in state for state in states)
    assert any("/resume-" in name for state in states for name in state)


def test_a_slow_upload_never_leaves_the_copy_without_a_checkpoint(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        kept = sorted(key for key in keys(server) if "/resume-" in key)
        assert 1 <= len(kept) <= 2 and kept[-1] > before, "and it is a newer one"
        before = kept[-1]


def test_a_checkpoint_follows_its_files_and_the_record_of_a_finished_run_is_last(
    server: ObjectServer, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_copy, "POLL_SECONDS", 0.05)
    train(config_of(images, max_epochs=6))
    written = [
        path.partition("/runs/colors/")[2].partition("?")[0] for method, path in server.proxy.writes if method == "PUT"
    ]
    assert written[:2] == ["config.yaml", "run.json"], "a copy can be written before the training starts"
    assert written[-1] == "run.json"
    bundle = [name for name in written if name.startswith("bundle/")]
    assert bundle[-1] == "bundle/manifest.json" and bundle.count("bundle/manifest.json") == 1
    assert all(written.count(name) == 1 for name in written if name not in ("run.json", "checkpoints/best.ckpt"))


def test_a_run_with_the_name_of_another_copy_does_not_start(server: ObjectServer, images: Path) -> None:
    server.put("runs/colors/run.json", b"{}")
    with pytest.raises(ConfigError, match=r"s3://data/runs/colors exists already; set another trainer\.run_name"):
        train(config_of(images))
    assert not Path("runs/colors").exists(), "the name is free"
    assert keys(server) == {"colors/run.json"}


@pytest.mark.parametrize("name", ["colors?versionId=3", "colors?token=x"])
def test_a_name_that_a_url_cannot_have_is_refused(name: str, server: ObjectServer, images: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.run_name: .* has a question mark"):
        train(config_of(images, run_name=name))
    assert not Path("runs", name).exists() and not keys(server)


def test_a_missing_bucket_is_named_before_the_training(server: ObjectServer, images: Path) -> None:
    with pytest.raises(
        RemoteError, match=r"s3://typo/runs/colors/config\.yaml: there is no such bucket; check the URL"
    ):
        train(config_of(images, copy_to="s3://typo/runs"))
    assert not Path("runs/colors").exists()


def test_a_first_copy_that_fails_halfway_leaves_nothing(
    server: ObjectServer, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = client.upload

    def broken(path: Path, url: str) -> RemoteObject:
        if url.endswith(RECORD):
            raise RemoteError("the network is gone")
        return upload(path, url)

    with monkeypatch.context() as patch:
        patch.setattr(client, "upload", broken)
        with pytest.raises(RemoteError, match="the network is gone"):
            train(config_of(images))
    assert not Path("runs/colors").exists() and not keys(server), "the name is free on both sides"
    train(config_of(images))


def test_a_stopped_training_does_not_wait_for_a_store_that_hangs(
    server: ObjectServer, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
        train(config_of(images))
    assert "the copy of the run is not up to date: s3://data/runs/colors was not reached in 0.2 s" in caplog.text
    released.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "run copy"]:
        thread.join(30)


def test_files_that_the_user_deletes_stay_in_the_copy(server: ObjectServer, images: Path, refract: Run) -> None:
    train(config_of(images))
    before = keys(server)
    shutil.rmtree("runs/colors/bundle")
    refract("sync", "runs/colors")
    assert keys(server) == before


def test_a_training_that_mlflow_refuses_leaves_no_copy(
    server: ObjectServer, images: Path, tmp_path: Path, new_tracking: Path
) -> None:
    shutil.copy(new_tracking, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiments = MlflowClient(uri, uri)
    experiments.delete_experiment(experiments.create_experiment("deleted"))
    values = settings(images) | {"tracking": {"uri": uri, "experiment": "deleted"}}
    with pytest.raises(RefractError, match="deleted"):
        train(config_from_dict(values))
    assert not Path("runs/colors").exists() and not keys(server), "the name is free on both sides"


@pytest.mark.parametrize("arguments", [["--resume", "runs/colors"], ["colors.yaml", "--resume", "auto"]])
def test_the_copy_of_another_run_is_never_touched(
    arguments: list[str], server: ObjectServer, images: Path, warm: WarmProcess, tmp_path: Path
) -> None:
    """Of the same name, whether it is ahead or behind."""
    killed_after_a_copied_checkpoint(server, warm, images, tmp_path / "one")
    for finished in (True, False):
        record = {"created": "2026-01-01", "fingerprint": "of other data", "finished": finished}
        server.put("runs/colors/run.json", json.dumps(record).encode())
        before, local = keys(server), files(tmp_path / "one/runs/colors")
        done = warm.run(["train", *arguments], cwd=tmp_path / "one", env=dict(os.environ), seconds=60)
        assert done.returncode == 2 and "s3://data/runs/colors has something else than a copy of" in done.stderr
        assert keys(server) == before and files(tmp_path / "one/runs/colors") == local


@pytest.mark.parametrize("lost", ["the folder", "its files"])
def test_the_copy_of_a_lost_folder_stays(lost: str, server: ObjectServer, tmp_path: Path) -> None:
    run = tmp_path / "colors"
    (run / "checkpoints").mkdir(parents=True)
    (run / RECORD).write_text("{}")
    copy = RunCopy(run, "s3://data/runs")
    for step in (1, 2):
        write_atomically(run / f"checkpoints/resume-{step:08}.ckpt", b"weights")
        copy.update()
    before = keys(server)
    shutil.rmtree(run)
    if lost == "its files":
        run.mkdir()
        copy.update()
    else:
        with pytest.raises(FileNotFoundError):
            copy.update()
    copy.remove_unstarted()
    assert keys(server) == before


def test_two_machines_that_train_the_same_run_do_not_mix_its_copy(server: ObjectServer, tmp_path: Path) -> None:
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


def test_a_copy_whose_objects_were_lost_is_completed(server: ObjectServer, tmp_path: Path) -> None:
    (tmp_path / "colors").mkdir()
    (tmp_path / "colors" / RECORD).write_text("{}")
    copy = RunCopy(tmp_path / "colors", "s3://data/runs")
    copy.update()
    server.client.delete_object(Bucket="data", Key=f"runs/colors/{RECORD}")
    copy.update()
    assert keys(server) == {f"colors/{RECORD}"}


def test_an_outage_warns_once_for_each_checkpoint(
    server: ObjectServer, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = RunCopy.update

    def refused_later(copy: RunCopy) -> None:
        if copy._uploaded is not None:
            raise RemoteError("the network is gone")
        update(copy)

    monkeypatch.setattr(RunCopy, "update", refused_later)
    monkeypatch.setattr(run_copy, "POLL_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING):
        result = train(config_of(images, checkpoint_seconds=900))  # one checkpoint, at the end of the last epoch
    assert result is not None and result.not_copied is not None and "the network is gone" in result.not_copied
    assert caplog.text.count("the copy of the run is not up to date: the network is gone") == 1


def test_folds_are_copied_as_they_are_trained_and_resumed(
    server: ObjectServer, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refract: Run
) -> None:
    train_fold = folds._train_fold
    monkeypatch.setattr(run_copy, "POLL_SECONDS", 0.02)

    def stopped(*arguments: Any) -> None:
        train_fold(*arguments)
        if arguments[3] == 1:
            until_newer(server, -1)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folds, "_train_fold", stopped)
        folds.train_folds(config_of(images, folds=2), name="colors")
    assert "colors/fold-1/bundle/manifest.json" in keys(server) and "colors/fold-2/run.json" not in keys(server)
    shutil.move("runs", "taken")
    done = refract("train", "--resume", "s3://data/runs/colors")
    assert "fold 2 of 2" in done.stderr and "epoch 1/2" in done.stderr
    assert {name for name in keys(server) if "resume-" not in name} == files(Path("runs/colors"))
    assert Path("runs/colors/fold-1/run.json").read_bytes() == Path("taken/colors/fold-1/run.json").read_bytes()


def test_a_store_that_cannot_be_written_is_named_before_the_training(server: ObjectServer, images: Path) -> None:
    server.proxy.refuses_writes = True
    with pytest.raises(RemoteError, match=r"s3://data/runs/colors/config\.yaml.*access denied"):
        train(config_of(images))
    assert not Path("runs/colors").exists()


def test_a_copy_that_failed_is_completed_by_sync(
    server: ObjectServer, images: Path, refract: Run, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    update = RunCopy.update

    def refused_later(copy: RunCopy) -> None:
        update(copy)
        server.proxy.refuses_writes = True

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(RunCopy, "update", refused_later)
        patch.setattr(run_copy, "POLL_SECONDS", 0.05)
        Path("colors.yaml").write_text(json.dumps(settings(images)))
        assert refract_main(["train", "colors.yaml"]) == 1
    printed = capsys.readouterr()
    assert "bundle:   runs/colors/bundle" in printed.out, "the training itself is complete"
    assert "NOT COPIED: the run in runs/colors is complete, but its copy is not: s3://data/runs/colors/" in printed.err
    assert "refract sync runs/colors completes it" in printed.err
    assert "trainer.copy_to: the copy of the run is not up to date" in caplog.text
    assert keys(server) == {"colors/config.yaml", "colors/run.json"}
    done = refract("sync", "runs/colors", code=1)
    assert "runs/colors: its copy is not complete" in done.stderr

    server.proxy.refuses_writes = False
    again = refract("train", "--resume", "s3://data/runs/colors", code=2)
    assert "runs/colors is finished already; `refract sync runs/colors` completes its copy" in again.stderr
    done = refract("sync", "runs/colors")
    assert "runs/colors: s3://data/runs/colors is complete" in done.stdout
    assert keys(server) == files(Path("runs/colors"))
    server.proxy.writes.clear()
    refract("sync", "runs")
    assert server.proxy.writes == [], "what the copy has is not sent again"


def test_a_stop_copies_the_last_checkpoint(
    server: ObjectServer, warm: WarmProcess, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "colors.yaml").write_text(json.dumps(settings(images, max_epochs=300, checkpoint_seconds=900)))
    started = warm.start(["train", "colors.yaml"], cwd=tmp_path, env=dict(os.environ))
    with started.output:
        assert any("epoch 2/300" in line for line in started.output)
        started.terminate()
        assert started.wait(60) == 75
    assert keys(server) == files(tmp_path / "runs/colors")
    assert any("/checkpoints/resume-" in key for key in keys(server))


def test_an_unfinished_bundle_of_a_copy_is_not_fetched(server: ObjectServer, tmp_path: Path) -> None:
    for name in ("run.json", "config.yaml", "checkpoints/resume-00000002.ckpt", "bundle/weights.safetensors"):
        server.put(f"runs/colors/{name}", b"{}")
    assert files(fetch("s3://data/runs/colors", tmp_path / "runs")) == {
        "colors/run.json", "colors/config.yaml", "colors/checkpoints/resume-00000002.ckpt"
    }  # fmt: skip


def test_a_copy_never_replaces_a_folder(server: ObjectServer, tmp_path: Path, refract: Run) -> None:
    server.put("runs/colors/run.json", b"{}")
    (tmp_path / "runs/colors").mkdir(parents=True)
    done = refract("train", "--resume", "s3://data/runs/colors/", code=2)
    assert (
        "runs/colors is another run; move it away, or resume it with `refract train --resume runs/colors`"
        in done.stderr
    )
    done = refract("train", "--resume", "s3://data/runs/nothing", code=2)
    assert "s3://data/runs/nothing is not a run: it has no run.json" in done.stderr


@pytest.mark.parametrize("url", ["runs", "https://host/runs", "s3://", "s3://user:secret@data/runs", "hf://owner/name"])
def test_copies_need_an_object_store(url: str, images: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.copy_to: .* is not a folder's URL at s3://, gs:// or az:// without credentials"
    ) as error:
        config_of(images, copy_to=url)
    assert "secret" not in str(error.value)
