"""Compute the training features that a bundle keeps: for familiarity and for similar images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from refract.augment import Preprocess
from refract.cores import mapped
from refract.models.classifier import Classifier
from refract.models.familiarity import Familiarity, Reduced, distance_for
from refract.models.training_features import TrainingFeatures
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.files import printable
from refract.pipeline.inference.scoring import SampleInput, Scored, score_outputs
from refract.progress import tracked

if TYPE_CHECKING:
    from refract.pipeline.features.embed import Stored

MOST_TRAINING, MOST_VALIDATION = 2000, 1000
"""The largest numbers of images. 2,000 images with 512 features have 2 MB."""

MOST_BYTES = 4 << 20
"""The largest size of features and thumbnails. If they exceed it, fewer images are kept."""

SIDE, QUALITY = 48, 70
"""The longer side of a thumbnail in pixels, and its JPEG quality: about 1 KB."""


def training_features_of(
    classifier: Classifier,
    preprocess: Preprocess,
    manifest: Manifest,
    *,
    task: str,
    thumbnails: bool = True,
    stored: Stored | None = None,
) -> TrainingFeatures | None:
    """Embed some training and validation images, which a fixed hash of their paths draws. None if no training image can be read.

    Without a validation split the test split takes its place. thumbnails: False keeps none. stored: takes the embeddings from a feature
    store, for a classifier of images alone.
    """
    embed: Callable[[list[Sample]], _Embedded] = partial(_embed, classifier, preprocess, task)
    if stored is not None:
        embed = partial(_from_store, stored)
    embedded = embed(_drawn(manifest.of("train"), MOST_TRAINING))
    if not embedded.samples:
        return None
    features = embedded.features.astype(np.float16)
    shown = embedded.thumbnails if thumbnails else [b""] * len(embedded.samples)
    sizes = features[0].nbytes + np.array([len(data) for data in shown])
    count = max(1, int((sizes.cumsum() <= MOST_BYTES).sum()))
    labels = tuple(sample.labels for sample in embedded.samples[:count])
    training = TrainingFeatures(
        embedded.width,
        features[:count],
        labels,
        np.array([list(embedded.digests[sample.key]) for sample in embedded.samples[:count]], np.uint8),
        tuple(_relative(sample, manifest.source) for sample in embedded.samples[:count]),
        tuple(shown[:count]),
        np.zeros(0, np.float32),
        distance_for(labels),
    )
    held = manifest.of("val") or manifest.of("test")
    validation = embed(_drawn(held, MOST_VALIDATION)).features
    if len(validation):
        distances = Familiarity(training, torch.device("cpu")).distances_of(torch.from_numpy(validation)).numpy()
        training = replace(training, validation=np.sort(distances))
    return training


class _Embedded:
    """The readable samples, the width D of an embedding, the embeddings (N, min(D, WIDEST)), folded and of length 1, thumbnails, and
    SHA-256 by key.

    A network such as a perceptron on pixels has embeddings of 100,000 numbers, so each is folded at once.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.width = 0
        self.features = np.zeros((0, 0), np.float32)
        self.thumbnails: list[bytes] = []
        self.digests: dict[str, bytes] = {}


def _from_store(stored: Stored, samples: Sequence[Sample]) -> _Embedded:
    """Take the embeddings from the store; an image is decoded again for its thumbnail."""
    embedded = _Embedded()
    keys = [
        (sample, key) for sample, key in zip(samples, stored.embedded(samples).keys, strict=True) if key is not None
    ]
    if not keys:
        return embedded
    vectors = stored.store.vectors([key for _, key in keys])
    embedded.width = vectors.shape[1]
    embedded.features = Reduced.on(torch.device("cpu"), embedded.width)(torch.from_numpy(vectors)).numpy()
    embedded.samples = [sample for sample, _ in keys]
    embedded.digests = {sample.key: bytes.fromhex(key.content) for sample, key in keys}
    preprocess = stored.model.preprocess
    embedded.thumbnails = list(mapped(lambda sample: _thumbnail(preprocess(sample.read())), embedded.samples))
    return embedded


def _embed(classifier: Classifier, preprocess: Preprocess, task: str, samples: Sequence[Sample]) -> _Embedded:
    embedded, rows = _Embedded(), []
    reduced: Reduced | None = None

    def read(sample: Sample) -> bytes:
        data = sample.read()
        embedded.digests[sample.key] = hashlib.sha256(data).digest()
        return data

    def keep_thumbnails(module: Classifier, inputs: tuple[Any, ...]) -> None:
        if inputs[0] is not None:
            embedded.thumbnails += map(_thumbnail, inputs[0].permute(0, 2, 3, 1).contiguous().cpu().numpy())

    inputs = [SampleInput(lambda sample=sample: read(sample), sample.text, sample.has_image) for sample in samples]  # type: ignore[misc]
    hook = classifier.register_forward_pre_hook(keep_thumbnails)
    try:
        outcomes = score_outputs(classifier, preprocess, inputs, embed=True, task=task)
        for sample, outcome in zip(
            samples, tracked(outcomes, "computing training features", len(samples), unit="samples"), strict=True
        ):
            if isinstance(outcome, Scored) and outcome.embedding is not None:
                embedded.samples.append(sample)
                if reduced is None:
                    embedded.width = len(outcome.embedding)
                    reduced = Reduced.on(torch.device("cpu"), embedded.width)
                rows.append(reduced(torch.from_numpy(outcome.embedding)[None])[0].numpy())
    finally:
        hook.remove()
    if rows:
        embedded.features = np.stack(rows)
    for sample in embedded.samples:
        embedded.digests.setdefault(sample.key, bytes(32))  # a sample without an image
    shown = embedded.thumbnails or [b""] * len(embedded.samples)
    embedded.thumbnails = [
        data if sample.has_image else b"" for sample, data in zip(embedded.samples, shown, strict=True)
    ]
    finite = np.flatnonzero(np.isfinite(embedded.features).all(axis=1)).tolist()  # others have no distance
    embedded.samples = [embedded.samples[i] for i in finite]
    embedded.thumbnails = [embedded.thumbnails[i] for i in finite]
    embedded.features = embedded.features[finite]
    return embedded


def _thumbnail(image: np.ndarray) -> bytes:
    """Encode an image (H, W, 3), as the network sees it, as a JPEG of at most SIDE pixels a side."""
    scale = min(1.0, SIDE / max(image.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else image
    return bytes(cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])


def _drawn(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Draw at most `most` samples by the hash of their keys, so that the same data gives the same samples in each training."""
    return sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode("utf-8", "surrogateescape")).digest())[
        :most
    ]


def _relative(sample: Sample, source: str) -> str:
    """Return the path relative to the data, or its last two parts, so that the bundle names no folder outside the data."""
    path, base = Path(sample.path), Path(source)
    base = base if base.is_dir() else base.parent
    try:
        shown = path.resolve().relative_to(base.resolve()) if path.is_absolute() else path.relative_to(base)
    except ValueError:
        shown = Path(*path.parts[-2:])
    return printable(shown.as_posix())
