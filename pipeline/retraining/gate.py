"""The promotion gate: compares challenger and champion on one frozen holdout, with a measured value for each check."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from refract.models.bundle.bundle import Bundle, BundleError
from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.retraining_sections import GateConfig
from refract.pipeline.data.manifest import Manifest
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.latency import bundle_call, latencies
from refract.pipeline.retraining.holdout_size import lowest_gain, rounded, samples_to_decide

CALIBRATED = 100
"""The smallest number of samples for `calibration_error`. By chance alone a perfectly calibrated network exceeds 0.15 on 30 samples in 7 of
10 cases, on 50 in 3 of 10, on 100 in 1 of 50."""

LOST = 3
"""If the champion has at least this many correct predictions of a class and the challenger none, the class fails. The exact test
cannot reject chance for so rare a class."""


@dataclass(frozen=True)
class Line:
    """The result of one check.

    value: the challenger's, None if not measured; bound: the config's; passed: None if unknown, which does not fail the gate; summary: the
    result as text; needed: the holdout size that would decide the check, None if this holdout decides it or no size can.
    """

    name: str
    value: float | None
    bound: float | None
    passed: bool | None
    summary: str
    needed: int | None = None


@dataclass(frozen=True)
class OnVersion:
    """The accuracies on one version of the holdout.

    version: its number, None for one of an earlier Refract; decides: whether the gate judges by it; corrections: what later decisions
    changed in it, in words, or empty.
    """

    version: int | None
    holdout: str
    samples: int
    challenger: float
    champion: float | None
    decides: bool
    corrections: str = ""

    def text(self) -> str:
        name = f"holdout version {self.version}" if self.version is not None else f"holdout {self.holdout[:12]}"
        champion = "" if self.champion is None else f", champion {self.champion:.4f}"
        role = "the gate decides by it" if self.decides else f"before the correction of {self.corrections}"
        return f"{name}: challenger {self.challenger:.4f}{champion} of {self.samples:,} samples; {role}"


@dataclass(frozen=True)
class Verdict:
    """lines: all checks; holdout: the version of the holdout that both were measured on; images: its number of samples; versions: the
    accuracies before and after a correction of the holdout's labels, empty without one."""

    lines: tuple[Line, ...]
    holdout: str
    images: int
    versions: tuple[OnVersion, ...] = ()

    @property
    def passed(self) -> bool:
        return all(line.passed is not False for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        lines = [asdict(line) for line in self.lines]
        versions = {"versions": [asdict(version) for version in self.versions]} if self.versions else {}
        return {"passed": self.passed, "holdout": self.holdout, "samples": self.images, "lines": lines, **versions}

    def text(self) -> str:
        """Format the lines as a table for the terminal and MLflow."""
        width = max(len(line.name) for line in self.lines)
        words = ["unknown" if line.passed is None else "passed" if line.passed else "FAILED" for line in self.lines]
        longest = max(map(len, words))
        rows = [
            f"{word:<{longest}}  {line.name:<{width}}  {line.summary}"
            for word, line in zip(words, self.lines, strict=True)
        ]
        return "\n".join([*rows, *(version.text() for version in self.versions)])


@dataclass(frozen=True)
class Measured:
    """Measurements of one bundle on the N samples of the holdout.

    right: (N,) bool, correct samples; given: (N, classes) bool, the predicted classes; calibration: expected calibration error;
    error: mean error under corruptions, None if not measured.
    """

    right: np.ndarray
    given: np.ndarray
    calibration: float
    error: float | None


def gate(config: GateConfig, challenger: Bundle, champion: Bundle | None, manifest: Manifest, holdout: str) -> Verdict:
    """Measure both bundles on the manifest's samples, the frozen holdout, and check them against the config.

    champion: None in the first run; comparisons with it then pass. A bundle never predicts a label that it does not know.
    BundleError if a bundle cannot predict the samples.
    """
    samples = manifest.samples
    with_errors = config.robustness_loss is not None and all(s.has_image for s in samples)
    new = measure(challenger, manifest, with_errors)
    old = measure(champion, manifest, with_errors) if champion is not None else None
    lines = [_labels(challenger, champion), *judge(config, manifest, new, old)]
    calls = [bundle_call(bundle, samples[0]) for bundle in (challenger, champion) if bundle is not None]
    lines += _latency(config, [latency.shortest for latency in latencies(calls)])
    size = sum(f.stat().st_size for f in challenger.path.glob("weights.*")) / 1e6
    lines.append(_limit("size", size, config.size_mb, "MB of weights"))
    return Verdict(tuple(lines), holdout, len(samples))


def judge(config: GateConfig, manifest: Manifest, new: Measured, old: Measured | None) -> list[Line]:
    """Check the predictions. new, old: of challenger and champion; old is None without a champion."""
    lines = [*_accuracy(config, new, old), *_recalls(config, manifest, new, old)]
    return [*lines, _calibration(config, new), _robustness(config, new, old)]


def measure(bundle: Bundle, manifest: Manifest, with_errors: bool = False) -> Measured:
    """Measure a bundle on the manifest's samples, with class indices of the manifest's labels.

    with_errors: also under corruptions. BundleError if the bundle cannot predict the samples.
    """
    from refract.pipeline.evaluation.evaluate import probabilities_of, truth_of
    from refract.pipeline.evaluation.robustness import QUICK, measure_robustness
    from refract.pipeline.inference.scoring import preprocess_of

    info, labels = bundle.info, list(manifest.labels)
    multilabel = manifest.task == "multilabel"
    if multilabel != (info.task == "multilabel"):
        raise BundleError(f"{bundle.path}: its task is {info.task}, but the task of the data is {manifest.task}")
    classifier, preprocess = bundle.classifier(), preprocess_of(info)
    predicted = probabilities_of(classifier, preprocess, manifest.samples, task=info.task, temperature=info.temperature)
    # A column for each label that only the bundle knows: predicting it is wrong, and must not count as another label.
    columns = list(dict.fromkeys((*labels, *info.labels)))
    column_of = {label: index for index, label in enumerate(columns)}
    probabilities = np.zeros((len(predicted), len(columns)), np.float32)
    probabilities[:, [column_of[label] for label in info.labels]] = predicted
    truth = truth_of(manifest.samples, manifest.task, len(columns))
    calibration = measures.calibration_error(probabilities, truth, multilabel=multilabel)
    if multilabel:
        floors = dict(zip(info.labels, info.thresholds or [0.5] * len(info.labels), strict=True))
        given = probabilities >= np.array([floors.get(label, 2.0) for label in columns])
        right = (given == truth).all(axis=1)
    else:
        given = probabilities.argmax(1)[:, None] == np.arange(len(columns))
        right = given[np.arange(len(truth)), truth]
    error = None
    if with_errors:
        index = {label: i for i, label in enumerate(info.labels)}
        # -1, which no prediction equals, for a label that the bundle does not know.
        samples = [replace(s, labels=tuple(index.get(labels[i], -1) for i in s.labels)) for s in manifest.samples]
        error = measure_robustness(
            classifier,
            preprocess,
            samples,
            QUICK,
            task=info.task,
            temperature=info.temperature,
            thresholds=info.thresholds,
        ).mean_error
    return Measured(right, given[:, : len(labels)], calibration, error)


def _labels(challenger: Bundle, champion: Bundle | None) -> Line:
    known = frozenset(challenger.info.labels)
    lost = [label for label in (champion.info.labels if champion else ()) if label not in known]
    summary = f"lacks {', '.join(lost[:10])}, which the champion has" if lost else "has all labels of the champion"
    return Line("labels", float(len(lost)), 0.0, not lost, summary)


def _accuracy(config: GateConfig, new: Measured, old: Measured | None) -> list[Line]:
    accuracy, floor = float(new.right.mean()), config.accuracy
    lines = [Line("accuracy", accuracy, floor, accuracy >= floor, f"{accuracy:.4f}, at least {floor:g}")]
    if old is None:
        return [*lines, Line("margin", None, config.margin, True, "no champion yet")]
    gain, count = measures.paired_difference(new.right, old.right), len(new.right)
    summary = f"{gain.value:+.4f} against the champion's {old.right.mean():.4f}, at least {config.margin:+g}"
    lines.append(
        _sized(Line("margin", gain.value, config.margin, gain.value >= config.margin, summary), new, old, gain)
    )
    lowest = lowest_gain(count) if config.lowest_gain is None else config.lowest_gain
    summary = f"the gain's 95 % interval {gain.low:+.4f} to {gain.high:+.4f}, lower end at least {lowest:+.3g}"
    if config.lowest_gain is None:
        summary += f", from {count:,} samples"
    return [*lines, _sized(Line("interval", gain.low, lowest, gain.low >= lowest, summary), new, old, gain)]


def _sized(line: Line, new: Measured, old: Measured, gain: measures.Difference) -> Line:
    """Add to the line the holdout size that would decide it, if the gain's interval contains the bound."""
    bound, count = float(line.bound or 0.0), len(new.right)
    if not gain.low < bound < gain.high:
        return line
    better, worse = int((new.right & ~old.right).sum()), int((old.right & ~new.right).sum())
    needed = samples_to_decide(better, worse, count, bound)
    if needed is None:
        return replace(line, summary=f"{line.summary}; {count:,} samples cannot decide it")
    needed = max(needed, count + 1)
    return replace(
        line,
        needed=needed,
        summary=f"{line.summary}; {count:,} samples cannot decide it, about {rounded(needed):,} would",
    )


def _recalls(config: GateConfig, manifest: Manifest, new: Measured, old: Measured | None) -> list[Line]:
    """Build a line for each class that has its own floor or fails, and one for the lowest recall of all classes."""
    unknown = [label for label in config.recall_of if label not in manifest.labels]
    if unknown:
        raise ConfigError(
            f"gate.recall_of: {unknown[0]!r} is not a class of the holdout; its classes are {', '.join(manifest.labels)}"
        )
    lines, lowest = [], None
    members = _members(manifest)
    chance = _chance_of_falling(members, new, old) if old is not None else {}
    for index, (label, has) in enumerate(zip(manifest.labels, members, strict=True)):
        if not len(has):
            lines.append(Line(f"recall {label}", None, None, False, "the holdout has no sample of it"))
            continue
        floor, hits = config.recall_of.get(label, config.recall), new.given[has, index]
        recall, count = float(hits.mean()), len(has)
        lowest = recall if lowest is None else min(lowest, recall)
        summary, passed = f"{recall:.4f} of {count}, at least {floor:g}", recall >= floor
        if old is not None:
            before = old.given[has, index]
            lost = not hits.any() and before.sum() >= LOST
            fell = before.mean() - recall > config.recall_loss and (lost or chance[index] < 0.05)
            passed = passed and not fell
            summary += f", the champion's {before.mean():.4f} (p = {chance[index]:.2g} of {len(chance)} classes)"
        if label in config.recall_of or not passed:
            lines.append(Line(f"recall {label}", recall, floor, passed, summary))
    if lowest is not None:
        summary = f"{lowest:.4f} at the lowest of {len(manifest.labels)} classes"
        lines.append(Line("recall", lowest, config.recall, lowest >= config.recall, summary))
    return lines


def _members(manifest: Manifest) -> list[np.ndarray]:
    """Return the indices of the samples of each label."""
    rows: list[list[int]] = [[] for _ in manifest.labels]
    for row, sample in enumerate(manifest.samples):
        for index in sample.labels:
            rows[index].append(row)
    return [np.array(indices, np.int64) for indices in rows]


def _chance_of_falling(members: Sequence[np.ndarray], new: Measured, old: Measured) -> dict[int, float]:
    """Return class index → p of losing so many of its samples if losses and gains were equally probable.

    The test is the exact one-sided one on the samples that only one of the two predicts, corrected by Holm for all classes together.
    Source: McNemar 1947, Holm 1979.
    """
    from scipy.stats import binomtest

    from refract.pipeline.drift.two_samples import holm

    values = {}
    for index, has in enumerate(members):
        if len(has):
            hits, before = new.given[has, index], old.given[has, index]
            lost, differ = int((before & ~hits).sum()), int((before ^ hits).sum())
            values[index] = float(binomtest(lost, differ, alternative="greater").pvalue) if differ else 1.0
    return dict(zip(values, holm(list(values.values())), strict=True))


def _calibration(config: GateConfig, new: Measured) -> Line:
    line = _limit("calibration_error", new.calibration, config.calibration_error, "expected calibration error")
    if line.passed or len(new.right) >= CALIBRATED:
        return line
    return replace(
        line, passed=True, summary=f"{line.summary}; not judged on {len(new.right)} samples, fewer than {CALIBRATED}"
    )


def _robustness(config: GateConfig, new: Measured, old: Measured | None) -> Line:
    bound = config.robustness_loss
    if new.error is None:
        return Line("robustness", None, bound, True, "not measured")
    if old is None or old.error is None:
        return Line("robustness", new.error, bound, True, f"{new.error:.4f} wrong under corruptions; no champion yet")
    assert bound is not None
    loss = new.error - old.error
    summary = f"{new.error:.4f} wrong under corruptions, the champion {old.error:.4f}; at most {bound:g} more"
    return Line("robustness", loss, bound, loss <= bound, summary)


def _latency(config: GateConfig, took: Sequence[float]) -> list[Line]:
    """took: ms of the challenger, then of the champion if there is one."""
    lines = [_limit("latency", took[0], config.latency_ms, "ms a sample")]
    if len(took) == 1 or config.latency_ratio is None:
        return lines
    ratio = took[0] / took[1]
    summary = f"{ratio:.2f} × the champion's {took[1]:.2f} ms, at most {config.latency_ratio:g} ×"
    return [*lines, Line("latency_ratio", ratio, config.latency_ratio, ratio <= config.latency_ratio, summary)]


def _limit(name: str, value: float, bound: float | None, unit: str) -> Line:
    if bound is None:
        return Line(name, value, None, True, f"{value:.4g} {unit}; no limit is set")
    return Line(name, value, bound, value <= bound, f"{value:.4g} {unit}, at most {bound:g}")
