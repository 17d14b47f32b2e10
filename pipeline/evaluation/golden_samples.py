"""The golden images of a bundle: a few of the hold-out with the answers that a server must give again."""

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
    """Up to eight images spread over the samples. classifier: on the CPU, in eval mode, where the answers are computed.

    A file above 256 kB is kept as a JPEG of at most 512 pixels a side instead; its answer is that of the smaller image. So is a HEIC file,
    which a server may be unable to read.
    """
    step = max(1, len(samples) // COUNT)
    chosen = samples[::step][:COUNT]
    kept = [_portable(sample, preprocess.color_profile) for sample in chosen]
    texts = [sample.text if "texts" in classifier.reads else "" for sample in chosen]
    questions = [
        SampleInput(lambda data=data: data, text, sample.has_image)  # type: ignore[misc]
        for (_, data), text, sample in zip(kept, texts, chosen, strict=True)
    ]
    answers = score(classifier, preprocess, questions, task=task, temperature=temperature, batch_size=COUNT)
    return [
        GoldenSample(f"{i:02}{suffix}", data, tuple(map(float, answer)), text, sample.has_image)  # type: ignore[arg-type]
        for i, ((suffix, data), answer, text, sample) in enumerate(zip(kept, answers, texts, chosen, strict=True))
    ]


def _portable(sample: Sample, color_profile: str) -> tuple[str, bytes]:
    import cv2

    data = sample.read()
    if len(data) <= LARGEST and format_of(data) != "HEIC":
        suffix = Path(sample.path).suffix.lower()
        return suffix if suffix in SUFFIXES else ".img", data
    pixels = decode(data, color_profile=color_profile)
    factor = min(1.0, 512 / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return ".jpg", cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
