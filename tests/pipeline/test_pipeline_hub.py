"""Data at hf://, on a server with the Hub's HTTP interface: listing, paths, files."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, Hub

from refract.pipeline.data import storage
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import load_manifest
from refract.remote.client import RemoteError


@pytest.fixture
def hub(new_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub("datasets/acme/photos")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()


ROOT = "hf://datasets/acme/photos"


def test_a_dataset_of_the_hub_gives_its_images_labels_and_splits(hub: Hub, archives: Path) -> None:
    local = load_manifest(archives / "images")
    features = {"image": {"_type": "Image"}, "label": {"names": list(local.labels), "_type": "ClassLabel"}}
    table = pa.table({
        "image": [{"bytes": sample.read(), "path": None} for sample in local.samples],
        "label": [sample.labels[0] for sample in local.samples],
    }).replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})  # fmt: skip
    for split, part in (("test", table.slice(0, 10)), ("train", table.slice(10))):
        file = io.BytesIO()
        pq.write_table(part, file)
        hub.files[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
    hub.files |= {"README.md": b"about", ".gitattributes": b"*"}
    hub.failures = 2
    manifest = load_manifest(ROOT)
    assert [sample.read() for sample in manifest.samples] == [sample.read() for sample in local.samples]
    assert manifest.labels == local.labels and {s.split for s in manifest.samples[10:]} == {"train"}
    assert len(load_manifest(f"{ROOT}/data/train-00000-of-00001.parquet").samples) == 20


def test_class_folders_on_the_hub_are_read_and_changes_noticed(hub: Hub, archives: Path) -> None:
    local = load_manifest(archives / "images")
    hub.files |= {str(Path(s.path).relative_to(archives / "images")): s.read() for s in local.samples}
    hub.files["large/1.png"] = bytes(5000)
    manifest = load_manifest(f"{ROOT}@main")
    images = [sample for sample in manifest.samples if "large/" not in sample.path]
    assert [sample.read() for sample in images] == [sample.read() for sample in local.samples]
    for name in ("large/1.png", "green/000.png"):
        sample = next(sample for sample in load_manifest(ROOT).samples if sample.path.endswith(name))
        before, hub.files[name] = hub.files[name], hub.files[name][:-1] + b"?"
        with pytest.raises(RemoteError, match=f"{name}: has changed while it was in use"):
            sample.read()
        hub.files[name] = before
        assert sample.read() == before


def test_what_the_hub_refuses_is_reported_without_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=f"{ROOT}/none.zip: cannot be read"):
        load_manifest(f"{ROOT}/none.zip")
    with pytest.raises(
        RemoteError, match="hf://datasets/acme/others: refused by the Hub .*; check the name, and HF_TOKEN"
    ):
        load_manifest("hf://datasets/acme/others")
    with pytest.raises(RemoteError, match="hf://photos: is not a complete URL; write hf://datasets/OWNER/NAME"):
        load_manifest("hf://photos")
    monkeypatch.setenv("HF_TOKEN", "hf_some_other_token")
    with pytest.raises(RemoteError, match="refused by the Hub") as refused:
        storage.read(f"{ROOT}/README.md")
    assert "hf_some" not in str(refused.value)
