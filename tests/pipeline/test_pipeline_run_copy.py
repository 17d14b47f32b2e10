"""Copies of runs in an object store: what they hold at each moment, and how another machine resumes from them."""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_server import ObjectServer
from safetensors.torch import load_file
from small_data import Run, paint
from warm_process import WarmProcess

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.training import run_copy
from refract.pipeline.training.run import train
from refract.pipeline.training.run_copy import RunCopy, fetch
from refract.remote.client import RemoteError

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


def until_checkpoint(server: ObjectServer) -> None:
    deadline = time.monotonic() + 60
    while not any("/checkpoints/resume-" in key for key in keys(server)):
        assert time.monotonic() < deadline, keys(server)
        time.sleep(0.02)


def killed_after_a_copied_checkpoint(server: ObjectServer, warm: WarmProcess, images: Path, machine: Path) -> None:
    """Start a training in the folder `machine`, and kill it once its copy has a checkpoint."""
    machine.mkdir()
    (machine / "colors.yaml").write_text(json.dumps(settings(images, max_epochs=30)))
    code = (
        "import sys, refract.pipeline.training.run_copy as run_copy\n"
        "run_copy.POLL_SECONDS = 0.05\n"
        "import refract.cli; sys.exit(refract.cli.main(sys.argv[1:]))"
    )
    started = warm.popen(["train", "colors.yaml"], cwd=machine, code=code)
    until_checkpoint(server)
    started.kill()
    started.communicate()
    assert not (machine / "runs/colors/bundle").exists()


@pytest.mark.parametrize("by_url", [True, False])
def test_another_machine_resumes_a_killed_run_with_the_same_result(
    by_url: bool, server: ObjectServer, warm: WarmProcess, images: Path, tmp_path: Path
) -> None:
    killed_after_a_copied_checkpoint(server, warm, images, tmp_path / "one")
    other = tmp_path / "other"
    other.mkdir()
    (other / "colors.yaml").write_text(json.dumps(settings(images, max_epochs=30)))
    arguments = ["--resume", "s3://data/runs/colors"] if by_url else ["colors.yaml", "--resume", "auto"]
    done = warm.run(["train", *arguments], cwd=other, env=dict(os.environ), seconds=240)
    assert done.returncode == 0, done.stderr
    assert "resuming from runs/colors/checkpoints/resume-" in done.stderr
    assert keys(server) == files(other / "runs/colors"), (
        "the copy is complete, and has no checkpoint that the run has removed"
    )
    assert json.loads(server.client.get_object(Bucket="data", Key="runs/colors/run.json")["Body"].read())["finished"]

    undisturbed = train(config_of(images, max_epochs=30, run_name="undisturbed", copy_to=None, runs_dir=str(tmp_path)))
    assert undisturbed is not None
    weights = load_file(other / "runs/colors/bundle/weights.safetensors")
    expected = load_file(undisturbed.bundle / "weights.safetensors")
    assert all(weights[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("finished", [True, False])
def test_an_older_state_never_replaces_a_newer_copy(
    finished: bool, server: ObjectServer, warm: WarmProcess, images: Path, tmp_path: Path
) -> None:
    killed_after_a_copied_checkpoint(server, warm, images, tmp_path / "one")
    if finished:
        server.put("runs/colors/run.json", b'{"finished": true}')
    else:
        server.put("runs/colors/checkpoints/resume-00009999.ckpt", b"of another machine")
    before = keys(server)
    done = warm.run(["train", "--resume", "runs/colors"], cwd=tmp_path / "one", env=dict(os.environ), seconds=240)
    assert done.returncode == 2, done.stderr
    assert (
        "another machine has continued s3://data/runs/colors; move runs/colors away, then resume the copy"
        in done.stderr
    )
    assert keys(server) == before and (tmp_path / "one/runs/colors/run.json").exists()


def test_compare_reads_copies(server: ObjectServer, images: Path, refract: Run) -> None:
    for name, lr in (("slow", 1e-4), ("fast", 1e-2)):
        train(config_from_dict({**settings(images, run_name=name), "optim": {"lr": lr}}))
    done = refract("compare", "s3://data/runs/slow", "s3://data/runs/fast/")
    assert "fast against slow on " in done.stdout
    assert "copy_to" not in done.stdout and "optim.lr" in done.stdout


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


def test_a_store_that_cannot_be_written_is_named_before_the_training(server: ObjectServer, images: Path) -> None:
    server.proxy.refuses_writes = True
    with pytest.raises(RemoteError, match=r"s3://data/runs/colors/config\.yaml.*access denied"):
        train(config_of(images))
    assert not Path("runs/colors").exists()


def test_a_copy_that_failed_is_completed_by_sync(
    server: ObjectServer, images: Path, refract: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = RunCopy.update

    def refused_later(copy: RunCopy) -> None:
        update(copy)
        server.proxy.refuses_writes = True

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(RunCopy, "update", refused_later)
        patch.setattr(run_copy, "POLL_SECONDS", 0.05)
        with pytest.raises(
            RemoteError, match=r"the run in runs/colors is complete, but its copy is not.*`refract sync runs/colors`"
        ):
            train(config_of(images))
    assert "trainer.copy_to: the copy of the run is not up to date" in caplog.text
    assert keys(server) == {"colors/config.yaml", "colors/run.json"}
    done = refract("sync", "runs/colors", code=1)
    assert "runs/colors: its copy is not complete" in done.stderr

    server.proxy.refuses_writes = False
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
        server.put(f"runs/colors/{name}", name.encode())
    assert files(fetch("s3://data/runs/colors", tmp_path / "runs")) == {
        "colors/run.json", "colors/config.yaml", "colors/checkpoints/resume-00000002.ckpt"
    }  # fmt: skip


def test_a_copy_never_replaces_a_folder(server: ObjectServer, tmp_path: Path, refract: Run) -> None:
    server.put("runs/colors/run.json", b"{}")
    (tmp_path / "runs/colors").mkdir(parents=True)
    done = refract("train", "--resume", "s3://data/runs/colors/", code=2)
    assert "runs/colors exists; resume it with `refract train --resume runs/colors`, or move it away" in done.stderr
    done = refract("train", "--resume", "s3://data/runs/nothing", code=2)
    assert "s3://data/runs/nothing is not a run: it has no run.json" in done.stderr


@pytest.mark.parametrize("url", ["runs", "https://host/runs", "s3://", "s3://user:secret@data/runs", "hf://owner/name"])
def test_copies_need_an_object_store(url: str, images: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.copy_to: .* is not null, or the URL of a folder at s3://"
    ) as error:
        config_of(images, copy_to=url)
    assert "secret" not in str(error.value)
