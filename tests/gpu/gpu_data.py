"""Small images and bundles for the tests on a GPU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 50)}
SIDE, TEMPERATURE = 32, 0.2


def image(label: str, number: int, side: int = SIDE) -> np.ndarray:
    """A noisy square of the label's colour, uint8 H×W×3; each number gives another image."""
    noise = np.random.default_rng([number, *label.encode()]).normal(0, 25, (side, side, 3))
    return np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)


def encoded(label: str, number: int) -> bytes:
    """The same as a JPEG file."""
    import simplejpeg

    return simplejpeg.encode_jpeg(image(label, number), 95, "RGB", "444")


def write_folder(root: Path, count: int = 16) -> Path:
    """CLASS/NN.jpg, three classes of `count` images."""
    for label in COLOURS:
        (root / label).mkdir(parents=True)
        for number in range(count):
            (root / label / f"{number:02}.jpg").write_bytes(encoded(label, number))
    return root


def write_bundle(path: Path, images: Sequence[bytes], *, seed: int = 0) -> Path:
    """A bundle of an untrained lenet5 whose golden samples are the images, with the answers of the processor."""
    from refract.augment.preprocess import Preprocess
    from refract.models.bundle.bundle import BundleInfo, GoldenSample, save_bundle
    from refract.models.classifier import Classifier, probabilities
    from refract.models.registry import build

    torch.manual_seed(seed)
    preprocess = Preprocess(SIDE, SIDE)
    network = build("lenet5", 3, image_size=(SIDE, SIDE))
    classifier = Classifier(network, mean=preprocess.mean, std=preprocess.std).eval()
    batch = torch.from_numpy(np.stack([preprocess(data) for data in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        answers = probabilities(classifier(batch), task="multiclass", temperature=TEMPERATURE)
    info = BundleInfo(
        name="colours", task="multiclass", labels=tuple(sorted(COLOURS)), created="2026-01-01T00:00:00+00:00",
        network={"name": "lenet5", "image_size": [SIDE, SIDE], "args": {}}, preprocess=preprocess.to_dict(),
        temperature=TEMPERATURE,
    )  # fmt: skip
    golden_samples = [
        GoldenSample(f"{i:02}.jpg", data, tuple(answer.tolist()))
        for i, (data, answer) in enumerate(zip(images, answers, strict=True))
    ]
    return save_bundle(path, info, classifier, golden_samples)
