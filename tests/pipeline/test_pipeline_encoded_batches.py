"""Training images that the device decodes: equal to those of loader workers within rounding, from files of all kinds."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from jpeg_files import FILES, ONLY_CPU, pixels, write_photos
from small_data import COLORS, config_of, write_image

from refract.augment import Augmenter, ImageError, Preprocess
from refract.augment.executors import jpeg_batch
from refract.augment.executors.jpeg_batch import header_of
from refract.pipeline.data import encoded_batches
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.datasets import Item
from refract.pipeline.data.manifest import DataError
from refract.pipeline.data.prepare import prepare_data

POLICY = ["HorizontalFlip", {"RandomResizedCrop": {"size": 32, "scale": [0.3, 1.0]}}, {"ColorJitter": {"hue": 0.1}}]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, each with FILES, ONLY_CPU and a PNG."""
    root = write_photos(tmp_path_factory.mktemp("photos"), list(COLORS))
    for number, label in enumerate(COLORS):
        write_image(root / label / "image.png", pixels(20 + number))
    return root


def uniform(root: Path, suffix: str) -> Path:
    """Write three classes of 8 images of one size and format."""
    for position, label in enumerate(COLORS):
        for number in range(8):
            write_image(root / label / f"{number}{suffix}", pixels(8 * position + number))
    return root


def data_of(folder: Path, **options) -> ImageDataModule:
    manifest, _ = prepare_data(config_of(folder))
    augmenter = Augmenter(POLICY, seed=5, size=32, color_profile="convert")
    return ImageDataModule(
        manifest, augmenter=augmenter, preprocess=Preprocess(32, 32), batch_size=6, **{"workers": 0, **options}
    )


def on_device(data: ImageDataModule, batch: Item, device: torch.device = CPU) -> Item:
    return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean difference in grey levels of the worst image."""
    return float((one.cpu().int() - other.cpu().int()).abs().float().mean((1, 2, 3)).max())


def test_the_files_that_a_device_decodes() -> None:
    assert [name for name, data in FILES.items() if header_of(data, color_profile="convert") is None] == []
    assert [name for name, data in ONLY_CPU.items() if header_of(data, color_profile="convert") is not None] == []
    assert header_of(ONLY_CPU["with another profile"], color_profile="ignore") == (60, 80, 1)
    assert header_of(FILES["orientation 6"]) == (70, 50, 6), "the upright size"
    for damaged in (b"", b"\xff\xd8\xff", FILES["landscape"][:40], b"\x89PNG", FILES["landscape"][:-2]):
        assert header_of(damaged) is None
    scans = FILES["progressive"][:-2] + 100 * b"\xff\xda\x00\x02" + b"\xff\xd9"
    twelve_bits = FILES["landscape"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    arithmetic = FILES["landscape"].replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11")
    assert [header_of(data) for data in (scans, twelve_bits, arithmetic)] == [None, None, None]
    assert header_of(FILES["landscape"] + bytes(99)) == (60, 80, 1), "bytes after the end are no image data"
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(5)  # Photoshop writes transform 0 for grey
    grey = FILES["grey"]
    assert header_of(grey[:2] + adobe + grey[2:]) == (60, 80, 1)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_equal_those_of_workers(photos: Path, workers: int) -> None:
    by_workers, by_device = data_of(photos), data_of(photos, decode_on="device", workers=workers)
    encoded = finished = 0
    for expected, batch in zip(by_workers.train_dataloader(), by_device.train_dataloader(), strict=True):
        encoded += int((batch["headers"][:, 0] > 0).sum())
        finished += len(batch.get("images", ()))
        result = on_device(by_device, batch)
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], expected[name]) for name in ("targets", "indices", "repeats"))
        assert largest_difference(result["images"], expected["images"]) <= 1.5
    assert encoded > finished > 0, "both kinds were compared"


def test_a_batch_without_files_for_the_device(tmp_path: Path) -> None:
    folder = uniform(tmp_path / "png", ".png")
    by_workers, by_device = data_of(folder), data_of(folder, decode_on="device")
    for expected, batch in zip(by_workers.train_dataloader(), by_device.train_dataloader(), strict=True):
        assert torch.equal(on_device(by_device, batch)["images"], expected["images"])


def test_evaluation_images_are_decoded_by_the_cpu(photos: Path) -> None:
    by_workers, by_device = data_of(photos), data_of(photos, decode_on="device")
    for expected, batch in zip(by_workers.val_dataloader(), by_device.val_dataloader(), strict=True):
        assert torch.equal(on_device(by_device, batch)["images"], expected["images"])


def test_many_pixels_are_decoded_in_parts(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(photos, decode_on="device")
    batches = list(data.train_dataloader())
    expected = [on_device(data, dict(batch))["images"] for batch in batches]
    decode, parts = jpeg_batch._decoded, []
    monkeypatch.setattr(jpeg_batch, "PIXELS_AT_ONCE", 9000)
    monkeypatch.setattr(jpeg_batch, "_decoded", lambda files, device: parts.append(len(files)) or decode(files, device))
    assert max(int(batch["headers"][:, 1:3].prod(1).sum()) for batch in batches) > 9000
    for batch, images in zip(batches, expected, strict=True):
        assert largest_difference(on_device(data, batch)["images"], images) <= 0.01
    assert max(parts) <= 2, "three images have more than 9000 pixels"


def test_the_cpu_computes_a_batch_that_the_device_cannot_decode(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ImageError("the cuda device cannot decode a JPEG: nvjpeg failed: 5")

    by_workers, by_device = data_of(photos), data_of(photos, decode_on="device")
    monkeypatch.setattr(jpeg_batch, "run", fails)
    monkeypatch.setattr(encoded_batches, "_warned", threading.Event())
    with caplog.at_level(logging.WARNING):
        for expected, batch in zip(by_workers.train_dataloader(), by_device.train_dataloader(), strict=True):
            assert torch.equal(on_device(by_device, batch)["images"], expected["images"])
    assert caplog.text.count("nvjpeg failed: 5; the training process decodes such batches;") == 1


def test_a_file_that_is_damaged_after_the_data_check_is_named(tmp_path: Path) -> None:
    folder = uniform(tmp_path / "cut", ".jpg")
    data = data_of(folder, decode_on="device")
    for path in folder.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"cut/.+/\d.jpg: was readable during the data check, but is not now"):
        on_device(data, next(iter(data.train_dataloader())))


def test_shared_memory_is_planned_for_files_and_for_finished_images(photos: Path) -> None:
    planned = {place: data_of(photos, decode_on=place) for place in ("workers", "device")}
    sizes = {
        place: data._batch_bytes(data.train_set.augmenter, False, data.train_set.encoded)
        for place, data in planned.items()
    }
    assert sizes == {"workers": 6 * (3 * 32 * 32 + 4096), "device": 6 * (encoded_batches.BYTES + 4096)}
    large = Augmenter(POLICY, size=512)
    assert planned["device"]._batch_bytes(large, False, True) == 6 * (3 * 512 * 512 + 4096)


def test_images_in_memory_and_views_are_not_decoded_on_the_device(photos: Path) -> None:
    for options in ({"memory": "always"}, {"views": True}, {"reads_images": False}):
        data = data_of(photos, decode_on="device", **options)
        assert not data.can_decode_on_device and not data.train_set.encoded
