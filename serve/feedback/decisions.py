"""What is stored of one prediction, and of the true labels that feedback gives it: a class index, or a bit for each label."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from refract.models.bundle.info import BundleInfo

ROWS = 4096
"""Rows whose bits are unpacked at a time, so that many labels need little memory."""


class Scores(NamedTuple):
    """Judged predictions compared with their true labels.

    - correct: (N,) bool, whether exactly the true labels were predicted
    - right: (N,) the fraction of the decisions that are right; for multi-label one decision for each label
    - class_judged: (C,) predictions whose true labels contain the class
    - class_hits: (C,) those of them whose predicted labels contain it
    """

    correct: np.ndarray
    right: np.ndarray
    class_judged: np.ndarray
    class_hits: np.ndarray


class Decisions(Protocol):
    """Encodes decisions of one task as fixed-size values. format: of `struct`; dtype: the same of NumPy; none: a value without labels."""

    format: str
    dtype: Any
    none: Any

    def decide(self, info: BundleInfo, row: np.ndarray) -> tuple[Any, float]:
        """Return the encoded decision and its confidence. row: (C,) probabilities."""

    def encode(self, indices: Sequence[int]) -> Any:
        """Return the encoded labels."""

    def indices(self, value: Any) -> list[int]:
        """Return the labels of an element of an array of `dtype`."""

    def compare(self, predicted: np.ndarray, truth: np.ndarray) -> Scores:
        """Compare N predictions with their true labels; both are arrays of `dtype`."""


class SingleLabel:
    """One of `count` labels."""

    format, dtype, none = "i", "<i4", -1

    def __init__(self, count: int) -> None:
        self._count = count

    def decide(self, info: BundleInfo, row: np.ndarray) -> tuple[int, float]:
        index = int(row.argmax())
        return index, float(row[index])

    def encode(self, indices: Sequence[int]) -> int:
        (index,) = indices
        return index

    def indices(self, value: Any) -> list[int]:
        return [int(value)]

    def compare(self, predicted: np.ndarray, truth: np.ndarray) -> Scores:
        correct = predicted == truth
        hits = np.bincount(truth[correct], minlength=self._count)
        return Scores(correct, correct.astype(np.float64), np.bincount(truth, minlength=self._count), hits)


class MultiLabel:
    """Any of `count` labels."""

    def __init__(self, count: int) -> None:
        size = (count + 7) // 8
        self._thresholds: tuple[tuple[float, ...], np.ndarray] = (), np.empty(0, np.float32)
        self._count, self.none = count, bytes(size)
        self.format, self.dtype = f"{size}s", ("u1", (size,))

    def decide(self, info: BundleInfo, row: np.ndarray) -> tuple[bytes, float]:
        # As `predicted_labels` and `confidences` do, in a tenth of their time: every prediction comes here.
        if self._thresholds[0] is not info.thresholds:
            self._thresholds = info.thresholds, np.asarray(info.thresholds, np.float32)
        chosen = row >= self._thresholds[1]
        return np.packbits(chosen).tobytes(), float(np.abs(row - ~chosen).sum()) / self._count

    def encode(self, indices: Sequence[int]) -> bytes:
        chosen = np.zeros(self._count, bool)
        chosen[list(indices)] = True
        return np.packbits(chosen).tobytes()

    def indices(self, value: Any) -> list[int]:
        indices: list[int] = np.flatnonzero(np.unpackbits(value, count=self._count)).tolist()
        return indices

    def compare(self, predicted: np.ndarray, truth: np.ndarray) -> Scores:
        right = np.empty(len(truth))
        judged, hits = np.zeros(self._count, np.int64), np.zeros(self._count, np.int64)
        for start in range(0, len(truth), ROWS):
            rows = slice(start, start + ROWS)
            given, true = (np.unpackbits(part[rows], axis=1, count=self._count) for part in (predicted, truth))
            right[rows] = (given == true).mean(axis=1)
            judged += true.sum(axis=0, dtype=np.int64)
            hits += (given & true).sum(axis=0, dtype=np.int64)
        return Scores((predicted == truth).all(axis=1), right, judged, hits)


def decisions_of(info: BundleInfo) -> Decisions:
    """Return the encoding for the task of a bundle."""
    count = len(info.labels)
    return MultiLabel(count) if info.task == "multilabel" else SingleLabel(count)
