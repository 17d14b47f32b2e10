"""Training, scoring, evaluating and serving from s3:// on a server that fails now and then: the results of the local folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from object_server import ObjectServer
from safetensors.torch import load_file
from small_data import Run
from warm_process import WarmProcess

from refract.models.bundle.bundle import BundleError, load_bundle
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.data import remote_files
from refract.pipeline.retraining.snapshot import Snapshot, changed, take
from refract.pipeline.retraining.workspace import workspace_of
from refract.pipeline.training.run import train
from refract.remote.client import RemoteError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("new_cache")]


@pytest.fixture(scope="module")
def server(archives: Path) -> Iterator[ObjectServer]:
    server = ObjectServer()
    server.put_folder(archives / "images", "images")
    yield server
    server.close()


def settings(source: str, runs: Path, name: str, workers: int) -> dict[str, dict[str, object]]:
    return {
        "data": {"source": source, "image_size": 16, "batch_size": 8, "memory": "never", "workers": workers},
        "augment": {"policy": [{"HorizontalFlip": {"p": 0.5}}]},
        "model": {"name": "cnn", "args": {"widths": [4, 8]}},
        "trainer": {"max_epochs": 1, "run_name": name, "runs_dir": str(runs), "device": "cpu"},
        "tracking": {"enabled": False}, "evaluation": {"robustness": "none"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def bundle(archives: Path, server: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was trained on the folder, also at s3://data/bundle."""
    runs = tmp_path_factory.mktemp("runs")
    train(config_from_dict(settings(str(archives / "images"), runs, "local", 0)))
    server.put_folder(runs / "local" / "bundle", "bundle")
    return runs / "local" / "bundle"


def test_training_gives_the_weights_of_the_folder_while_the_server_fails(
    server: ObjectServer, bundle: Path, refract: Run
) -> None:
    # In a process of its own: loader workers have the environment of the first one that this process started.
    Path("c.yaml").write_text(json.dumps(settings("s3://data/images", Path("runs"), "remote", 2)))
    with server.proxy.failing(7):
        refract("train", "c.yaml")
    assert server.proxy.injected
    weights = [load_file(folder / "weights.safetensors") for folder in (bundle, Path("runs/remote/bundle"))]
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
    about = [json.loads((folder / "bundle.json").read_text()) for folder in (bundle, Path("runs/remote/bundle"))]
    assert about[0]["data"]["fingerprint"] == about[1]["data"]["fingerprint"]


def test_scoring_from_and_to_a_url_gives_the_predictions_of_the_folder(
    server: ObjectServer, bundle: Path, archives: Path, refract: Run
) -> None:
    refract("score", bundle, archives / "images", "-o", "local.parquet", "--jobs", 1)
    with server.proxy.failing(7):
        refract("score", "s3://data/bundle", "s3://data/images", "-o", "s3://data/out/scores.parquet", "--jobs", 1)
    server.client.download_file("data", "out/scores.parquet", "remote.parquet")
    local, remote = pq.read_table("local.parquet"), pq.read_table("remote.parquet")
    columns = [name for name in local.column_names if name not in ("path", "seconds")]
    assert local.select(columns).equals(remote.select(columns))
    assert remote["path"].to_pylist()[0].startswith("s3://data/images/")
    error = refract("score", bundle, "s3://data/images", "-o", "s3://data/out/scores.parquet", code=2).stderr
    assert "s3://data/out/scores.parquet exists already; --overwrite replaces it" in error


def test_commands_read_a_bundle_and_data_at_urls(
    server: ObjectServer, bundle: Path, archives: Path, refract: Run
) -> None:
    local = refract("evaluate", bundle, archives / "images").stdout
    remote = refract("evaluate", "s3://data/bundle", "s3://data/images").stdout
    assert local.replace(str(archives / "images"), "DATA") == remote.replace("s3://data/images", "DATA")
    image = "images/green/000.png"
    shown = [refract("predict", name, archives / image).stdout for name in (bundle, "s3://data/bundle")]
    assert shown[0] == shown[1]
    predictions = refract("predict", bundle, "s3://data/images/green", f"s3://data/{image}").stdout
    assert "s3://data/images/green/009.png" in predictions and len(predictions.splitlines()) >= 11
    assert refract("init", "s3://data/images", "-o", "c.yaml").returncode == 0
    assert "source: s3://data/images" in Path("c.yaml").read_text()
    error = refract("evaluate", "s3://data/nothing", "s3://data/images", code=1).stderr
    assert error.strip() == "refract evaluate: s3://data/nothing: no such folder, or it is empty; check the URL"
    error = refract("evaluate", bundle, "https://user:hunter2secret@host/a.zip", code=2).stderr
    assert "contains a password" in error and "hunter2secret" not in error


def test_a_damaged_copy_of_a_bundle_is_downloaded_again(server: ObjectServer, bundle: Path, tmp_path: Path) -> None:
    first = load_bundle("s3://data/bundle")
    assert first.digest == load_bundle(bundle).digest
    (first.path / "weights.safetensors").write_bytes(b"damaged")
    assert load_bundle("s3://data/bundle").digest == first.digest
    server.put("damaged/manifest.json", (bundle / "manifest.json").read_bytes())
    with pytest.raises(BundleError, match=r"s3://data/damaged/.* is missing"):
        load_bundle("s3://data/damaged")


def test_a_bundle_is_read_from_a_web_server_by_its_manifest(server: ObjectServer, bundle: Path) -> None:
    url = f"{server.proxy.url}/data/bundle"
    with server.proxy.failing(5):
        assert load_bundle(url).digest == load_bundle(bundle).digest
    with pytest.raises(RemoteError, match="no such folder, or it is empty"):
        load_bundle(f"{server.proxy.url}/data/nothing")


def test_a_server_serves_a_bundle_at_a_url(server: ObjectServer, bundle: Path, warm: WarmProcess) -> None:
    images = [path.read_bytes() for path in sorted((bundle / "golden").iterdir())]
    answers = []
    for source in (str(bundle), "s3://data/bundle"):
        with server.proxy.failing(5):
            process = warm.popen(["serve", source, "--port", "0", "--backend", "eager"], cwd=Path.cwd())
            try:
                url = process.stdout.readline().strip().rpartition(" on ")[2]
                headers = {"content-type": "image/png"}
                answers.append(
                    [httpx.post(f"{url}/v1/predict", content=image, headers=headers).json() for image in images]
                )
            finally:
                process.terminate()
                process.communicate(30)
    assert [one["predictions"] for one in answers[0]] == [one["predictions"] for one in answers[1]]


def test_retraining_takes_the_same_snapshot_of_a_url_and_an_archive_and_notices_changes(
    server: ObjectServer, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(source: str, name: str) -> Snapshot:
        settings = config_from_dict({
            "data": {"source": source, "image_size": 16, "workers": 0}, "model": {"name": "lenet5"},
            "tracking": {"model_name": "colors"}, "retrain": {"folder": name},
        })  # fmt: skip
        return take(settings, workspace_of(settings))

    local = taken(str(archives / "images"), "local")
    assert taken(str(archives / "photos.zip"), "zip").digest == local.digest
    server.put_folder(archives / "images", "snapshot")
    remote = taken("s3://data/snapshot", "remote")
    assert remote.digest == local.digest and changed(remote) == []
    files = json.loads((remote.folder / "files.json").read_text())
    url = next(path for path in files if path.startswith("s3://"))
    server.put(url.removeprefix("s3://data/"), b"other")
    monkeypatch.setattr(remote_files, "_versions", {})  # as in the next run
    monkeypatch.setattr(remote_files, "_listed", set())
    monkeypatch.delenv("REFRACT_LISTINGS")
    assert changed(remote) == [url]
