"""The confusion matrix of single-label predictions, as its non-zero cells: ten thousand classes have a hundred million cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DENSE = 100
"""Classes up to which reports have the whole matrix. Reports of more classes list the non-zero cells."""


@dataclass(frozen=True)
class Confusion:
    """classes: number of classes; truth, predicted, counts: (K,) class indices and number of samples of each non-zero cell, by rows."""

    classes: int
    truth: np.ndarray
    predicted: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, predicted: np.ndarray, classes: int) -> "Confusion":
        """Count the cells. truth, predicted: (N,) class indices."""
        cells, counts = np.unique(truth.astype(np.int64) * classes + predicted, return_counts=True)
        return cls(classes, cells // classes, cells % classes, counts)

    @property
    def matrix(self) -> np.ndarray:
        """(C, C) counts: rows are true classes, columns predicted ones."""
        matrix = np.zeros((self.classes, self.classes), np.int64)
        matrix[self.truth, self.predicted] = self.counts
        return matrix

    def most_frequent_errors(self, count: int) -> list[tuple[int, int, int]]:
        """Return (true class, predicted class, number of samples) of the most frequent errors, the most frequent first."""
        errors = np.flatnonzero(self.truth != self.predicted)
        first = errors[np.argsort(-self.counts[errors], kind="stable")[:count]]
        columns = (self.truth, self.predicted, self.counts)
        return list(zip(*(column[first].tolist() for column in columns), strict=True))

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return `confusion`, the whole matrix, up to DENSE classes; else `confusion_cells`: [true label, predicted label, count] of each
        non-zero cell."""
        if self.classes <= DENSE:
            return {"confusion": self.matrix.tolist()}
        cells = zip(self.truth.tolist(), self.predicted.tolist(), self.counts.tolist(), strict=True)
        return {"confusion_cells": [[labels[true], labels[predicted], count] for true, predicted, count in cells]}
