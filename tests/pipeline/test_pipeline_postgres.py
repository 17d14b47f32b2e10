"""Retraining with an MLflow server on PostgreSQL, and a label history there; skipped without PostgreSQL."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from small_data import Run, paint

pytestmark = pytest.mark.slow

TINY = """
data: {source: digits, image_size: 16, batch_size: 256}
model: {name: lenet5}
optim: {lr: 0.01}
trainer: {max_epochs: 1, device: cpu}
evaluation: {robustness: none}
gate: {robustness_loss: null}
tracking: {experiment: nightly, model_name: digits}
"""


def tool(name: str) -> str | None:
    """Find a program of PostgreSQL, which Debian does not add to PATH."""
    programs = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return shutil.which(name) or (str(programs[-1]) if programs else None)


def as_server(*command: object) -> list[str]:
    """Return the command for a user that PostgreSQL accepts: not root."""
    words = [str(word) for word in command]
    return ["runuser", "-u", "postgres", "--", *words] if os.getuid() == 0 else words


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(true: Callable[[], object], what: str, within: float = 120) -> None:
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, f"not in {within} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Start a PostgreSQL cluster, and return the address of an empty database with a password."""
    initdb, pg_ctl = tool("initdb"), tool("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed here (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="refract-postgres-", dir="/tmp"))
    try:
        (folder / "password").write_text("only-here")
        if os.getuid() == 0:
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("there is no user postgres, and PostgreSQL does not run as root")
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
        data, port = folder / "data", free_port()
        rights = ["--username=mlflow", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync"]
        subprocess.run(as_server(initdb, "-D", data, "-E", "UTF8", *rights), check=True, capture_output=True, cwd="/")
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
        start = as_server(pg_ctl, "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd="/")
        try:
            yield f"postgresql+psycopg2://mlflow:only-here@127.0.0.1:{port}/postgres"
        finally:
            stop = as_server(pg_ctl, "-D", data, "-m", "immediate", "stop")
            subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd="/")
    finally:
        shutil.rmtree(folder)


@contextmanager
def mlflow_server(database: str, folder: Path) -> Iterator[str]:
    """Start `mlflow server` as deploy/compose.yaml does, on a free port."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"),
        *(f"--backend-store-uri={database}", f"--artifacts-destination={folder / 'artifacts'}"),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {**os.environ, **quiet}
    with (folder / "mlflow.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or answers(f"{url}/health"), "MLflow's server answers")
        assert process.poll() is None, (folder / "mlflow.log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_the_nightly_run_goes_through_a_server_into_postgres(
    postgres: str, tmp_path: Path, refract: Run, new_tracking: Path
) -> None:
    import psycopg2
    from mlflow import MlflowClient

    (tmp_path / "tiny.yaml").write_text(TINY)
    with mlflow_server(postgres, tmp_path) as url:
        printed = refract("retrain", "tiny.yaml", "--tracking.uri", url).stdout
        assert "\npromoted: version 1 is champion\n" in printed
        client = MlflowClient(url, url)
        experiment = client.get_experiment_by_name("nightly")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED" and run.data.params["model.name"] == "lenet5"
        assert client.get_metric_history(run.info.run_id, "val_loss"), sorted(run.data.metrics)
        champion = client.get_model_version_by_alias("digits", "champion")
        assert champion.run_id == run.info.run_id
        files = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "bundle")}
        assert {"bundle.json", "weights.safetensors"} <= files
        # The alias moves to another version and back, as a person would set it.
        client.create_model_version("digits", champion.source, run.info.run_id)
        for version in ("2", "1"):
            client.set_registered_model_alias("digits", "champion", version)
            assert str(client.get_model_version_by_alias("digits", "champion").version) == version
    with psycopg2.connect(postgres.replace("+psycopg2", "")) as database, database.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
        assert cursor.fetchone() == (1,)
        cursor.execute("SELECT name, version FROM registered_model_aliases WHERE alias = 'champion'")
        assert cursor.fetchall() == [("digits", 1)]
        cursor.execute("SELECT count(*) FROM model_versions WHERE name = 'digits'")
        assert cursor.fetchone() == (2,)
    (file,) = tmp_path.glob("**/mlflow.db")
    assert file.read_bytes() == new_tracking.read_bytes(), "nothing went into a file here"


def test_processes_share_a_label_history_in_postgres(postgres: str) -> None:
    import multiprocessing

    import psycopg2

    from refract.pipeline.labels.decisions import Decision, LabelError
    from refract.pipeline.labels.history import LabelHistory

    def write(worker: int) -> None:
        history = LabelHistory(postgres, create=True)
        for number in range(10):
            content = f"{worker:02}{number:062}"
            history.append(
                Decision(content=content, path="x.png", action="relabel", labels=("a",), reviewer=f"r{worker}")
            )

    with pytest.raises(LabelError, match="without a label history"):
        LabelHistory(postgres)
    processes = [multiprocessing.get_context("fork").Process(target=write, args=(worker,)) for worker in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    history = LabelHistory(postgres.replace("+psycopg2", ""))
    assert history.address == "postgresql://***@" + postgres.partition("@")[2]
    assert [record.id for record in history.decisions()] == list(range(1, 41)) and len(history.state().images) == 40
    undo = history.undo(40, reviewer="ann")
    assert len(history.state().images) == 39 and history.decisions(since=40)[0].undoes == 40 and undo == 41
    with psycopg2.connect(postgres.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        for statement in (
            "UPDATE label_decisions SET reviewer = 'eve'",
            "DELETE FROM label_decisions",
            "TRUNCATE label_decisions CASCADE",
        ):
            with pytest.raises(psycopg2.errors.RaiseException, match="never changed or deleted"):
                cursor.execute(statement)
            connection.rollback()
    assert history.file("/data/x.png") == "/data/x.png" and history.relative("/data/x.png") == "/data/x.png"


def test_two_reviews_share_a_label_history_in_postgres_and_do_not_show_its_password(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save_file

    from refract.models.registry import build
    from refract.pipeline.review.start import ReviewOptions, start_review

    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "images", range(6))
    torch.manual_seed(0)
    save_file(build("resnet20", 3, image_size=(32, 32)).state_dict(), "weights.safetensors")
    text = "data: {source: images, image_size: 32}\nmodel: {name: resnet20, weights: weights.safetensors}\n"
    Path("my.yaml").write_text(text)
    (first, address), (second, _) = (start_review(ReviewOptions("my.yaml", labels=postgres)) for _ in range(2))
    assert "only-here" not in address and "127.0.0.1" in address
    item = first.open_entries("audit", "ann")[0].item
    first.decide(item, action="exclude", labels=[], reviewer="ann", queue="audit")
    second.decide(item, action="confirm", labels=[], reviewer="bob", queue="audit")
    assert [record.reviewer for record in second.state(item).conflicts] == ["ann"]


def test_two_processes_share_a_search_in_postgres(postgres: str, tmp_path: Path, refract: Run) -> None:
    """As two machines do: each has its folder, and the trials are in the database, which is not MLflow's."""
    import optuna
    import psycopg2

    with closing(psycopg2.connect(postgres.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        connection.cursor().execute("CREATE DATABASE search")
    postgres = postgres.rpartition("/")[0] + "/search"
    paint(tmp_path / "images", range(12))
    text = TINY.replace(
        "source: digits, image_size: 16, batch_size: 256", f"source: {tmp_path}/images, image_size: 16, workers: 0"
    )
    (tmp_path / "t.yaml").write_text(text)
    (tmp_path / "s.yaml").write_text("optim.lr: {low: 0.001, high: 0.1, log: true}\n")
    storage = postgres.replace("+psycopg2", "")
    words = ["tune", "t.yaml", "s.yaml", "--storage", storage, "--tracking.enabled", "false"]
    refract(*words, "--trainer.runs_dir", "first", "--trials", "1")  # it creates the tables
    words += ["--trials", "5"]
    second = subprocess.Popen(
        [sys.executable, "-m", "refract", *words, "--trainer.runs_dir", "second", "--seed", "1"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    printed = refract(*words, "--trainer.runs_dir", "first").stderr
    other = second.communicate(timeout=240)[1]
    assert second.returncode == 0, other
    assert "only-here" not in printed + other, "the password is not shown"
    (name,) = optuna.get_all_study_names(postgres)
    study = optuna.load_study(study_name=name, storage=postgres)
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") + states.count("PRUNED") >= 5 and "RUNNING" not in states
