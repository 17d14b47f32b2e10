"""What a network that reads texts gets for each sample, as one array: image, text's numbers, what is there. Knows nothing of HTTP."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from refract.augment.preprocess import Preprocess
from refract.models.multimodal.tokens import Tokens

BLANK = 128
"""The grey of an image that is not there; the network does not look at it."""


def joined(images: np.ndarray, texts: Sequence[str], has_image: Sequence[bool], tokens: Tokens) -> np.ndarray:
    """images: uint8 N×H×W×3; texts: N, or none; has_image: N, or none where all have an image. A structured array of N."""
    found = np.zeros(len(images), dtype=_record(images.shape[1:], tokens))
    found["images"], found["has_image"] = images, list(has_image) or True
    for row, text in zip(found, texts, strict=False):
        numbers, cut = tokens(text)
        row["texts"][: len(numbers)], row["cut"] = numbers, cut
    return found


def _record(shape: tuple[int, ...], tokens: Tokens) -> np.dtype:
    return np.dtype([("images", "u1", shape), ("texts", "i4", (tokens.most,)), ("has_image", "?"), ("cut", "?")])


def mirrored(batch: np.ndarray) -> np.ndarray:
    """Each image's mirror image, with the text that it has."""
    if batch.dtype.fields is None:
        return batch[:, :, ::-1]
    found = batch.copy()
    found["images"] = batch["images"][:, :, ::-1]
    return found


def cuts(batch: np.ndarray) -> tuple[bool, ...]:
    """Of each sample, whether its text was too long to be read whole; nothing where no texts are read."""
    return () if batch.dtype.fields is None else tuple(batch["cut"].tolist())


def blank(preprocess: Preprocess) -> np.ndarray:
    """uint8 H×W×3."""
    return np.full((preprocess.height, preprocess.width, 3), BLANK, np.uint8)


def inputs(batch: np.ndarray, device: torch.device, reads: frozenset[str]) -> tuple[Tensor | None, ...]:
    """What `refract.models.classifier.Classifier` takes; copies, as a record's parts lie where no tensor can."""
    if batch.dtype.fields is None:
        return (torch.from_numpy(batch).to(device).permute(0, 3, 1, 2),)
    images = None
    if "images" in reads:
        images = torch.from_numpy(batch["images"].copy()).to(device).permute(0, 3, 1, 2)
    used = np.flatnonzero(batch["texts"].any(axis=0))
    length = int(used[-1]) + 1 if len(used) else 1
    texts = torch.from_numpy(batch["texts"][:, :length].copy()).to(device)
    return images, texts, torch.from_numpy(batch["has_image"].copy()).to(device)
