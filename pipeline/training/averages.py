"""Averages of the weights of several runs, and their scores on the validation set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from refract.augment import Preprocess
from refract.augment.random import generator
from refract.models.classifier import Classifier, Inputs, inputs_of
from refract.pipeline.data.datasets import ImageDataset, collate, targets_of
from refract.pipeline.data.manifest import Manifest
from refract.pipeline.evaluation.evaluate import evaluate
from refract.pipeline.training.callbacks.averaging import NORM_IMAGES, recompute_statistics

Weights = Mapping[str, Tensor]


@dataclass
class WeightSum:
    """The sum of the weights of `count` runs, in double precision. Integers, such as counters, are those of the last run."""

    total: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, weights: Weights) -> None:
        self.total, self.count = self._plus(weights), self.count + 1

    def mean_with(self, weights: Weights) -> dict[str, Tensor]:
        """Return the mean over the runs of the sum and one more run, in the dtypes of its weights."""
        return {
            name: (value / (self.count + 1)).to(weights[name].dtype) if value.is_floating_point() else value
            for name, value in self._plus(weights).items()
        }

    def _plus(self, weights: Weights) -> dict[str, Tensor]:
        return {
            name: self.total.get(name, 0) + value.double() if value.is_floating_point() else value
            for name, value in weights.items()
        }


class AverageScorer:
    """Scores averages of runs on the validation set: by the accuracy, for multi-label by the mean average precision."""

    def __init__(
        self, classifier: Classifier, preprocess: Preprocess, manifest: Manifest, *, batch_size: int, seed: int
    ) -> None:
        """classifier: the classifier of one of the runs, in eval mode, on the device; it gets the weights of each average. batch_size: the
        batch size of the training images that recompute the statistics of batch norms."""
        self.classifier, self.preprocess, self.manifest = classifier, preprocess, manifest
        self.metric = "mean_average_precision" if manifest.task == "multilabel" else "accuracy"
        self.norms: tuple[str, ...] = ()
        self._batch_size, self._seed = batch_size, seed

    def recompute_differing(self, runs: Sequence[Weights]) -> None:
        """Recompute from now on the statistics of the batch norms whose statistics differ between the runs. Frozen ones are equal."""
        names = [name for name, module in self.classifier.named_modules() if isinstance(module, _NormBase)]
        first = runs[0]
        self.norms = tuple(
            name
            for name in names
            if (mean := f"{name}.running_mean") in first
            and any(not torch.equal(first[mean], weights[mean]) for weights in runs[1:])
        )

    def score(self, weights: Weights, *, is_average: bool) -> float:
        """Load the weights, of an average also recompute its statistics, and return the score."""
        self.classifier.load_state_dict(weights)
        if is_average and self.norms:
            modules = dict(self.classifier.named_modules())
            chosen: list[Any] = [modules[name].train() for name in self.norms]
            recompute_statistics(self.classifier, chosen, self._training_batches())
            self.classifier.eval()
        options: dict[str, Any] = {"task": self.manifest.task, "labels": self.manifest.labels}
        return evaluate(self.classifier, self.preprocess, self.manifest.of("val"), **options).metrics[self.metric]

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights that were scored last, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.classifier.state_dict().items()}

    def _training_batches(self) -> Iterator[Inputs]:
        """Yield up to NORM_IMAGES training samples, preprocessed and in random order, so that a batch does not have one label only."""
        samples = self.manifest.of("train")
        order = generator(self._seed, 0, 0, "soup").permutation(len(samples))[:NORM_IMAGES]
        chosen = [samples[i] for i in order]
        reads_images, device = "images" in self.classifier.reads, next(self.classifier.parameters()).device
        options: dict[str, Any] = {"tokens": self.classifier.tokens, "reads_images": reads_images}
        images = ImageDataset(chosen, self.preprocess, targets_of(chosen, self.manifest), **options)
        for start in range(0, len(chosen), self._batch_size):
            indices = range(start, min(start + self._batch_size, len(chosen)))
            if start == 0 or len(indices) > 1:  # a batch of one image may have no variance
                batch = collate([images[i] for i in indices])
                yield tuple(None if part is None else part.to(device) for part in inputs_of(batch))
