"""Training images as a bundle keeps them: features, labels, checksums, paths and thumbnails. Independent of networks and servers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from refract.models.bundle.info import BundleError
from refract.models.folding import WIDEST

DISTANCES = ("nearest", "mahalanobis")
"""nearest: to the nearest training image, as in older bundles; mahalanobis: to the nearest mean of a class."""


@dataclass(frozen=True)
class TrainingFeatures:
    """Some of the training images, and the distances of the validation images from them.

    - width: number of features D of an embedding
    - features: (N, min(D, WIDEST)) float16, folded, of length 1
    - labels: label indices of each image
    - sha256: (N, 32) uint8, of the image files
    - paths: the path of each image, relative to the data
    - thumbnails: JPEG of each image as the network saw it, b"" for a sample without an image and for a bundle without thumbnails
    - validation: (M,) float32, distances of the validation images, ascending: see `refract.models.familiarity`
    - distance: how `validation` was measured, a name of DISTANCES
    """

    width: int
    features: np.ndarray
    labels: tuple[tuple[int, ...], ...]
    sha256: np.ndarray
    paths: tuple[str, ...]
    thumbnails: tuple[bytes, ...]
    validation: np.ndarray
    distance: str = "nearest"

    def to_bytes(self) -> bytes:
        """Encode as safetensors."""
        values, ends = _joined([np.array(row, np.int32) for row in self.labels], np.int32)
        pixels, pixel_ends = _joined([np.frombuffer(data, np.uint8) for data in self.thumbnails], np.uint8)
        arrays = {
            "width": np.array([self.width]),
            "features": self.features.astype(np.float16),
            "labels": values,
            "label_ends": ends,
            "sha256": self.sha256.astype(np.uint8),
            "paths": np.frombuffer(json.dumps(self.paths).encode(), np.uint8),
            "thumbnails": pixels,
            "thumbnail_ends": pixel_ends,
            "validation": self.validation.astype(np.float32),
            "distance": np.frombuffer(self.distance.encode(), np.uint8),
        }
        # safetensors writes the memory of an array, in whatever order it is.
        return save({name: np.ascontiguousarray(values) for name, values in arrays.items()})

    @classmethod
    def from_bytes(cls, data: bytes, num_classes: int) -> "TrainingFeatures":
        """Decode what `to_bytes` wrote. BundleError for other bytes, or for labels outside of 0 … num_classes - 1."""
        try:
            arrays = load(data)
            read = cls(
                int(arrays["width"][0]),
                arrays["features"],
                tuple(tuple(row.tolist()) for row in _divided(arrays["labels"], arrays["label_ends"])),
                arrays["sha256"],
                tuple(json.loads(arrays["paths"].tobytes())),
                tuple(row.tobytes() for row in _divided(arrays["thumbnails"], arrays["thumbnail_ends"])),
                arrays["validation"],
                arrays["distance"].tobytes().decode()
                if "distance" in arrays
                else "nearest",  # as older versions measured
            )
        except (SafetensorError, KeyError, IndexError, ValueError, TypeError) as error:
            raise BundleError(f"the bundle's training features are damaged ({error}); train again") from error
        count = len(read.features)
        counts = {len(rows) for rows in (read.labels, read.sha256, read.paths, read.thumbnails)}
        known = all(0 <= index < num_classes for row in read.labels for index in row)
        if counts != {count} or read.features.shape[1:] != (min(read.width, WIDEST),) or not known or not count:
            raise BundleError("the bundle's training features do not fit each other or its labels; train again")
        if read.distance not in DISTANCES:
            raise BundleError(
                f"the bundle's training features have the distance {read.distance!r}; known: {', '.join(DISTANCES)}; update Refract"
            )
        return read


def _joined(rows: Sequence[np.ndarray], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Return (all values in one array, the end of each row)."""
    return np.concatenate([np.zeros(0, dtype), *rows]), np.cumsum([len(row) for row in rows], dtype=np.int64)


def _divided(values: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return np.split(values, ends[:-1])
