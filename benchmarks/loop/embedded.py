"""A data set with a train and a test split as embeddings of tf_efficientnet_lite0 with ImageNet weights."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from benchmarks.pretrained import NAME, lite0_weights
from refract.pipeline.data.manifest import Sample
from refract.pipeline.features.embed import Options, embed, source_name
from refract.pipeline.features.heads import Part, fit_candidate, fit_head, outputs
from refract.pipeline.features.model import open_model
from refract.pipeline.features.source import samples_of
from refract.pipeline.features.store import FeatureStore
from refract.pipeline.stopping import Stop


class Split(NamedTuple):
    """samples; contents: SHA-256 of each; vectors: float32 (N, D); truth: (N,) class indices."""

    samples: list[Sample]
    contents: list[str]
    vectors: np.ndarray
    truth: np.ndarray


def embedded(data: Path, store_folder: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Return (labels, train, test). Embeddings that the store has are not computed again."""
    samples, names = samples_of(str(data))
    labels = tuple(sorted({row[0] for row in names}))
    with TemporaryDirectory() as folder:
        model = open_model(NAME, str(lite0_weights(Path(folder) / "lite0.safetensors")))
        store = FeatureStore(store_folder, model.key, model.record)
        keys = embed(model, samples, names, store, source_name(str(data)), Options(device="cpu"), Stop("at once")).keys
    splits = []
    for split in ("train", "test"):
        rows = [
            row for row, (sample, key) in enumerate(zip(samples, keys, strict=True)) if key and sample.split == split
        ]
        chosen = [keys[row] for row in rows]
        truth = np.array([labels.index(names[row][0]) for row in rows])
        contents = [key.content for key in chosen if key]
        splits.append(Split([samples[row] for row in rows], contents, store.vectors([k for k in chosen if k]), truth))
    return labels, splits[0], splits[1]


def part(vectors: np.ndarray, labels: np.ndarray, classes: int) -> Part:
    return Part(vectors, np.eye(classes, dtype=bool)[labels])


def chosen(train: Part, seed: int) -> str:
    """Return the regularisation of the probe that a fifth of the samples chooses."""
    order = np.random.default_rng(seed).permutation(len(train.features))
    cut = len(order) // 5
    fitted = (Part(train.features[rows], train.targets[rows]) for rows in (order[cut:], order[:cut]))
    return fit_head("probe", *fitted, multilabel=False).choice


def accuracy(train: Part, test: Split, choice: str) -> float:
    """Return the accuracy on the test split of a probe that is fitted on `train`."""
    head = fit_candidate("probe", choice, train, multilabel=False)
    return float((outputs(head, test.vectors).argmax(dim=1).numpy() == test.truth).mean())
