"""`gs://` and `az://`: the samples of the same local folder, from real servers of both protocols on loopback."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from gcp_storage_emulator.server import create_server
from object_server import FaultProxy
from small_data import Run

from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.data.pack import StoredImages, pack
from refract.pipeline.stopping import Stop
from refract.pipeline.training.fetched_run import fetch
from refract.pipeline.training.run_copy import RunCopy
from refract.remote import client, object_store
from refract.remote.client import RemoteError

ACCOUNT = "devstoreaccount1"
"""The account of Azurite, whose key is public."""
AZURITE = (
    "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;"
    "DefaultEndpointsProtocol=http"
)


class Cloud(NamedTuple):
    """scheme: of its URLs; files: fsspec's file system, to prepare the bucket `data`; proxy: through which Refract reaches it."""

    scheme: str
    files: Any
    proxy: FaultProxy


def google() -> Iterator[Cloud]:
    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="data")
    emulator.start()
    proxy = FaultProxy("127.0.0.1", emulator._api._httpd.server_port)
    os.environ["STORAGE_EMULATOR_HOST"] = proxy.url
    yield Cloud("gs", object_store._filesystem("gs"), proxy)
    del os.environ["STORAGE_EMULATOR_HOST"]
    proxy.close()
    emulator.stop()


def azure() -> Iterator[Cloud]:
    if shutil.which("azurite-blob") is None:
        pytest.skip("Azurite is not installed: npm install -g azurite")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["azurite-blob", "--blobPort", str(port), "--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    proxy = FaultProxy("127.0.0.1", port)
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = (
        f"AccountName={ACCOUNT};{AZURITE};BlobEndpoint={proxy.url}/{ACCOUNT};"
    )
    files = object_store._filesystem("az")
    files.mkdir("az://data")
    yield Cloud("az", files, proxy)
    del os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    proxy.close()
    process.kill()
    process.wait()


@pytest.fixture(scope="module", params=[google, azure], ids=["gs", "az"])
def cloud(request: pytest.FixtureRequest, archives: Path) -> Iterator[Cloud]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_APPLICATION_CREDENTIALS"):
            patch.delenv(name, raising=False)
        for one in request.param():
            for path in sorted((archives / "images").rglob("*")):
                if path.is_file():
                    one.files.put_file(str(path), f"{one.scheme}://data/{path.relative_to(archives).as_posix()}")
            one.files.put_file(str(archives / "photos.zip"), f"{one.scheme}://data/photos.zip")
            yield one


@pytest.fixture(autouse=True)
def forget(new_cache: None) -> None:
    """Read as a new process."""


def test_a_folder_and_an_archive_give_the_samples_of_the_folder_while_the_server_fails(
    cloud: Cloud, archives: Path
) -> None:
    local = load_manifest(archives / "images")
    with cloud.proxy.failing(every=12):
        for name in ("images", "photos.zip"):
            url = f"{cloud.scheme}://data/{name}"
            manifest = load_manifest(url)
            assert [s.path.removeprefix(f"{url}/") for s in manifest.samples] == [
                str(Path(s.path).relative_to(archives / "images")) for s in local.samples
            ]
            assert [s.read() for s in manifest.samples] == [s.read() for s in local.samples]
    assert {"500", "cut"} <= {*cloud.proxy.injected}


def test_a_changed_file_has_another_version_and_a_missing_one_is_none(cloud: Cloud, tmp_path: Path) -> None:
    url, versions = f"{cloud.scheme}://data/one.txt", []
    for content in (b"a" * 10, b"b" * 10):
        (tmp_path / "one.txt").write_bytes(content)
        client.upload(tmp_path / "one.txt", url)
        item = client.info(url)
        assert (item.size, b"".join(client.blocks(item))) == (10, content) and item.checksum.startswith("md5:")
        versions.append(item.version)
    assert versions[0] != versions[1]
    assert not client.exists(f"{url}.none") and client.listed(f"{cloud.scheme}://data/nothing") == []


def test_the_copy_of_a_run_is_updated_and_loses_old_checkpoints(cloud: Cloud, tmp_path: Path) -> None:
    run, url = tmp_path / "colors", f"{cloud.scheme}://data/runs"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text('{"created": "now", "fingerprint": "x"}')
    copy = RunCopy(run, url)
    for step in (1, 2):
        for old in run.glob("checkpoints/*"):
            old.unlink()
        (run / f"checkpoints/resume-{step:08}.ckpt").write_bytes(b"weights")
        copy.update()
    names = [item.url.removeprefix(f"{url}/colors/") for item in client.listed(f"{url}/colors")]
    assert names == ["checkpoints/resume-00000002.ckpt", "run.json"]
    fetched = fetch(f"{url}/colors", tmp_path / "runs")
    assert (fetched / "checkpoints/resume-00000002.ckpt").read_bytes() == b"weights"
    with pytest.raises(RemoteError, match=f"{cloud.scheme}://missing/runs/colors/"):
        RunCopy(run, f"{cloud.scheme}://missing/runs").update()


def test_a_remote_pack_has_the_classes_of_the_data_and_must_be_complete(
    cloud: Cloud, folder: Path, tmp_path: Path
) -> None:
    (folder / "none").mkdir()
    manifest = load_manifest(folder)
    pack(manifest, StoredImages(), tmp_path / "pack", Stop("never"), shard_size=20)
    whole, cut = f"{cloud.scheme}://data/whole", f"{cloud.scheme}://data/cut"
    for path in (tmp_path / "pack").iterdir():
        client.upload(path, f"{whole}/{path.name}")
        if path.name != "shard-000002.tar":
            client.upload(path, f"{cut}/{path.name}")
    remote = load_manifest(whole)
    assert remote.labels == manifest.labels and [s.read() for s in remote.samples] == [
        s.read() for s in manifest.samples
    ]
    with pytest.raises(
        DataError, match=rf"{cut}/shard-000002\.tar: is missing, according to {cut}/pack\.json; copy the pack"
    ):
        load_manifest(cut)


def test_a_server_that_always_fails_is_asked_as_often_as_refract_repeats(cloud: Cloud) -> None:
    """The libraries repeat requests too, which would multiply. gcsfs also asks whether the missing file is a folder."""
    with cloud.proxy.failing(every=1, faults=["500"]), pytest.raises(RemoteError, match=f"{cloud.scheme}://data/one"):
        client.info(f"{cloud.scheme}://data/one.txt")
    assert client.ATTEMPTS <= len(cloud.proxy.injected) <= 2 * client.ATTEMPTS


def test_scores_are_written_to_the_bucket(cloud: Cloud, refract: Run, tmp_path: Path) -> None:
    from benchmarks.growth import OPTIONS

    (tmp_path / "c.yaml").write_text(f"data: {{source: {cloud.scheme}://data/images}}\n")
    refract(
        "train",
        "c.yaml",
        *OPTIONS,
        "--trainer.max_epochs",
        1,
        "--trainer.run_name",
        "r",
        "--evaluation.robustness",
        "none",
    )
    out = f"{cloud.scheme}://data/scores.parquet"
    refract("score", "runs/r/bundle", f"{cloud.scheme}://data/images", "-o", out)
    cloud.files.get_file(out, str(tmp_path / "scores.parquet"))
    assert len(pd.read_parquet(tmp_path / "scores.parquet")) == 31


def test_missing_credentials_are_named(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's library reads public buckets without credentials, so that the server decides; Azure's needs an account."""
    if cloud.scheme == "az":
        monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
        client._store.cache_clear()
        with pytest.raises(RemoteError, match="az://: no credentials .* set AZURE_STORAGE_ACCOUNT_NAME and"):
            client.info("az://data/one.txt")
    else:
        with (
            cloud.proxy.failing(every=1, faults=["401"]),
            pytest.raises(
                RemoteError,
                match="gs://data/one.txt: access denied; check the name, and GOOGLE_APPLICATION_CREDENTIALS",
            ),
        ):
            client.info("gs://data/one.txt")
        assert len(cloud.proxy.injected) <= 2
