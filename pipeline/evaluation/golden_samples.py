"""Choose the golden samples of a bundle: a few test samples with the predictions that a server must reproduce."""

from collections.abc import Sequence
from pathlib import Path

from refract.augment import Preprocess, decode
from refract.augment.decoding.formats import SUFFIXES, format_of
from refract.models.bundle.bundle import GoldenSample
from refract.models.classifier import Classifier
from refract.pipeline.data.manifest import Sample
from refract.pipeline.inference.scoring import SampleInput, score

COUNT = 8
LARGEST = 256 * 1024


def make_golden_samples(
    classifier: Classifier, preprocess: Preprocess, samples: Sequence[Sample], *, task: str, temperature: float = 1.0
) -> list[GoldenSample]:
    """Choose up to COUNT samples, evenly spread, and compute their predictions. classifier: on the CPU, in eval mode.

    A file above 256 kB, or a HEIC file, which a server may be unable to read, becomes a JPEG of at most 512 pixels a side. Its prediction
    is that of the JPEG.
    """
    step = max(1, len(samples) // COUNT)
    chosen = samples[::step][:COUNT]
    files = [_portable(sample, preprocess.color_profile) for sample in chosen]
    texts = [sample.text if "texts" in classifier.reads else "" for sample in chosen]
    inputs = [
        SampleInput(lambda data=data: data, text, sample.has_image)  # type: ignore[misc]
        for (_, data), text, sample in zip(files, texts, chosen, strict=True)
    ]
    predictions = score(classifier, preprocess, inputs, task=task, temperature=temperature, batch_size=COUNT)
    return [
        GoldenSample(f"{i:02}{suffix}", data, tuple(map(float, row)), text, sample.has_image)  # type: ignore[arg-type]
        for i, ((suffix, data), row, text, sample) in enumerate(zip(files, predictions, texts, chosen, strict=True))
    ]


def _portable(sample: Sample, color_profile: str) -> tuple[str, bytes]:
    """Return (file suffix, encoded bytes) of a small file that every server can decode."""
    import cv2

    data = sample.read()
    if len(data) <= LARGEST and format_of(data) != "HEIC":
        suffix = Path(sample.path).suffix.lower()
        return suffix if suffix in SUFFIXES else ".img", data
    pixels = decode(data, color_profile=color_profile)
    factor = min(1.0, 512 / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return ".jpg", cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
