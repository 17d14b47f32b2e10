"""JPEG files that a GPU decodes and augments, compared with the CPU, and trainings on them."""

from pathlib import Path

import pytest
import torch

from refract.augment import Augmenter, Preprocess
from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.datasets import Item
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.training.fit import assemble
from refract.pipeline.training.input_path import timed_paths
from tests.pipeline.jpeg_files import write_photos

pytestmark = pytest.mark.gpu

POLICY = [
    "HorizontalFlip",
    {"RandomResizedCrop": {"scale": [0.3, 1.0]}},
    {"ColorJitter": {"hue": 0.1}},
    "RandomErasing",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "photos", ["one", "two", "three"])


def data_of(folder: Path, decode_on: str) -> ImageDataModule:
    manifest, _ = prepare_data(Config().changed({"data.source": str(folder)}))
    augmenter = Augmenter(POLICY, seed=5, size=32, color_profile="convert")
    same = {"augmenter": augmenter, "preprocess": Preprocess(32, 32), "batch_size": 12, "workers": 0}
    return ImageDataModule(manifest, decode_on=decode_on, **same)


def on_device(data: ImageDataModule, batch: Item, device: str) -> torch.Tensor:
    place = torch.empty(0, device=device).device
    batch = {name: value.pin_memory() for name, value in batch.items()} if device == "cuda" else batch
    images: torch.Tensor = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, place, 0), 0)["images"]
    assert images.device == place and images.dtype == torch.uint8
    return images


def test_the_device_decodes_and_augments_as_workers_do(photos: Path, device: str) -> None:
    by_workers, by_device = data_of(photos, "workers"), data_of(photos, "device")
    for expected, batch in zip(by_workers.train_dataloader(), by_device.train_dataloader(), strict=True):
        assert int((batch["headers"][:, 0] > 0).sum()) > 1
        difference = (on_device(by_device, batch, device).cpu().int() - expected["images"].int()).abs().float()
        assert difference.mean((1, 2, 3)).max() <= 3.0


def test_decoding_does_not_disturb_what_the_device_computes_meanwhile(photos: Path, device: str) -> None:
    """The decoder's stream does not wait: memory that a pending kernel still reads must not be given to it."""
    data = data_of(photos, "device")
    batches = list(data.train_dataloader())
    expected = [on_device(data, dict(batch), device) for batch in batches]
    side = 4096 if device == "cuda" else 64
    for _ in range(5):
        sums = []
        for batch, images in zip(batches, expected, strict=True):
            pending = torch.ones(side, side, device=device)
            sums.append((pending @ pending).sum(dtype=torch.float64) + pending.sum(dtype=torch.float64))
            del pending  # its memory is free for the host, while the kernels may not have run
            assert torch.equal(on_device(data, dict(batch), device), images)
        assert [float(value) for value in sums] == [float(side**3 + side**2)] * len(sums)


def test_only_the_decoder_waits_for_the_device(photos: Path, device: str) -> None:
    """The decoder ends with a wait for its stream, which PyTorch's mode does not see; nothing else may wait."""
    data = data_of(photos, "device")
    batches = list(data.train_dataloader())
    on_device(data, dict(batches[0]), device)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            on_device(data, dict(batch), device)
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def test_both_input_paths_of_a_training_are_timed(photos: Path, device: str, tmp_path: Path) -> None:
    values = {
        "data": {"source": str(photos), "image_size": 32, "batch_size": 8, "workers": 0, "memory": "never"},
        "augment": {"policy": POLICY},
        "model": {"name": "cnn", "args": {"widths": [8]}},
        "trainer": {"device": device, "runs_dir": str(tmp_path)},
        "tracking": {"enabled": False},
    }
    assembly = assemble(config_from_dict(values))
    rates = timed_paths(assembly, steps=4)
    assert rates.keys() == {"workers", "device"} and min(rates.values()) > 0
