"""The outputs of a forward pass as one structured array, so that a batch is copied and divided like any other array."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def packed(probabilities: Tensor, logits: Tensor, embedding: Tensor) -> Tensor:
    """Concatenate the outputs of N samples into one float32 tensor, for one copy from the device: see `unpacked`."""
    return torch.cat([probabilities, logits, embedding.float()], dim=1)


def unpacked(rows: np.ndarray, num_classes: int) -> np.ndarray:
    """View the array of a `packed` tensor as N records with the float32 fields `probabilities` (C,), `logits` (C,) and `embedding` (D,)."""
    record = _record(num_classes, rows.shape[1] - 2 * num_classes)
    return np.ascontiguousarray(rows).view(record)[:, 0]


@lru_cache(maxsize=16)
def _record(num_classes: int, width: int) -> np.dtype:
    return np.dtype(
        [("probabilities", "f4", (num_classes,)), ("logits", "f4", (num_classes,)), ("embedding", "f4", (width,))]
    )
