"""How a classifier bears the 19 corruptions of Hendrycks & Dietterich 2019, arXiv:1903.12261, at severities 1 to 5, and plain noise."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from augment import Preprocess
from augment.ops.corruption import CORRUPTIONS, corrupt
from models.classifier import Classifier
from models.texts.tokens import rows
from pipeline.data.manifest import Sample

QUICK_PICTURES, QUICK_SEVERITIES = 50, (1, 3, 5)
NOISE = (4, 8, 16, 32, 64)
"""Standard deviations of Gaussian noise, grey levels of 0…255; the mildest corruption has 20."""


@dataclass(frozen=True)
class Robustness:
    """errors: corruption → severity → share of wrong answers; noise: deviation of Gaussian noise → the same; clean: on the same pictures
    untouched; pictures: how many."""

    errors: dict[str, dict[int, float]]
    noise: dict[int, float]
    clean: float
    pictures: int

    @property
    def mean_error(self) -> float:
        """Over all corruptions and severities alike: the paper's mCE without AlexNet's errors as its unit, which are for ImageNet alone."""
        return float(np.mean([list(own.values()) for own in self.errors.values()]))

    def by_severity(self) -> dict[int, float]:
        """The mean over the corruptions, at severity 0 the clean error."""
        severities = next(iter(self.errors.values()))
        return {0: self.clean} | {s: float(np.mean([own[s] for own in self.errors.values()])) for s in severities}

    def to_dict(self) -> dict[str, Any]:
        errors = {name: {str(severity): value for severity, value in own.items()} for name, own in self.errors.items()}
        return {
            "pictures": self.pictures,
            "clean_error": self.clean,
            "mean_corruption_error": self.mean_error,
            "errors": errors,
            "noise": {str(deviation): error for deviation, error in self.noise.items()},
        }


def measure_robustness(
    classifier: Classifier, preprocess: Preprocess, samples: Sequence[Sample], *, quick: bool, seed: int = 0
) -> Robustness:
    """Corrupt the preprocessed pictures and count wrong answers; for one label a picture. quick: QUICK_PICTURES of them, spread over the
    data, at QUICK_SEVERITIES. The corruption of a picture depends on the seed, its place and the severity alone."""
    from tqdm import tqdm

    severities = QUICK_SEVERITIES if quick else (1, 2, 3, 4, 5)
    chosen = samples
    if quick:
        chosen = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, QUICK_PICTURES).astype(int))]
    truth = np.array([sample.labels[0] for sample in chosen])
    errors: dict[str, dict[int, float]] = {name: {} for name in CORRUPTIONS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = list(pool.map(lambda sample: preprocess(sample.read()), chosen))
        texts = _texts(classifier, chosen)
        clean = _error(classifier, pictures, truth, texts)
        cases = [(name, severity) for name in errors for severity in severities]
        for name, severity in tqdm(cases, "corrupting", disable=None, leave=False):

            def spoilt(place: int, name: str = name, severity: int = severity) -> np.ndarray:
                return corrupt(pictures[place], name, severity, seed=(seed << 32) + place)

            errors[name][severity] = _error(classifier, list(pool.map(spoilt, range(len(pictures)))), truth, texts)
        noise = {}
        for deviation in NOISE:

            def noisy(place: int, deviation: int = deviation) -> np.ndarray:
                drawn = np.random.default_rng([seed, place, deviation]).normal(0, deviation, pictures[place].shape)
                return np.clip(np.rint(pictures[place] + drawn), 0, 255).astype(np.uint8)

            noise[deviation] = _error(classifier, list(pool.map(noisy, range(len(pictures)))), truth, texts)
    return Robustness(errors, noise, clean, len(chosen))


def _texts(classifier: Classifier, samples: Sequence[Sample]) -> tuple[np.ndarray, ...]:
    """What a classifier gets beside the pictures: texts stay as they are."""
    if classifier.tokens is None:
        return ()
    return rows([classifier.tokens(s.text)[0] for s in samples]), np.array([s.pictured for s in samples])


def _error(
    classifier: Classifier, pictures: Sequence[np.ndarray], truth: np.ndarray, texts: tuple[np.ndarray, ...]
) -> float:
    import torch

    device = next(classifier.parameters()).device
    wrong = 0
    with torch.inference_mode():
        for begin in range(0, len(pictures), 256):
            batch = torch.from_numpy(np.stack(pictures[begin : begin + 256])).permute(0, 3, 1, 2).to(device)
            beside = [torch.from_numpy(own[begin : begin + 256]).to(device) for own in texts]
            wrong += int((classifier(batch, *beside).argmax(1).cpu().numpy() != truth[begin : begin + 256]).sum())
    return wrong / len(pictures)
