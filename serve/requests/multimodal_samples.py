"""Pack image, token ids and presence flags of each sample into one structured array, for networks that read texts. Independent of HTTP."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from refract.augment.preprocess import Preprocess
from refract.models.multimodal.tokens import Tokens

BLANK = 128
"""Grey value of the placeholder for a missing image. The network ignores it."""


def joined(images: np.ndarray, texts: Sequence[str], has_image: Sequence[bool], tokens: Tokens) -> np.ndarray:
    """Return a structured array of N samples. images: uint8 N×H×W×3; texts: N, or empty; has_image: N, or empty if all have an image."""
    samples = np.zeros(len(images), dtype=_record(images.shape[1:], tokens))
    samples["images"], samples["has_image"] = images, list(has_image) or True
    for row, text in zip(samples, texts, strict=False):
        ids, cut = tokens(text)
        row["texts"][: len(ids)], row["cut"] = ids, cut
    return samples


def _record(shape: tuple[int, ...], tokens: Tokens) -> np.dtype:
    return np.dtype([("images", "u1", shape), ("texts", "i4", (tokens.max_numbers,)), ("has_image", "?"), ("cut", "?")])


def flipped(batch: np.ndarray) -> np.ndarray:
    """Flip each image horizontally; texts stay the same."""
    if batch.dtype.fields is None:
        return batch[:, :, ::-1]
    samples = batch.copy()
    samples["images"] = batch["images"][:, :, ::-1]
    return samples


def cuts(batch: np.ndarray) -> tuple[bool, ...]:
    """Return whether each sample's text was truncated; empty if the model reads no texts."""
    return () if batch.dtype.fields is None else tuple(batch["cut"].tolist())


def blank(preprocess: Preprocess) -> np.ndarray:
    """Return the placeholder for a missing image, uint8 H×W×3."""
    return np.full((preprocess.height, preprocess.width, 3), BLANK, np.uint8)


def inputs(batch: np.ndarray, device: torch.device, reads: frozenset[str]) -> tuple[Tensor | None, ...]:
    """Return the arguments of `refract.models.classifier.Classifier` on the device. Record fields are copied: a tensor cannot use their
    memory layout."""
    if batch.dtype.fields is None:
        return (torch.from_numpy(batch).to(device).permute(0, 3, 1, 2),)
    images = None
    if "images" in reads:
        images = torch.from_numpy(batch["images"].copy()).to(device).permute(0, 3, 1, 2)
    used = np.flatnonzero(batch["texts"].any(axis=0))
    length = int(used[-1]) + 1 if len(used) else 1
    texts = torch.from_numpy(batch["texts"][:, :length].copy()).to(device)
    return images, texts, torch.from_numpy(batch["has_image"].copy()).to(device)
