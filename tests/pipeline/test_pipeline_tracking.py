"""Tracking never stops a training: a server that stalls, refuses or dies, and what is delivered later."""

import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from small_data import Run
from warm_process import WarmProcess

from refract.pipeline.config.sections import TrackingConfig
from refract.pipeline.tracking import Tracker, TrackingError, tracker
from refract.pipeline.tracking.database import make_database
from refract.pipeline.tracking.journal import Journal
from refract.pipeline.training.run_directory import new_run, run_lock
from tests.pipeline.test_pipeline_build import configured


@contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "FIRST_ANSWER", 0.5)
    monkeypatch.setattr(tracker, "SILENT", 1.0)


def tracked(run_dir: Path, uri: str) -> Tracker:
    return Tracker(TrackingConfig(uri=uri), run_dir, {"optim": {"lr": 0.1}, "long": "x" * 9000}, {"team": "a"})


@pytest.mark.slow
def test_a_silent_server_holds_nothing_up_and_gets_all_later(
    tmp_path: Path, refract: Run, new_tracking: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "runs" / "r"
    config = configured(tmp_path, ("--trainer.runs_dir", tmp_path / "runs", "--trainer.run_name", "r"))
    new_run(config, "r", {"fingerprint": "f", "versions": {}})
    (run_dir / "curves.png").write_bytes(b"an image")
    (run_dir / "bundle").mkdir()
    (run_dir / "bundle" / "bundle.json").write_text("{}")
    with silent_server() as uri:
        one = tracked(run_dir, uri)
        assert "does not answer (no response in 0 s); training continues" in caplog.text
        began = time.monotonic()
        for step in range(200):
            one.log_metrics({"loss": 1 / (step + 1), "accuracy": float("nan")}, step)
        one.log_files([run_dir / "curves.png"], run_dir / "bundle")
        one.register("animals", "champion")
        assert time.monotonic() - began < 30, "the disk's time alone: 200 waits of half a second are 100"
        assert one.finish("FINISHED") == 204, "of the run, 200 steps, files, model, status nothing arrived"
    database = f"sqlite:///{shutil.copy(new_tracking, tmp_path / 'later.db')}"
    printed = refract("sync", "runs", "--uri", database)
    assert "204 entries delivered" in printed.stdout
    assert "MLflow cannot load the bundle: " in printed.stderr, "it has no manifest; the rest is delivered all the same"
    assert "models:/animals@champion is version 1, the model's first" in printed.stdout
    assert refract("sync", "runs", "--uri", database).stdout.startswith("nothing to deliver"), "once"
    client = MlflowClient(database)
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "r" and run.data.tags["team"] == "a"
    assert run.data.params["optim.lr"] == "0.1" and len(run.data.params["long"]) == 6000
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, 1 / (step + 1)) for step in range(200)]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"curves.png", "bundle"}
    assert client.get_model_version_by_alias("animals", "champion").run_id == run.info.run_id


def test_what_was_tracked_before_a_restart_is_not_tracked_again(tmp_path: Path, new_tracking: Path) -> None:
    database = f"sqlite:///{shutil.copy(new_tracking, tmp_path)}"
    one = tracked(tmp_path, database)
    one.log_metrics({"loss": 0.5, "seconds": 3.0}, 1)
    assert one.finish("KILLED") == 0
    again = tracked(tmp_path, database)
    again.log_metrics({"loss": 0.5, "seconds": 4.0, "new": 1.0}, 1)
    again.log_metrics({"loss": 0.25}, 2)
    assert again.finish("FINISHED") == 0
    client = MlflowClient(database)
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in ("loss", "seconds", "new")}
    assert {name: [(p.step, p.value) for p in points] for name, points in histories.items()} == {
        "loss": [(1, 0.5), (2, 0.25)], "seconds": [(1, 3.0)], "new": [(1, 1.0)],
    }  # fmt: skip
    assert run.info.status == "FINISHED"


def test_a_delivery_that_was_cut_short_counts_once(tmp_path: Path, new_tracking: Path) -> None:
    """The server had the entries, but the process died before it could write that down."""
    database = f"sqlite:///{shutil.copy(new_tracking, tmp_path)}"
    one = tracked(tmp_path, database)
    one.log_metrics({"loss": 0.5}, 1)
    assert one.finish("KILLED") == 0
    (tmp_path / "journal.delivered.json").unlink()
    assert tracked(tmp_path, database).finish("FINISHED") == 0
    client = MlflowClient(database)
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 1


def test_entries_of_an_earlier_version_are_delivered(tmp_path: Path, new_tracking: Path) -> None:
    """Their journals have no folders of images, and no description of the registered version."""
    uri = f"sqlite:///{shutil.copy(new_tracking, tmp_path / 'mlflow.db')}"
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    (tmp_path / "run" / "curves.png").write_bytes(b"an image")
    one = tracked(tmp_path / "run", uri)
    one._add({"do": "files", "files": ["curves.png"], "bundle": "bundle"})
    one._add({"do": "register", "model": "animals", "alias": "champion"})
    assert one.finish("FINISHED") == 0
    client = MlflowClient(uri)
    version = client.get_model_version("animals", "1")
    assert not version.description
    assert [file.path for file in client.list_artifacts(version.run_id)] == ["bundle", "curves.png"]


def test_a_server_that_refuses_the_run_is_reported(tmp_path: Path, new_tracking: Path) -> None:
    database = f"sqlite:///{shutil.copy(new_tracking, tmp_path)}"
    client = MlflowClient(database)
    client.delete_experiment(client.create_experiment("refract"))
    with pytest.raises(TrackingError, match=r"cannot be used: .*deleted.*--tracking\.enabled false"):
        tracked(tmp_path, database)
    assert len(Journal(tmp_path).waiting()) == 1


@pytest.mark.slow
def test_a_training_without_its_server_ends_well_and_syncs(
    refract: Run, folder: Path, tmp_path: Path, new_tracking: Path
) -> None:
    """Nor does the password in the server's address show anywhere."""
    refract("init", folder, "-o", "images.yaml")
    uri = "http://alice:s3cretpw@127.0.0.1:9"
    printed = refract(
        "train", "images.yaml", "--trainer.run_name", "r", "--tracking.uri", uri, "--tracking.model_name", "colors",
        "--trainer.max_epochs", 2, code=3,
    )  # fmt: skip
    assert (
        "MLflow at http://***@127.0.0.1:9 does not answer" in printed.stderr and "test:     accuracy" in printed.stdout
    )
    assert "`refract sync runs/r` delivers them" in printed.stderr and "Traceback" not in printed.stderr
    assert "NOT REGISTERED: no version of colors has this bundle" in printed.stderr
    assert "refract sync runs/r delivers it" in printed.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b"s3cretpw" in path.read_bytes()]
    assert "s3cretpw" not in printed.stdout + printed.stderr
    assert (
        "http://***@127.0.0.1:9 has no credentials here; set MLFLOW_TRACKING_URI"
        in refract("sync", "runs/r", code=1).stderr
    )
    assert "entries are not delivered" in refract("sync", "runs/r", "--uri", "http://127.0.0.1:9", code=1).stderr
    database = f"sqlite:///{shutil.copy(new_tracking, tmp_path / 'later.db')}"
    refract("sync", "runs/r", "--uri", database)
    client = MlflowClient(database)
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2]
    assert client.get_model_version_by_alias("colors", "champion").run_id == run.info.run_id
    # MLflow's pages show these in addition to metrics and parameters.
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "images" and run.data.tags["data.fingerprint"].startswith(given.dataset.digest)
    note, accuracy = run.data.tags["mlflow.note.content"], run.data.metrics["test_accuracy"]
    assert note.startswith(f"**accuracy {accuracy:.4f}** (95 % interval")
    assert run.data.tags["mlflow.source.name"] == "refract train images" and run.data.tags["mlflow.user"]


def test_a_registration_that_the_server_refused_is_kept_and_sent_again_by_sync(
    tmp_path: Path, new_tracking: Path, refract: Run
) -> None:
    run_dir = tmp_path / "runs" / "r"
    new_run(configured(tmp_path, ("--trainer.runs_dir", tmp_path / "runs", "--trainer.run_name", "r")), "r", {})
    (run_dir / "bundle").mkdir()
    (run_dir / "bundle" / "bundle.json").write_text("{}")
    one = tracked(run_dir, f"sqlite:///{shutil.copy(new_tracking, tmp_path / 'mlflow.db')}")
    one.log_files([], run_dir / "bundle")
    one.register("a/b", "champion")
    assert one.finish("FINISHED") == 0 and "'a/b'" in one.journal.delivered["refused"]
    assert "Invalid model name 'a/b'" in refract("sync", "runs/r", code=1).stderr
    journal = run_dir / "journal.jsonl"
    journal.write_text(journal.read_text().replace("a/b", "ab"))
    printed = refract("sync", "runs/r").stdout
    assert "1 entries delivered" in printed and "models:/ab@champion is version 1" in printed
    assert refract("sync", "runs/r").stdout.startswith("nothing to deliver")


@pytest.mark.slow
def test_another_server_gets_the_run_from_its_beginning(tmp_path: Path, refract: Run, new_tracking: Path) -> None:
    """The database `two` is there already, `three` is created."""
    shutil.copy(new_tracking, tmp_path / "one.db")
    shutil.copy(new_tracking, tmp_path / "two.db")
    run_dir = tmp_path / "runs" / "r"
    new_run(configured(tmp_path, ("--trainer.runs_dir", tmp_path / "runs", "--trainer.run_name", "r")), "r", {})
    one = tracked(run_dir, f"sqlite:///{tmp_path}/one.db")
    one.log_metrics({"loss": 0.5}, 1)
    assert one.finish("FINISHED") == 0
    for name in ("two", "three"):
        assert "3 entries delivered" in refract("sync", "runs", "--uri", f"sqlite:///{tmp_path}/{name}.db").stdout
        client = MlflowClient(f"sqlite:///{tmp_path}/{name}.db")
        (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
        assert run.data.metrics == {"loss": 0.5} and run.info.status == "FINISHED"


def test_a_run_stays_with_its_server_in_any_folder(
    tmp_path: Path, new_tracking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(new_tracking, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "r"
    run_dir.mkdir()
    Tracker(TrackingConfig(), run_dir, {}, {}).finish("KILLED")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = Tracker(TrackingConfig(), run_dir, {}, {})
    again.log_metrics({"loss": 1.0}, 1)
    assert again.finish("FINISHED") == 0 and not (tmp_path / "other" / "mlflow.db").exists()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 1.0}


@pytest.mark.slow
def test_sync_passes_over_a_run_that_is_trained_or_damaged(tmp_path: Path, refract: Run, new_tracking: Path) -> None:
    database = f"sqlite:///{shutil.copy(new_tracking, tmp_path / 'x.db')}"
    for name in ("a", "b", "c"):
        new_run(configured(tmp_path, ("--trainer.runs_dir", tmp_path / "runs", "--trainer.run_name", name)), name, {})
        Journal(tmp_path / "runs" / name).append(
            {"do": "start", "key": name, "time": 1, "experiment": "e", "run_name": name, "params": {}, "tags": {}}
        )
    journal = tmp_path / "runs" / "b" / "journal.jsonl"
    journal.write_text("nothing\n" + journal.read_text())
    (tmp_path / "runs" / "d").mkdir()
    (tmp_path / "runs" / "d" / "journal.jsonl").write_text("")
    (tmp_path / "runs" / "d" / "journal.delivered.json").write_text('{"coun')
    with run_lock(tmp_path / "runs" / "a"):
        printed = refract("sync", "--uri", database, code=1)
    assert "runs/a: skipped, as its training is in progress" in printed.stdout
    assert "journal.delivered.json: is damaged" in printed.stderr
    assert "journal.jsonl, line 1: is damaged" in printed.stderr and "runs/c: 1 entries delivered" in printed.stdout


@pytest.mark.slow
def test_a_database_is_whole_or_not_there(tmp_path: Path, warm: WarmProcess) -> None:
    """A kill while MLflow makes its tables would leave a part of them, which MLflow refuses for ever after."""
    path = tmp_path / "mlflow.db"
    code = f"from refract.pipeline.tracking.database import make_database; make_database('sqlite:///{path}')"
    process = warm.popen([], cwd=tmp_path, code=code)
    with process.stdout, process.stderr:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".mlflow.db.*/mlflow.db")):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert not path.exists()
    make_database(f"sqlite:///{path}")
    assert MlflowClient(f"sqlite:///{path}").get_experiment_by_name("Default") is not None
    content = path.read_bytes()
    make_database(f"sqlite:///{path}")
    assert path.read_bytes() == content, "one that is there is left alone"
    make_database("http://127.0.0.1:9")


def test_a_local_database_that_is_locked_for_a_while_gets_all(
    tmp_path: Path, new_tracking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another training writes: SQLite gives up after some seconds, the tracker does not."""
    monkeypatch.setattr(tracker, "FIRST_ANSWER", 0.1)
    path = shutil.copy(new_tracking, tmp_path)
    with sqlite3.connect(path, isolation_level=None, check_same_thread=False) as other:
        other.execute("BEGIN EXCLUSIVE")
        release = threading.Timer(2.0, other.rollback)
        release.start()
        one = tracked(tmp_path, f"sqlite:///{path}?timeout=0.2")
        assert one.finish("FINISHED") == 0 and one.journal.delivered["run_id"]
        release.join()
    other.close()
