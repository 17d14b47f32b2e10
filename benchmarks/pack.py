"""Images a second of one core from a folder, from packs of it, and from LitData's loader: bytes on disk → batch of augmented 224².

The work of all: read, decode, RandomResizedCrop(224, 0.08…1), flip, and a batch of 64 as a uint8 tensor; one process, no workers. LitData
reads the same JPEGs as the pack `--resize 256`, and decodes and augments them by torchvision. The images: those of DIR enlarged by a cubic
to 612×408 (0.25 megapixels), and to 4000×3000 with a sensor's noise of 3 grey levels, as JPEG of quality 90. LitData runs if it can be
imported, also from a separate folder on PYTHONPATH.

    python -m benchmarks.pack --images DIR --json benchmarks/results/pack.json
"""

import argparse
import contextlib
import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

from benchmarks.report import environment, write
from refract.augment import Augmenter, Preprocess, decode
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.data.pack import StoredImages, pack
from refract.pipeline.stopping import Stop

SIZES = {"0.25 megapixels": (408, 612, 0.0, 240), "12 megapixels": (3000, 4000, 3.0, 24)}
"""Name → height, width, standard deviation of the noise, number of images."""
PACKS = {
    "pack, images as they are": StoredImages(),
    "pack --resize 320": StoredImages(resize=320),
    "pack --resize 256": StoredImages(resize=256),
    "pack --resize 256 --raw": StoredImages(resize=256, raw=True),
}
SIDE, BATCH, LITDATA = 224, 64, "LitData, the JPEGs of --resize 256"


def write_images(source: Path, folder: Path, height: int, width: int, noise: float, count: int) -> None:
    """Write CLASS/N.jpg in two classes, from the images of `source` in turn."""
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    for number in range(count):
        original = decode(files[number % len(files)].read_bytes())
        pixels: np.ndarray = cv2.resize(original, (width, height), interpolation=cv2.INTER_CUBIC)
        if noise:
            drawn = np.random.default_rng(number).normal(0, noise, pixels.shape)
            pixels = np.clip(pixels + drawn, 0, 255).astype(np.uint8)
        file = folder / "ab"[number % 2] / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(simplejpeg.encode_jpeg(pixels, 90, "RGB", "420"))


def through_refract(source: Path) -> Callable[[], Iterator[torch.Tensor]]:
    """Return a function that yields the batches of one epoch, by `refract train`'s loader."""
    manifest = load_manifest(source)
    manifest = manifest.with_samples([sample.with_split("train") for sample in manifest.samples])
    policy: list[Any] = [{"RandomResizedCrop": {"size": SIDE, "scale": [0.08, 1.0]}}, "HorizontalFlip"]
    data = ImageDataModule(
        manifest, augmenter=Augmenter(policy, seed=0, size=(SIDE, SIDE)), preprocess=Preprocess(SIDE, SIDE), batch_size=BATCH, workers=0
    )  # fmt: skip
    loader = data.train_dataloader()
    return lambda: (batch["images"] for batch in loader)


def through_litdata(source: Path, folder: Path) -> Callable[[], Iterator[torch.Tensor]]:
    """As `through_refract`, by LitData's StreamingDataLoader on the JPEGs of a pack."""
    import litdata
    from torchvision.io import decode_jpeg
    from torchvision.transforms import v2

    samples = load_manifest(source).samples
    for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[variable] = str(folder / variable)  # by default /tmp/chunks and /tmp/data, which LitData empties
    with contextlib.redirect_stdout(io.StringIO()):
        litdata.optimize(
            fn=as_record, inputs=[sample.read() for sample in samples], output_dir=str(folder / "shards"), chunk_bytes="64MB", num_workers=1
        )  # fmt: skip
    transform = v2.Compose(
        [v2.RandomResizedCrop((SIDE, SIDE), scale=(0.08, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    )

    class Augmented(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> torch.Tensor:
            stored = super().__getitem__(index)["image"]
            return transform(decode_jpeg(torch.frombuffer(bytearray(stored), dtype=torch.uint8)))

    dataset = Augmented(str(folder / "shards"), shuffle=True, drop_last=False)
    return lambda: iter(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0))


def as_record(data: bytes) -> dict[str, bytes]:
    return {"image": data}


def rate(epoch: Callable[[], Iterator[torch.Tensor]], count: int) -> float:
    """Images a second of processor time."""
    started, seen = time.process_time(), 0
    for images in epoch():
        assert images.shape[1:] == (3, SIDE, SIDE) and images.dtype == torch.uint8
        seen += len(images)
    assert seen == count, (seen, count)
    return seen / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    for size, (height, width, noise, count) in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_images(args.images, folder / "images", height, width, noise, count)
            epochs, bytes_of = {"folder": through_refract(folder / "images")}, {"folder": 0}
            manifest = load_manifest(folder / "images")
            for form, images in PACKS.items():
                target = folder / form.replace(" ", "_")
                bytes_of[form] = sum(
                    shard.bytes for shard in pack(manifest, images, target, Stop(""), shard_size=100).record.shards
                )
                epochs[form] = through_refract(target)
            bytes_of["folder"] = sum(path.stat().st_size for path in (folder / "images").rglob("*.jpg"))
            if importlib.util.find_spec("litdata") is not None:
                epochs[LITDATA] = through_litdata(folder / "pack_--resize_256", folder / "litdata")
            rates: dict[str, list[float]] = {form: [] for form in epochs}
            for _ in range(args.rounds):
                for form, epoch in epochs.items():
                    rates[form].append(rate(epoch, count))
        rows = {form: round(median(form_rates), 1) for form, form_rates in rates.items()}
        report[size] = {
            form: {
                "images_per_second": median_rate,
                "ratio_to_folder": round(median_rate / rows["folder"], 2),
                "megabytes": round(bytes_of[form] / 1e6, 1) if form in bytes_of else None,
            }
            for form, median_rate in rows.items()
        }
        for form, row in report[size].items():
            print(
                f"{size:<18}{form:<36}{row['images_per_second']:8.1f} images/s{row['ratio_to_folder']:7.2f} ×  {row['megabytes']} MB"
            )
    if args.json is not None:
        write(
            args.json,
            {"rates": report, "environment": environment("refract", "torch", "torchvision", "simplejpeg", "litdata")},
        )


if __name__ == "__main__":
    main()
