"""Copies of runs in an object store, for the tests of copying and of fetching them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_server import ObjectServer
from small_data import paint
from warm_process import WarmProcess

from refract.pipeline.config.config import Config, config_from_dict


@pytest.fixture(scope="module")
def one_store() -> Iterator[ObjectServer]:
    store = ObjectServer()
    yield store
    store.close()


@pytest.fixture
def store(one_store: ObjectServer) -> ObjectServer:
    """Without copies of other tests."""
    for key in keys(one_store):
        one_store.client.delete_object(Bucket="data", Key=f"runs/{key}")
    one_store.proxy.writes.clear()
    one_store.proxy.refuses_writes = False
    return one_store


@pytest.fixture
def painted(tmp_path: Path) -> Path:
    """A folder of images in three classes."""
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


def keys(store: ObjectServer) -> set[str]:
    objects = store.client.list_objects_v2(Bucket="data", Prefix="runs/").get("Contents", ())
    return {item["Key"].removeprefix("runs/") for item in objects}


def files(run: Path) -> set[str]:
    names = {path.relative_to(run.parent).as_posix() for path in run.rglob("*") if path.is_file()}
    return {name for name in names if "/." not in name}


def is_finished(store: ObjectServer) -> bool:
    record = store.client.get_object(Bucket="data", Key="runs/colors/run.json")["Body"].read()
    return bool(json.loads(record).get("finished"))


def newest_step(store: ObjectServer) -> int:
    return max((int(key[-13:-5]) for key in keys(store) if "/checkpoints/resume-" in key), default=-1)


def until_newer(store: ObjectServer, step: int) -> None:
    """Wait until the copy has a checkpoint after this step."""
    deadline = time.monotonic() + 60
    while newest_step(store) <= step:
        assert time.monotonic() < deadline, keys(store)
        time.sleep(0.02)


def killed_after_a_copied_checkpoint(
    store: ObjectServer, warm: WarmProcess, images: Path, machine: Path, *arguments: str
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
    step = max([newest_step(store), *local])
    started = warm.popen(["train", "colors.yaml", *arguments], cwd=machine, code=code)
    until_newer(store, step)
    started.kill()
    started.communicate()
    assert not (machine / "runs/colors/bundle").exists()
