"""What drift compares of each sample: probabilities, features before the head, and image statistics.

Two sources: one pass of the network, or the feature store, which computes only the embeddings that it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from refract.augment import ImageError, Preprocess, image_size
from refract.augment.image_statistics import ImageStatistics, measure_image
from refract.cores import mapped
from refract.models.classifier import Classifier, probabilities
from refract.models.head import head_inputs, logits_of_embeddings
from refract.pipeline.data.manifest import Sample
from refract.pipeline.inference.scoring import SampleInput, Scored, score, score_outputs
from refract.progress import tracked

if TYPE_CHECKING:
    from refract.pipeline.features.embed import Stored
    from refract.pipeline.features.model import EmbeddingModel


@dataclass
class Outputs:
    """The readable samples, in order. readable: their indices; probabilities: (C,) of each; features: (N, D) float32, None without
    samples; statistics, sizes: of each image as (height, width), empty for a network that reads no images; bad: path → why unreadable.
    """

    readable: list[int] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    features: np.ndarray | None = None
    statistics: list[ImageStatistics] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def from_network(
    classifier: Classifier, preprocess: Preprocess, samples: Sequence[Sample], *, task: str, temperature: float
) -> Outputs:
    """Predict all samples in one pass, and collect their features and statistics from it."""
    outputs = Outputs()
    sizes: dict[int, tuple[int, int]] = {}
    has_image = "images" in classifier.reads

    def read(index: int) -> bytes:
        data = samples[index].read()
        sizes[index] = image_size(data)
        return data

    def measure_inputs(module: Classifier, inputs: tuple[Any, ...]) -> None:
        if has_image:
            images = inputs[0].permute(0, 2, 3, 1).contiguous().cpu().numpy()
            outputs.statistics.extend(measure_image(image) for image in images)

    inputs = [SampleInput(partial(read, i), s.text, s.has_image) for i, s in enumerate(samples)]
    hook = classifier.register_forward_pre_hook(measure_inputs)
    try:
        with head_inputs(classifier.network) as features:
            outcomes = score(classifier, preprocess, inputs, task=task, temperature=temperature)
            for index, outcome in enumerate(tracked(outcomes, "computing features", len(samples), unit="samples")):
                if isinstance(outcome, np.ndarray):
                    outputs.readable.append(index)
                    outputs.probabilities.append(outcome)
                else:
                    outputs.bad[samples[index].path] = str(outcome)
    finally:
        hook.remove()
    outputs.features = np.concatenate([part.numpy() for part in features]) if features else None
    outputs.sizes = [sizes.get(index, (0, 0)) for index in outputs.readable] if has_image else []
    return outputs


def from_store(stored: Stored, samples: Sequence[Sample], *, task: str, temperature: float) -> Outputs:
    """Take the embeddings from the store, which first computes those that it lacks, and predict from them by the head.

    The embeddings are rounded to float16 in any case, so that a second call returns the same. An image is decoded again for its statistics.
    Requires `stored_outputs_suffice`.
    """
    model, store = stored.model, stored.store
    embedded = stored.embedded(samples)
    outputs = Outputs(bad=dict(embedded.failed))
    has_image = "images" in model.classifier.reads
    measured = mapped(partial(_measured, model.preprocess), samples if has_image else ())
    keys = []
    for index, key in enumerate(tracked(iter(embedded.keys), "measuring images", len(samples), unit="samples")):
        image = next(measured, None)
        if key is None or isinstance(image, Exception):
            outputs.bad.setdefault(samples[index].path, str(image))
            continue
        outputs.readable.append(index)
        keys.append(key)
        if image is not None:
            outputs.statistics.append(image[0])
            outputs.sizes.append(image[1])
    if keys:
        outputs.features = store.vectors(keys)
        logits = logits_of_embeddings(model.classifier.network, torch.from_numpy(outputs.features))
        outputs.probabilities = list(probabilities(logits, task=task, temperature=temperature).cpu().numpy())
    return outputs


def _measured(preprocess: Preprocess, sample: Sample) -> tuple[ImageStatistics, tuple[int, int]] | ImageError | OSError:
    """Return the statistics of the network's input and the size of the file's image, of a placeholder without an image."""
    if not sample.has_image:
        return ImageStatistics(0.0, 0.0, 0.0), (0, 0)
    try:
        data = sample.read()
        return measure_image(preprocess(data)), image_size(data)
    except (ImageError, OSError) as error:
        return error


def stored_outputs_suffice(model: EmbeddingModel) -> bool:
    """Whether the network's logits are those of its head on the embedding. Two random images, with a text each, are compared."""
    classifier, rng = model.classifier, np.random.default_rng(0)
    images = [cv2.imencode(".png", rng.integers(0, 256, (64, 64, 3), np.uint8))[1].tobytes() for _ in range(2)]
    inputs = [SampleInput(partial(bytes, image), f"sample {number}") for number, image in enumerate(images)]
    logits: list[torch.Tensor] = []
    hook = classifier.register_forward_hook(lambda module, inputs, output: logits.append(output.float().cpu()))
    try:
        outcomes = score_outputs(classifier, model.preprocess, inputs, embed=True, task="multilabel", threads=1)
        vectors = [row.embedding for row in outcomes if isinstance(row, Scored) and row.embedding is not None]
    finally:
        hook.remove()
    try:
        alone = logits_of_embeddings(classifier.network, torch.from_numpy(np.stack(vectors)))
    except (RuntimeError, IndexError):  # the head takes the positions of a map, or the embedding is the logits
        return False
    expected = torch.cat(logits)
    return alone.shape == expected.shape and torch.allclose(
        alone.cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )
