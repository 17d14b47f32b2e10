"""The profile of data as a classifier sees them, for drift. A bundle contains one of its held-out data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from refract.augment import Preprocess
from refract.augment.image_statistics import ImageStatistics
from refract.models.bundle.info import BundleError
from refract.models.classifier import Classifier
from refract.models.folding import WIDEST, folding
from refract.models.prediction import confidences, predicted_labels
from refract.pipeline.data.manifest import Sample
from refract.pipeline.drift.outputs import from_network, from_store

if TYPE_CHECKING:
    from refract.pipeline.features.embed import Stored

MOST_IMAGES = 1000
"""The largest number of samples in a bundle's profile: with 512 features each it has 1 MB."""

SIZES = ("width", "height", "aspect")
CHARACTERS = "characters"
STATISTICS = (*ImageStatistics._fields, *SIZES, CHARACTERS)
"""In the order of the report."""


@dataclass(frozen=True)
class Profile:
    """count: number of samples; features: (N, D) float32, before the head, None for a server's log; answered: (C,) int64, number of
    predictions of each of the bundle's labels; confidence: (N,) float32, of the predicted label, for multi-label the mean over all labels
    of the confidence in the decision; statistics: name → (N,) float32, NaN without an image; classes: label, also unknown to the bundle →
    number of samples, None without labels; multilabel: whether a sample may have more than one label.
    """

    count: int
    labels: tuple[str, ...]
    features: np.ndarray | None
    answered: np.ndarray
    confidence: np.ndarray
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    classes: Mapping[str, int] | None = None
    multilabel: bool = False

    def to_bytes(self) -> bytes:
        """Encode as safetensors: features in float16, divided by the largest; classes of the bundle only. ValueError without features."""
        from safetensors.numpy import save

        if self.features is None:
            raise ValueError("a bundle's profile needs features, but this one has none")
        scale = float(np.abs(self.features).max(initial=0)) or 1.0
        arrays = {
            "features": (self.features / scale).astype(np.float16),
            "scale": np.array([scale]),
            "answered": self.answered.astype(np.int64),
            "confidence": self.confidence.astype(np.float32),
        }
        arrays |= {f"statistics.{name}": values.astype(np.float32) for name, values in self.statistics.items()}
        if self.classes is not None:
            arrays["classes"] = np.array([self.classes.get(label, 0) for label in self.labels], np.int64)
        return save(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, labels: Sequence[str], *, multilabel: bool) -> "Profile":
        """Decode what `to_bytes` wrote. BundleError for other bytes, or for a profile of other labels."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(data)
            features = arrays["features"].astype(np.float32) * np.float32(arrays["scale"][0])
            answered, confidence = arrays["answered"], arrays["confidence"]
        except (SafetensorError, KeyError, IndexError, ValueError) as error:
            raise BundleError(
                f"the bundle's reference is not a profile ({error}); train again, or add --reference DATA"
            ) from error
        statistics = {n.removeprefix("statistics."): v for n, v in arrays.items() if n.startswith("statistics.")}
        rows = [features, confidence, *statistics.values()]
        counted = [answered, arrays.get("classes", answered)]
        if (
            features.ndim != 2
            or {len(row) for row in rows} != {len(features)}
            or {len(c) for c in counted} != {len(labels)}
        ):
            raise BundleError("the bundle's reference does not fit its labels; train again, or add --reference DATA")
        classes = dict(zip(labels, arrays["classes"].tolist(), strict=True)) if "classes" in arrays else None
        return cls(
            len(features), tuple(labels), features, answered, confidence, statistics, classes, multilabel
        )  # fmt: skip


class ProfiledSamples(NamedTuple):
    """A profile, the readable samples in its order, their (N, C) probabilities, and path → why for the unreadable samples."""

    profile: Profile
    samples: list[Sample]
    probabilities: np.ndarray
    bad: dict[str, str]


def profile(
    classifier: Classifier,
    preprocess: Preprocess,
    samples: Sequence[Sample],
    names: Sequence[Sequence[str]] | None = None,
    *,
    task: str,
    labels: Sequence[str],
    temperature: float = 1.0,
    thresholds: Sequence[float] = (),
    stored: "Stored | None" = None,
) -> ProfiledSamples:
    """Predict all samples, and collect their features and statistics. names: the class names of each sample, None without labels.

    stored: takes the embeddings from a feature store, see `refract.pipeline.drift.outputs.from_store`. Brightness, contrast and sharpness
    are measured on the network's input, after resizing, as only its input matters to a network.
    """
    if stored is None:
        outputs = from_network(classifier, preprocess, samples, task=task, temperature=temperature)
    else:
        outputs = from_store(stored, samples, task=task, temperature=temperature)
    readable, rows = outputs.readable, outputs.probabilities
    probabilities = np.stack(rows) if rows else np.zeros((0, len(labels)), np.float32)
    profiled = [samples[index] for index in readable]
    statistics: dict[str, np.ndarray] = {}
    if "images" in classifier.reads and profiled:
        statistics = _statistics(profiled, outputs.statistics, outputs.sizes)
    if classifier.tokens is not None:
        statistics[CHARACTERS] = np.array([len(s.text) for s in profiled], np.float32)
    classes = None
    if names is not None:
        classes = {**dict.fromkeys(labels, 0), **Counter(name for index in readable for name in names[index])}
    confidence = confidences(probabilities, task, thresholds).astype(np.float32)
    answered = predicted_labels(probabilities, task, thresholds).sum(axis=0)
    head_features = None if outputs.features is None else folded(outputs.features)
    multilabel = task == "multilabel"
    result = Profile(len(profiled), tuple(labels), head_features, answered, confidence, statistics, classes, multilabel)
    return ProfiledSamples(result, profiled, probabilities, outputs.bad)


def folded(features: np.ndarray) -> np.ndarray:
    """(N, D) → (N, at most WIDEST) float32, folded as `refract.models.folding.folding` states."""
    width = features.shape[1]
    if width <= WIDEST:
        return features.astype(np.float32)
    from scipy.sparse import csr_matrix

    sums, signs = folding(width)
    fold = csr_matrix((signs, (np.arange(width), sums)), shape=(width, WIDEST))
    return np.asarray((fold.T @ features.T.astype(np.float32)).T)


def _statistics(
    samples: Sequence[Sample], measured: Sequence[ImageStatistics], sizes: Sequence[tuple[int, int]]
) -> dict[str, np.ndarray]:
    """Return name → (N,) float32, NaN for samples without an image. measured, sizes: one value for each sample, or a placeholder's."""
    has_image = np.array([sample.has_image for sample in samples])
    values = {
        name: np.array(column)
        for name, column in zip(ImageStatistics._fields, zip(*measured, strict=True), strict=True)
    }
    height, width = np.array(sizes, np.float64).T
    values |= dict(zip(SIZES, (width, height, width / np.maximum(height, 1)), strict=True))
    return {name: np.where(has_image, column, np.nan).astype(np.float32) for name, column in values.items()}
