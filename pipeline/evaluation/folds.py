"""Evaluate a training in folds: out-of-fold predictions of every sample, the spread of the metrics over the folds, and the report."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refract.models.bundle.bundle import load_bundle
from refract.models.intervals import LEVEL
from refract.pipeline.config.config import Config
from refract.pipeline.data.prepare import FoldedData
from refract.pipeline.evaluation.custom_metrics import is_fraction
from refract.pipeline.evaluation.evaluate import Evaluation, measured, probabilities_of
from refract.pipeline.evaluation.hierarchy import with_levels
from refract.pipeline.evaluation.report import Report, make_report
from refract.pipeline.files import printable, written_atomically
from refract.pipeline.inference.scoring import preprocess_of

log = logging.getLogger(__name__)

OUT_OF_FOLD = "out_of_fold.parquet"
"""The file of the out-of-fold predictions, in the folder of the folds."""

NEXT_STEP = (
    "The folds estimate the quality; serve none of their bundles. Train one model on the same data with --trainer.folds 0, "
    "and serve that."
)


@dataclass(frozen=True)
class Spread:
    """A metric over the folds: its values, their mean and standard deviation, and the 95 % interval of the mean."""

    values: tuple[float, ...]
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class FoldsAssessment:
    """out_of_fold, test: metric → its spread over the folds; label_errors: paths of samples whose label is likely wrong."""

    out_of_fold: dict[str, Spread]
    test: dict[str, Spread]
    pooled: Evaluation
    label_errors: list[str]
    report: Report


def spread_of(name: str, values: Sequence[float]) -> Spread:
    """Return the spread of a metric over two or more folds.

    The interval is that of the corrected resampled t-test (Nadeau & Bengio 2003, "Inference for the generalization error", Machine Learning
    52): the variance of the mean is s² (1/K + 1/(K − 1)), as the training sets of the folds overlap. Fractions end at 0 and 1.
    """
    from scipy.stats import t

    count, deviation = len(values), float(np.std(values, ddof=1))
    mean = float(np.mean(values))
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * deviation * (1 / count + 1 / (count - 1)) ** 0.5
    low, high = mean - half, mean + half
    if is_fraction(name):
        low, high = max(0.0, low), min(1.0, high)
    return Spread(tuple(map(float, values)), mean, deviation, low, high)


def assess_folds(folder: Path, data: FoldedData, config: Config, device: str) -> FoldsAssessment:
    """Predict each training and validation sample by the model of its fold, write OUT_OF_FOLD, and build the report.

    folder: with the finished runs fold-1, fold-2 … Raises BundleError for a damaged bundle, and DataError for an unreadable image.
    """
    rows, evaluations, test_metrics, thresholds = [], [], [], []
    manifest = data.manifest
    options: dict[str, Any] = {"task": manifest.task, "labels": manifest.labels}
    for fold in range(1, config.trainer.folds + 1):
        bundle = load_bundle(folder / f"fold-{fold}" / "bundle")
        info = bundle.info
        samples = [sample for sample in manifest.samples if data.fold_of.get(sample.key) == fold]
        log.info("predicting the %s samples of fold %d", f"{len(samples):,}", fold)
        probabilities = probabilities_of(
            bundle.classifier(device), preprocess_of(info), samples, task=info.task, temperature=info.temperature
        )
        evaluation = measured(probabilities, samples, thresholds=info.thresholds, **options)
        evaluations.append(with_levels(evaluation, manifest.hierarchy))
        test_metrics.append(info.metrics)
        thresholds.append(info.thresholds)
        rows += [(sample, fold, row) for sample, row in zip(samples, probabilities, strict=True)]
    order = {sample.key: index for index, sample in enumerate(manifest.samples)}
    rows.sort(key=lambda row: order[row[0].key])
    _write_predictions(folder / OUT_OF_FOLD, rows, data)
    samples, probabilities = [row[0] for row in rows], np.stack([row[2] for row in rows])
    mean_thresholds = tuple(np.mean(thresholds, axis=0).tolist())
    pooled = measured(probabilities, samples, thresholds=mean_thresholds, **options)
    pooled = with_levels(pooled, manifest.hierarchy)
    out_of_fold = _spreads([evaluation.metrics for evaluation in evaluations])
    test = _spreads(test_metrics)
    facts = {
        "network": config.model.name,
        "samples": f"{len(samples):,} training and validation samples of {manifest.source}, each predicted by the model of its fold",
        "folds": f"{config.trainer.folds}, seed {config.trainer.seed}",
        "test set": f"{len(manifest.of('test')):,} samples, the same for all folds",
    }
    report = make_report(
        f"Folds {folder.name}", pooled, manifest.labels, facts=facts, precision=config.evaluation.precision, abstain_below=None,
        images=config.evaluation.images, notes=[NEXT_STEP],
        subject=f"The network {config.model.name}, trained in {config.trainer.folds} folds,",
    )  # fmt: skip
    report.numbers["folds"] = {
        "count": config.trainer.folds,
        "out_of_fold": {name: asdict(spread) for name, spread in out_of_fold.items()},
        "test": {name: asdict(spread) for name, spread in test.items()},
    }
    return FoldsAssessment(out_of_fold, test, pooled, report.numbers["likely_label_errors"], report)


def _spreads(metrics: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Return the spreads of the metrics that all folds have: a fold without a label's samples may lack one."""
    names = [name for name in metrics[0] if all(name in row for row in metrics)]
    return {name: spread_of(name, [row[name] for row in metrics]) for name in names}


def _write_predictions(path: Path, rows: Sequence[tuple[Any, int, np.ndarray]], data: FoldedData) -> None:
    """Write one row for each sample: path, text if there are texts, label, probabilities, fold and sha256 of the image or text.

    The metadata of the file has the names of the labels in the order of the probabilities, as JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels, samples = data.manifest.labels, [row[0] for row in rows]
    columns: dict[str, Any] = {"path": pa.array([printable(sample.path) for sample in samples], pa.string())}
    if any(sample.text for sample in samples):
        columns["text"] = pa.array([sample.text for sample in samples], pa.string())
    columns["label"] = pa.array([";".join(labels[i] for i in sample.labels) for sample in samples], pa.string())
    columns["probabilities"] = pa.array([row[2].tolist() for row in rows], pa.list_(pa.float32()))
    columns["fold"] = pa.array([row[1] for row in rows], pa.int32())
    columns["sha256"] = pa.array([data.digests[sample.key] for sample in samples], pa.string())
    about = json.dumps({"labels": list(labels)}, ensure_ascii=False)
    with written_atomically(path) as file:
        pq.write_table(pa.table(columns).replace_schema_metadata({b"refract": about.encode()}), file)
