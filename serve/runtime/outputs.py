"""The outputs of a forward pass as one structured array, so that a batch is copied and divided like any other array."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def packed(probabilities: Tensor, logits: Tensor, embedding: Tensor, familiarity: Tensor) -> Tensor:
    """Concatenate the outputs of N samples into one float32 tensor, for one copy from the device: see `unpacked`."""
    return torch.cat([probabilities, logits, embedding.float(), familiarity[:, None]], dim=1)


def unpacked(rows: np.ndarray, num_classes: int) -> np.ndarray:
    """View the array of a `packed` tensor as N records of float32 with the fields `probabilities` (C,), `logits` (C,), `embedding` (D,),
    and `familiarity`, in 0…1 or NaN, see `refract.models.familiarity`."""
    record = _record(num_classes, rows.shape[1] - 2 * num_classes - 1)
    return np.ascontiguousarray(rows).view(record)[:, 0]


@lru_cache(maxsize=16)
def _record(num_classes: int, width: int) -> np.dtype:
    sizes = {"probabilities": (num_classes,), "logits": (num_classes,), "embedding": (width,), "familiarity": ()}
    return np.dtype([(name, "f4", shape) for name, shape in sizes.items()])
