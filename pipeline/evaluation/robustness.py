"""Measure a classifier's error under the 19 corruptions of Hendrycks & Dietterich 2019 (arXiv:1903.12261) and under Gaussian noise.

Each corruption has the severities 1 to 5.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from refract.augment import Preprocess
from refract.augment.ops.corruption import CORRUPTIONS, corrupt
from refract.augment.random import generator
from refract.cores import cores
from refract.models.classifier import Classifier, probabilities
from refract.models.multimodal.tokens import pad_rows
from refract.models.prediction import predicted_labels
from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation.measures import mean_interval
from refract.pipeline.evaluation.multilabel import set_errors
from refract.progress import tracked

NOISE = (4, 8, 16, 32, 64)
"""Standard deviations of Gaussian noise in grey levels (0…255). The noise of the mildest corruption has 20."""


@dataclass(frozen=True)
class Effort:
    """The extent of a measurement. images: at most, None for all; severities: the severities of each corruption."""

    images: int | None
    severities: tuple[int, ...]

    @property
    def passes(self) -> int:
        """Forward passes per image, one of them on the clean image."""
        return 1 + len(CORRUPTIONS) * len(self.severities) + len(NOISE)


QUICK = Effort(50, (1, 3, 5))
FULL = Effort(None, (1, 2, 3, 4, 5))
EFFORTS = MappingProxyType({"quick": QUICK, "full": FULL})
"""Name in the config and on the command line → effort."""


@dataclass(frozen=True)
class Robustness:
    """Errors under corruptions. An error is the fraction of wrong predictions, for multi-label one minus the mean F1 of the images' labels.

    errors: corruption → severity → error; noise: standard deviation of Gaussian noise → error; clean: error on the same images without
    corruption; images: their number; interval, clean_interval: 95 % intervals of `mean_error` and `clean`, over the images.
    """

    errors: dict[str, dict[int, float]]
    noise: dict[int, float]
    clean: float
    images: int
    interval: tuple[float, float]
    clean_interval: tuple[float, float]

    @property
    def mean_error(self) -> float:
        """The mean error over all corruptions and severities.

        Deviation from the paper's mCE: not divided by AlexNet's errors, which exist for ImageNet only.
        """
        return float(np.mean([list(severities.values()) for severities in self.errors.values()]))

    def by_severity(self) -> dict[int, float]:
        """Return severity → mean error over the corruptions; severity 0 is the clean error."""
        severities = next(iter(self.errors.values()))
        return {0: self.clean} | {s: float(np.mean([row[s] for row in self.errors.values()])) for s in severities}

    def text(self) -> str:
        """Return the result as one line."""
        (low, high), (clean_low, clean_high) = self.interval, self.clean_interval
        return (
            f"error under corruptions {self.mean_error:.4f} (95 % interval {low:.4f} to {high:.4f}), "
            f"clean error {self.clean:.4f} ({clean_low:.4f} to {clean_high:.4f}), on {self.images:,} images"
        )

    def to_dict(self) -> dict[str, Any]:
        errors = {name: {str(severity): value for severity, value in row.items()} for name, row in self.errors.items()}
        return {
            "summary": self.text(),
            "images": self.images,
            "clean_error": self.clean,
            "clean_interval": list(self.clean_interval),
            "mean_corruption_error": self.mean_error,
            "interval": list(self.interval),
            "errors": errors,
            "noise": {str(deviation): error for deviation, error in self.noise.items()},
        }


def measure_robustness(
    classifier: Classifier,
    preprocess: Preprocess,
    samples: Sequence[Sample],
    effort: Effort,
    *,
    task: str = "multiclass",
    thresholds: Sequence[float] = (),
    temperature: float = 1.0,
    seed: int = 0,
) -> Robustness:
    """Corrupt the preprocessed images and measure the errors of the predictions, see `Robustness`.

    thresholds, temperature: the values of a multi-label bundle. A sample's label of -1 is one that the classifier lacks. The chosen images
    and their corruptions depend on the seed, the image's index and the severity only.
    """
    chosen = spread_subset(samples, effort.images, seed)
    errors: dict[str, dict[int, float]] = {name: {} for name in CORRUPTIONS}
    with ThreadPoolExecutor(cores()) as pool:
        preprocessed = list(pool.map(lambda sample: preprocess(sample.read()), chosen))
        texts = _texts(classifier, chosen)

        def image_errors(images: Sequence[np.ndarray]) -> np.ndarray:
            predicted = _predicted(classifier, images, texts, task=task, thresholds=thresholds, temperature=temperature)
            return _errors(predicted, chosen)

        clean = image_errors(preprocessed)
        cases = [(name, severity) for name in errors for severity in effort.severities]
        mean_errors = np.zeros(len(chosen))
        for name, severity in tracked(cases, "measuring robustness", len(cases), unit="corruptions"):

            def corrupted(index: int, name: str = name, severity: int = severity) -> np.ndarray:
                return corrupt(preprocessed[index], name, severity, seed=(seed << 32) + index)

            case_errors = image_errors(list(pool.map(corrupted, range(len(preprocessed)))))
            errors[name][severity] = float(case_errors.mean())
            mean_errors += case_errors / len(cases)
        noise = {}
        for deviation in NOISE:

            def noisy(index: int, deviation: int = deviation) -> np.ndarray:
                added = np.random.default_rng([seed, index, deviation]).normal(0, deviation, preprocessed[index].shape)
                return np.clip(np.rint(preprocessed[index] + added), 0, 255).astype(np.uint8)

            noise[deviation] = float(image_errors(list(pool.map(noisy, range(len(preprocessed))))).mean())
    intervals = mean_interval(np.clip(mean_errors, 0, 1)), mean_interval(clean)
    return Robustness(errors, noise, float(clean.mean()), len(chosen), *intervals)


def spread_subset(samples: Sequence[Sample], count: int | None, seed: int) -> list[Sample]:
    """Choose at most `count` samples, None for all: a random one from each of `count` equal stretches.

    Data sets are sorted by class, so the classes keep their fractions.
    """
    if count is None or count >= len(samples):
        return list(samples)
    edges = np.linspace(0, len(samples), count + 1).astype(int)
    indices = generator(seed, 0, 0, "robustness").integers(edges[:-1], edges[1:])
    return [samples[index] for index in indices]


def _texts(classifier: Classifier, samples: Sequence[Sample]) -> tuple[np.ndarray, ...]:
    """Return the classifier's text inputs (tokens, has_image), which are not corrupted; empty if it reads no texts."""
    if classifier.tokens is None:
        return ()
    return pad_rows([classifier.tokens(s.text)[0] for s in samples]), np.array([s.has_image for s in samples])


def _predicted(
    classifier: Classifier,
    images: Sequence[np.ndarray],
    texts: tuple[np.ndarray, ...],
    *,
    task: str,
    thresholds: Sequence[float],
    temperature: float,
) -> np.ndarray:
    """Return the predicted labels of each image, (N, C) bool."""
    import torch

    device = next(classifier.parameters()).device
    chunks = []
    with torch.inference_mode():
        for start in range(0, len(images), 256):
            batch = torch.from_numpy(np.stack(images[start : start + 256])).permute(0, 3, 1, 2).to(device)
            text_inputs = [torch.from_numpy(values[start : start + 256]).to(device) for values in texts]
            logits = classifier(batch, *text_inputs)
            # The largest logit, as float32 does not distinguish the largest probabilities.
            multilabel = task == "multilabel"
            scores = probabilities(logits, task=task, temperature=temperature) if multilabel else logits
            chunks.append(predicted_labels(scores.cpu().numpy(), task, thresholds))
    return np.concatenate(chunks)


def _errors(predicted: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
    truth = np.zeros_like(predicted)
    for row, sample in zip(truth, samples, strict=True):
        row[[label for label in sample.labels if label >= 0]] = True
    return set_errors(predicted, truth, np.array([sum(label < 0 for label in sample.labels) for sample in samples]))
