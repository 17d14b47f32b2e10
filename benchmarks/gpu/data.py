"""Images for the stages: generated JPEG files, and CIFAR-10 straight from a tar."""

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refract.pipeline.data.manifest import Manifest

SPLITS = ("train", "val", "test")


def jpegs(count: int, *, height: int, width: int, seed: int = 0, quality: int = 87) -> list[bytes]:
    """Encoded images: smooth colours with noise, so that a file is about as large as a photo's of that size."""
    import cv2
    import numpy as np
    import simplejpeg

    files = []
    for number in range(count):
        random = np.random.default_rng([seed, number])
        colours = random.integers(0, 256, (9, 12, 3)).astype(np.float32)
        smooth = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC)
        noisy = smooth + 6 * random.standard_normal((height, width, 3), np.float32)
        files.append(simplejpeg.encode_jpeg(np.clip(noisy, 0, 255).astype(np.uint8), quality, "RGB", "420"))
    return files


def write_jpegs(folder: Path, images: list[bytes]) -> list[Path]:
    """The images as files in a new folder."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:04}.jpg" for number in range(len(images))]
    for file, data in zip(files, images, strict=True):
        file.write_bytes(data)
    return files


def cifar(tar: Path, *, val_fraction: float, seed: int) -> "Manifest":
    """The images of a tar of train|test/CLASS/NAME.jpg, in memory, with a validation split drawn. ValueError for another layout."""
    from refract.pipeline.data.manifest import Manifest, Sample

    members: list[tuple[str, str, str, bytes]] = []
    with tarfile.open(tar) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or not member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                continue
            if len(parts) < 3 or parts[-3] not in SPLITS:
                raise ValueError(f"{tar}: {member.name} is not train|test/CLASS/NAME.jpg")
            content = archive.extractfile(member)
            assert content is not None
            members.append((parts[-3], parts[-2], "/".join(parts[-3:]), content.read()))
    labels = tuple(sorted({label for _, label, _, _ in members}))
    samples = tuple(
        Sample(name, (labels.index(label),), split, data=data) for split, label, name, data in sorted(members)
    )
    return _split(Manifest(str(tar), samples, labels, "multiclass"), val_fraction, seed)


def colours(*, val_fraction: float, seed: int, train: int = 60, test: int = 30) -> "Manifest":
    """Images of three colours in place of CIFAR-10, to test the program."""
    import numpy as np
    import simplejpeg

    from refract.pipeline.data.manifest import Manifest, Sample

    labels, samples = ("blue", "green", "red"), []
    for number in range(train + test):
        label, random = number % 3, np.random.default_rng(number)
        pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        pixels[..., 2 - label] += 120
        data = simplejpeg.encode_jpeg(pixels, 90, "RGB", "444")
        samples.append(Sample(f"{number}.jpg", (label,), "train" if number < train else "test", data=data))
    return _split(Manifest("generated colours", tuple(samples), labels, "multiclass"), val_fraction, seed)


def _split(manifest: "Manifest", val_fraction: float, seed: int) -> "Manifest":
    from refract.pipeline.data.splits import draw_splits

    hashes = {sample.key: hashlib.sha256(sample.read()).hexdigest() for sample in manifest.samples}
    split = draw_splits(manifest, hashes, val_fraction=val_fraction, test_fraction=0.2, seed=seed)
    order = {name: place for place, name in enumerate(SPLITS)}
    return replace(split, samples=tuple(sorted(split.samples, key=lambda sample: order[sample.split])))
