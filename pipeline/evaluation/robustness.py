"""How a classifier bears the 19 corruptions of Hendrycks & Dietterich 2019, arXiv:1903.12261, at severities 1 to 5, and plain noise."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from refract.augment import Preprocess
from refract.augment.ops.corruption import CORRUPTIONS, corrupt
from refract.augment.random import generator
from refract.models.classifier import Classifier, probabilities
from refract.models.multimodal.tokens import rows
from refract.models.prediction import given_labels
from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation.measures import mean_interval
from refract.pipeline.evaluation.multilabel import set_errors

NOISE = (4, 8, 16, 32, 64)
"""Standard deviations of Gaussian noise, grey levels of 0…255; the mildest corruption has 20."""


@dataclass(frozen=True)
class Effort:
    """How much is measured. images: at most, None for all; severities: of each corruption."""

    images: int | None
    severities: tuple[int, ...]

    @property
    def passes(self) -> int:
        """Forward passes of each image, one of them untouched."""
        return 1 + len(CORRUPTIONS) * len(self.severities) + len(NOISE)


QUICK = Effort(50, (1, 3, 5))
FULL = Effort(None, (1, 2, 3, 4, 5))
EFFORTS = MappingProxyType({"quick": QUICK, "full": FULL})
"""By their names in the config and on the command line."""


@dataclass(frozen=True)
class Robustness:
    """errors: corruption → severity → share of wrong answers, for multi-label one minus the mean F1 of the images' labels; noise: deviation
    of Gaussian noise → the same; clean: on the same images untouched; images: how many; interval: 95 %, of `mean_error`, over the
    images; clean_interval: of `clean`."""

    errors: dict[str, dict[int, float]]
    noise: dict[int, float]
    clean: float
    images: int
    interval: tuple[float, float]
    clean_interval: tuple[float, float]

    @property
    def mean_error(self) -> float:
        """Over all corruptions and severities alike: the paper's mCE without AlexNet's errors as its unit, which are for ImageNet alone."""
        return float(np.mean([list(own.values()) for own in self.errors.values()]))

    def by_severity(self) -> dict[int, float]:
        """The mean over the corruptions, at severity 0 the clean error."""
        severities = next(iter(self.errors.values()))
        return {0: self.clean} | {s: float(np.mean([own[s] for own in self.errors.values()])) for s in severities}

    def text(self) -> str:
        """The result in a line."""
        (low, high), (clean_low, clean_high) = self.interval, self.clean_interval
        return (
            f"error under corruptions {self.mean_error:.4f} (95 % interval {low:.4f} to {high:.4f}), "
            f"clean {self.clean:.4f} ({clean_low:.4f} to {clean_high:.4f}), on {self.images:,} images"
        )

    def to_dict(self) -> dict[str, Any]:
        errors = {name: {str(severity): value for severity, value in own.items()} for name, own in self.errors.items()}
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
    """Corrupt the preprocessed images and measure how wrong the predictions are, see `Robustness`.

    thresholds, temperature: of a multi-label bundle. A label of -1 is one that the classifier does not know. The chosen images and the
    corruption of each depend on the seed, the image's place and the severity alone.
    """
    from tqdm import tqdm

    chosen = drawn(samples, effort.images, seed)
    errors: dict[str, dict[int, float]] = {name: {} for name in CORRUPTIONS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        preprocessed = list(pool.map(lambda sample: preprocess(sample.read()), chosen))
        texts = _texts(classifier, chosen)

        def measured(images: Sequence[np.ndarray]) -> np.ndarray:
            given = _given(classifier, images, texts, task=task, thresholds=thresholds, temperature=temperature)
            return _errors(given, chosen)

        clean = measured(preprocessed)
        cases = [(name, severity) for name in errors for severity in effort.severities]
        under = np.zeros(len(chosen))
        for name, severity in tqdm(cases, "corrupting", disable=None, leave=False):

            def spoilt(place: int, name: str = name, severity: int = severity) -> np.ndarray:
                return corrupt(preprocessed[place], name, severity, seed=(seed << 32) + place)

            own = measured(list(pool.map(spoilt, range(len(preprocessed)))))
            errors[name][severity] = float(own.mean())
            under += own / len(cases)
        noise = {}
        for deviation in NOISE:

            def noisy(place: int, deviation: int = deviation) -> np.ndarray:
                added = np.random.default_rng([seed, place, deviation]).normal(0, deviation, preprocessed[place].shape)
                return np.clip(np.rint(preprocessed[place] + added), 0, 255).astype(np.uint8)

            noise[deviation] = float(measured(list(pool.map(noisy, range(len(preprocessed))))).mean())
    intervals = mean_interval(np.clip(under, 0, 1)), mean_interval(clean)
    return Robustness(errors, noise, float(clean.mean()), len(chosen), *intervals)


def drawn(samples: Sequence[Sample], count: int | None, seed: int) -> list[Sample]:
    """At most `count` of the samples, None for all: one at random out of each of as many equal stretches. Data sets are sorted by class, so
    that the classes keep their shares."""
    if count is None or count >= len(samples):
        return list(samples)
    edges = np.linspace(0, len(samples), count + 1).astype(int)
    places = generator(seed, 0, 0, "robustness").integers(edges[:-1], edges[1:])
    return [samples[place] for place in places]


def _texts(classifier: Classifier, samples: Sequence[Sample]) -> tuple[np.ndarray, ...]:
    """What a classifier gets beside the images: texts stay as they are."""
    if classifier.tokens is None:
        return ()
    return rows([classifier.tokens(s.text)[0] for s in samples]), np.array([s.has_image for s in samples])


def _given(
    classifier: Classifier,
    images: Sequence[np.ndarray],
    texts: tuple[np.ndarray, ...],
    *,
    task: str,
    thresholds: Sequence[float],
    temperature: float,
) -> np.ndarray:
    """(N, C) bool: the labels that each image is given."""
    import torch

    device = next(classifier.parameters()).device
    found = []
    with torch.inference_mode():
        for begin in range(0, len(images), 256):
            batch = torch.from_numpy(np.stack(images[begin : begin + 256])).permute(0, 3, 1, 2).to(device)
            beside = [torch.from_numpy(own[begin : begin + 256]).to(device) for own in texts]
            logits = classifier(batch, *beside)
            # The largest logit, not the largest probability: float32 does not tell the most confident apart.
            several = task == "multilabel"
            own = probabilities(logits, task=task, temperature=temperature) if several else logits
            found.append(given_labels(own.cpu().numpy(), task, thresholds))
    return np.concatenate(found)


def _errors(given: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
    truth = np.zeros_like(given)
    for row, sample in zip(truth, samples, strict=True):
        row[[label for label in sample.labels if label >= 0]] = True
    return set_errors(given, truth, np.array([sum(label < 0 for label in sample.labels) for sample in samples]))
