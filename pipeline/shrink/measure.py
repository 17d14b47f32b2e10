"""Measure the classifiers of a shrink: predictions on the test set, size of the files, latency of one image."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refract.models.bundle.bundle import Bundle, load_bundle
from refract.models.prediction import predicted_labels
from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation.evaluate import probabilities_of, truth_of
from refract.pipeline.evaluation.latency import Latency, bundle_call, latencies
from refract.pipeline.evaluation.measures import paired_difference
from refract.pipeline.export.export import DESCRIPTION
from refract.pipeline.export.int8 import prepared, prepared_batches
from refract.pipeline.export.target import Run, Target
from refract.pipeline.inference.scoring import preprocess_of
from refract.pipeline.shrink.table import Row


@dataclass(frozen=True)
class Contender:
    """A classifier to measure: a bundle, or an export of it in 8-bit integers by `target`."""

    name: str
    bundle: Bundle
    target: Target | None = None
    export: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the bundle or the export."""
        return self.bundle.path if self.export is None else self.export

    @property
    def precision(self) -> str:
        return "float32" if self.target is None else "int8"

    @property
    def runtime(self) -> str:
        return "pytorch" if self.target is None else self.target.name

    def megabytes(self) -> float:
        """Return the size of the network's files in MB."""
        pattern = "weights.*" if self.target is None else f"{Path(self.target.model).stem}.*"
        return sum(file.stat().st_size for file in self.folder.glob(pattern)) / 1e6

    def run(self) -> Run:
        """Open the export with its own runtime."""
        assert self.target is not None
        return self.target.run(self.folder, json.loads((self.folder / DESCRIPTION).read_text("utf-8")))

    def predicted(self, samples: Sequence[Sample], device: str) -> np.ndarray:
        """Return the predicted labels, bool (N, C). device: of a bundle; exports compute on the CPU. DataError for an unreadable image."""
        info, task = self.bundle.info, self.bundle.info.task
        if self.target is None:
            classifier = self.bundle.classifier(device)
            rows = probabilities_of(classifier, preprocess_of(info), samples, task=task, temperature=info.temperature)
        else:
            run = self.run()
            rows = np.concatenate([run(batch)[0] for batch in prepared_batches(preprocess_of(info), samples)])
        return predicted_labels(rows, task, info.thresholds)

    def call(self, sample: Sample) -> Callable[[], object]:
        """Return a call of the network on one preprocessed sample, on the CPU."""
        if self.target is None:
            return bundle_call(self.bundle, sample)
        run, image = self.run(), prepared(preprocess_of(self.bundle.info), sample)[None]
        return lambda: run(image)


def measure(contenders: Sequence[Contender], samples: Sequence[Sample], device: str, folder: Path) -> list[Row]:
    """Measure the contenders, of which the first is the original, on the samples. device: see `Contender.predicted`; folder: of the shrink.

    The latencies are measured last, together, with nothing else running.
    """
    info = contenders[0].bundle.info
    truth = truth_of(samples, info.task, len(info.labels))
    wanted = truth if truth.ndim == 2 else truth[:, None] == np.arange(len(info.labels))
    predictions = [contender.predicted(samples, device) for contender in contenders]
    right = [(predicted == wanted).all(axis=1) for predicted in predictions]
    agreements = [float((predicted == predictions[0]).all(axis=1).mean()) for predicted in predictions]
    took = latencies([contender.call(samples[0]) for contender in contenders])
    return [
        _row(contender, mine, right[0], agreement, latency, folder)
        for contender, mine, agreement, latency in zip(contenders, right, agreements, took, strict=True)
    ]


def contender(name: str, bundle: Path | Bundle, target: Target | None = None, export: Path | None = None) -> Contender:
    """Build a contender; the bundle may be given by its folder. BundleError for a damaged one."""
    return Contender(name, load_bundle(bundle) if isinstance(bundle, Path) else bundle, target, export)


def _row(
    contender: Contender, right: np.ndarray, original: np.ndarray, agreement: float, latency: Latency, folder: Path
) -> Row:
    network, difference = contender.bundle.info.network, paired_difference(right, original)
    path = contender.folder
    return Row(
        name=contender.name,
        network=network["name"],
        image_size=tuple(network["image_size"]),
        precision=contender.precision,
        runtime=contender.runtime,
        folder=str(path.relative_to(folder) if path.is_relative_to(folder) else path.resolve()),
        accuracy=float(right.mean()),
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        p_value=difference.p_value,
        agreement=agreement,
        megabytes=contender.megabytes(),
        shortest_ms=latency.shortest,
        median_ms=latency.median,
    )
