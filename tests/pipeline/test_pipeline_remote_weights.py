"""Initial weights at URLs: a repository of the Hugging Face Hub, a file, and a bundle in an object store."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, Hub
from object_server import ObjectServer
from small_data import Run, interrupt_before_first_step, paint
from small_export import make_bundle

from refract.models.bundle.bundle import Bundle
from refract.models.registry import build
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.export.export import export
from refract.pipeline.training.fit import assemble
from refract.pipeline.training.run import train
from refract.pipeline.training.run_directory import read_record, stored_config, unfinished
from refract.remote.address import AddressError
from refract.remote.client import RemoteError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("new_cache")]

NETWORK = "timm/test_resnet"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "timm", NETWORK, size=(32, 32))


@pytest.fixture(scope="module")
def exported(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of `refract export --to hf`."""
    folder = tmp_path_factory.mktemp("exports") / "hf"
    export(bundle, "hf", folder)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def hub(exported: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub("acme/colours")
    hub.files |= exported | {"pytorch_model.bin": b"not read", "onnx/model.onnx": b"not read"}
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    paint(root, range(8))
    return root


def configured(images: Path, weights: str, tmp_path: Path) -> Config:
    return config_from_dict({
        "data": {"source": str(images), "image_size": 32, "workers": 0},
        "model": {"name": NETWORK, "weights": weights},
        "trainer": {"max_epochs": 1, "device": "cpu", "runs_dir": str(tmp_path / "runs"), "run_name": "first"},
        "evaluation": {"robustness": "none"}, "tracking": {"enabled": False},
    })  # fmt: skip


def assert_starts_from(bundle: Bundle, config: Config) -> None:
    assembly = assemble(config)
    expected, state = bundle.classifier().state_dict(), assembly.module.classifier.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "url",
    [
        "hf://acme/colours", "hf://acme/colours@main/", "hf://acme/colours@", "hf://acme/colours/model.safetensors",
        "hf://acme/colours@refs/pr/1", "hf://acme/colours@a%2Fbranch/model.safetensors",
    ],
)  # fmt: skip
def test_a_training_starts_from_the_export_on_the_hub(
    url: str, hub: Hub, bundle: Bundle, images: Path, tmp_path: Path
) -> None:
    hub.failures = 2
    hub.commits["refs/pr/1"] = hub.commits["a/branch"] = hub.files
    assert_starts_from(bundle, configured(images, url, tmp_path))
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"model.safetensors", "config.json"}, "what is not needed is not downloaded"


def test_a_run_keeps_its_commit_and_resumes_without_the_hub(
    hub: Hub, bundle: Bundle, images: Path, tmp_path: Path
) -> None:
    config, commit = configured(images, "hf://acme/colours", tmp_path), hub.commit()

    interrupt_before_first_step(config)
    run = tmp_path / "runs" / "first"
    assert stored_config(run).model.weights == f"hf://acme/colours@{commit}"
    assert read_record(run)["start"] == {"source": "hf://acme/colours", "weights": f"hf://acme/colours@{commit}"}
    assert unfinished(config, "first") == run, "the branch is compared, not the commit"
    hub.files["config.json"] = b"{}"
    assert hub.commit() != commit
    hub.close()
    assert_starts_from(bundle, stored_config(run))
    result = train(stored_config(run), resume=run)
    assert result is not None and read_record(run)["finished"]


def test_a_commit_that_main_has_left_is_read(hub: Hub, bundle: Bundle, images: Path, tmp_path: Path) -> None:
    commit = hub.commit()
    hub.files.clear()
    assert_starts_from(bundle, configured(images, f"hf://acme/colours@{commit}", tmp_path))


def test_what_cannot_start_a_training_names_the_url(hub: Hub, bundle: Bundle, images: Path, tmp_path: Path) -> None:
    for url, message in {
        "hf://acme/roses": "hf://acme/roses: refused by the Hub .*; check the name, and HF_TOKEN",
        "hf://acme/colours@v9": "hf://acme/colours@v9: refused by the Hub",
        "hf://colours": "hf://colours: is not a complete URL",
        "hf://acme/colours@refs/pr/9": "hf://acme/colours@refs/pr/9: refused by the Hub .RevisionNotFound",
    }.items():
        with pytest.raises(RemoteError, match=message):
            assemble(configured(images, url, tmp_path))
    hub.files |= {f"bundle/{file.name}": file.read_bytes() for file in bundle.path.iterdir() if file.is_file()}
    with pytest.raises(
        ConfigError, match="hf://acme/colours@.*/bundle': is a bundle, .*; download it and name its folder"
    ):
        assemble(configured(images, "hf://acme/colours/bundle", tmp_path))
    with pytest.raises(AddressError, match="contains a password"):
        assemble(configured(images, "hf://me:secret@acme/colours", tmp_path))
    with pytest.raises(ValueError, match=r"model.safetensors\?download=true': no such file; check the URL"):
        build(NETWORK, 3, image_size=(32, 32), weights="hf://acme/colours/model.safetensors?download=true")
    for page, address in {
        "acme/colours.a1_in1k/": "acme/colours.a1_in1k",
        "acme/colours?library=timm": "acme/colours",
        "acme/colours/tree/v2": "acme/colours@v2",
        "acme/colours/blob/main/onnx/other.safetensors": "acme/colours/onnx/other.safetensors",
    }.items():
        for host in ("https://huggingface.co", "http://www.HuggingFace.co", "https://hf.co"):
            with pytest.raises(ConfigError, match=rf"is a page of the Hugging Face Hub; write hf://{address}$"):
                assemble(configured(images, f"{host}/{page}", tmp_path))
    with pytest.raises(ConfigError, match="expected the URL of a file that ends in .safetensors"):
        assemble(configured(images, "http://127.0.0.1:9/weights.ckpt", tmp_path))
    with pytest.raises(ValueError, match=r"the folder has none of model.safetensors, .*; check the URL"):
        build(NETWORK, 3, image_size=(32, 32), weights="hf://acme/colours/onnx")
    with pytest.raises(ConfigError, match=r"none.safetensors': no such file; check the URL"):
        assemble(configured(images, "hf://acme/colours/none.safetensors", tmp_path))
    with pytest.raises(
        ValueError, match="no key fits the network.*the folder's network is model.name: timm/test_resnet"
    ):
        build("timm/test_vit", 3, image_size=(160, 160), weights="hf://acme/colours")


def test_removed_and_damaged_copies_are_downloaded_again(
    hub: Hub, bundle: Bundle, images: Path, tmp_path: Path
) -> None:
    config = configured(images, "hf://acme/colours", tmp_path)
    for damage in (Path.unlink, lambda file: file.write_bytes(b"no tensors")):
        assert_starts_from(bundle, config)
        (stored,) = (tmp_path / "cache" / "weights").glob("*/model.safetensors")
        damage(stored)
        if stored.exists():
            with pytest.raises(ConfigError, match="cannot be read as plain tensors"):
                assemble(config)
    assert_starts_from(bundle, config)


def test_init_takes_the_network_from_the_repository(hub: Hub, images: Path, refract: Run) -> None:
    refract("init", str(images), "--model.weights", "hf://acme/colours", "-o", "config.yaml")
    text = Path("config.yaml").read_text("utf-8")
    config = yaml.safe_load(text)
    assert (config["model"]["name"], config["model"]["weights"]) == (NETWORK, "hf://acme/colours")
    assert config["data"]["image_size"] == 32 and "the network of the weights" in text


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    server = ObjectServer()
    yield server
    server.close()


def test_a_bundle_and_a_file_in_an_object_store(
    server: ObjectServer, bundle: Bundle, exported: dict[str, bytes], images: Path, tmp_path: Path
) -> None:
    server.put_folder(bundle.path, "bundle")
    for name in ("model.safetensors", "config.json"):
        server.put(f"weights/{name}", exported[name])
    with server.proxy.failing(5):
        assembly = assemble(configured(images, "s3://data/bundle", tmp_path))
    assert assembly.source is not None and assembly.source.record["digest"] == bundle.digest
    assert assembly.config.optim.head_lr == 1, "the head is not new"
    for url in ("s3://data/bundle", "s3://data/weights/model.safetensors"):
        assert_starts_from(bundle, configured(images, url, tmp_path))
    with pytest.raises(RemoteError, match="s3://data/none: no such folder, or it is empty; check the URL"):
        assemble(configured(images, "s3://data/none", tmp_path))
    with pytest.raises(ConfigError, match="s3://data/weights is not a bundle"):
        assemble(configured(images, "s3://data/weights", tmp_path))
