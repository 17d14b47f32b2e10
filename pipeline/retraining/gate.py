"""Whether a challenger may take the champion's place: both on one frozen hold-out, each demand with its number."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from refract.models.bundle.bundle import Bundle, BundleError
from refract.pipeline.config.config import ConfigError
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.evaluation import measures
from refract.pipeline.retraining.holdout_size import lowest_gain, rounded, samples_to_decide
from refract.pipeline.retraining.settings import GateConfig

CALIBRATED = 100
"""Samples from which `calibration_error` is judged: on fewer, chance alone puts a perfectly calibrated network above 0.15, on 30 in 7 of
10 cases, on 50 in 3, on 100 in 1 of 50."""

LOST = 3
"""So many right answers that became none at all are no chance, though a test of a class so rare cannot say it."""

TRIES = 50
"""Of a network's time for one sample."""


@dataclass(frozen=True)
class Line:
    """One demand. value: what the challenger has, None where it is not measured; bound: what is asked; passed: None where it is
    unknown, which does not fail; told: in words; needed: the
    holdout size that would decide, None where this one does or none can."""

    name: str
    value: float | None
    bound: float | None
    passed: bool | None
    told: str
    needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """lines: every demand; holdout: the version of what both were measured on; images: how many."""

    lines: tuple[Line, ...]
    holdout: str
    images: int

    @property
    def passed(self) -> bool:
        return all(line.passed is not False for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        lines = [asdict(line) for line in self.lines]
        return {"passed": self.passed, "holdout": self.holdout, "samples": self.images, "lines": lines}

    def text(self) -> str:
        """A table for the terminal and MLflow."""
        width = max(len(line.name) for line in self.lines)
        words = ["unknown" if line.passed is None else "passed" if line.passed else "FAILED" for line in self.lines]
        longest = max(map(len, words))
        return "\n".join(
            f"{word:<{longest}}  {line.name:<{width}}  {line.told}"
            for word, line in zip(words, self.lines, strict=True)
        )


@dataclass(frozen=True)
class Measured:
    """What one bundle answers to the N samples of the hold-out. right: (N,) bool; given: (N, classes) bool, whether a class was answered;
    calibration: the expected error; error: mean under corruptions, None where it is not measured."""

    right: np.ndarray
    given: np.ndarray
    calibration: float
    error: float | None


def gate(config: GateConfig, challenger: Bundle, champion: Bundle | None, manifest: Manifest, holdout: str) -> Verdict:
    """Measure both on the manifest's samples, the frozen hold-out. champion: None on the first night, when what is asked beside it passes.

    A label that a bundle does not know is one that it never gives. BundleError where a bundle cannot answer.
    """
    samples = manifest.samples
    with_errors = config.robustness_loss is not None and all(s.has_image for s in samples)
    new = _measure(challenger, manifest, with_errors)
    old = _measure(champion, manifest, with_errors) if champion is not None else None
    lines = [_labels(challenger, champion), *judge(config, manifest, new, old)]
    lines += _latency(config, _milliseconds(challenger, champion, samples[0]))
    size = sum(f.stat().st_size for f in challenger.path.glob("weights.*")) / 1e6
    lines.append(_limit("size", size, config.size_mb, "MB of weights"))
    return Verdict(tuple(lines), holdout, len(samples))


def judge(config: GateConfig, manifest: Manifest, new: Measured, old: Measured | None) -> list[Line]:
    """What is asked of the answers. old: the champion's, None where there is none."""
    lines = [*_accuracy(config, new, old), *_recalls(config, manifest, new, old)]
    return [*lines, _calibration(config, new), _robustness(config, new, old)]


def _measure(bundle: Bundle, manifest: Manifest, with_errors: bool) -> Measured:
    """In the manifest's labels, as far as the bundle knows them."""
    from refract.pipeline.evaluation.evaluate import probabilities_of, truth_of
    from refract.pipeline.evaluation.robustness import QUICK, measure_robustness
    from refract.pipeline.inference.scoring import preprocess_of

    info, labels = bundle.info, list(manifest.labels)
    several = manifest.task == "multilabel"
    if several != (info.task == "multilabel"):
        raise BundleError(f"{bundle.path}: its task is {info.task}, and the hold-out's {manifest.task}")
    classifier, preprocess = bundle.classifier(), preprocess_of(info)
    own = probabilities_of(classifier, preprocess, manifest.samples, task=info.task, temperature=info.temperature)
    # One column more a label that only the bundle knows: such an answer is wrong, and must not become another one.
    columns = labels + [label for label in info.labels if label not in labels]
    given = np.zeros((len(own), len(columns)), np.float32)
    given[:, [columns.index(label) for label in info.labels]] = own
    truth = truth_of(manifest.samples, manifest.task, len(columns))
    calibration = measures.calibration_error(given, truth, multilabel=several)
    if several:
        floors = dict(zip(info.labels, info.thresholds or [0.5] * len(info.labels), strict=True))
        answers = given >= np.array([floors.get(label, 2.0) for label in columns])
        right = (answers == truth).all(axis=1)
    else:
        answers = given.argmax(1)[:, None] == np.arange(len(columns))
        right = answers[np.arange(len(truth)), truth]
    error = None
    if with_errors:
        place = {label: i for i, label in enumerate(info.labels)}
        # A label that it does not know is out of reach of every answer.
        theirs = [replace(s, labels=tuple(place.get(labels[i], -1) for i in s.labels)) for s in manifest.samples]
        answering: dict[str, Any] = {"task": info.task, "temperature": info.temperature, "thresholds": info.thresholds}
        error = measure_robustness(classifier, preprocess, theirs, QUICK, **answering).mean_error
    return Measured(right, answers[:, : len(labels)], calibration, error)


def _labels(challenger: Bundle, champion: Bundle | None) -> Line:
    lost = [label for label in (champion.info.labels if champion else ()) if label not in challenger.info.labels]
    told = f"lacks {', '.join(lost[:10])}, which the champion knows" if lost else "knows all that the champion knows"
    return Line("labels", float(len(lost)), 0.0, not lost, told)


def _accuracy(config: GateConfig, new: Measured, old: Measured | None) -> list[Line]:
    own = float(new.right.mean())
    lines = [Line("accuracy", own, config.accuracy, own >= config.accuracy, f"{own:.4f}, at least {config.accuracy:g}")]
    if old is None:
        return [*lines, Line("margin", None, config.margin, True, "there is no champion yet")]
    gain, count = measures.paired_difference(new.right, old.right), len(new.right)
    told = f"{gain.value:+.4f} against the champion's {old.right.mean():.4f}, at least {config.margin:+g}"
    lines.append(_sized(Line("margin", gain.value, config.margin, gain.value >= config.margin, told), new, old, gain))
    lowest = lowest_gain(count) if config.lowest_gain is None else config.lowest_gain
    told = f"the gain's 95 % interval {gain.low:+.4f} to {gain.high:+.4f}, lower end at least {lowest:+.3g}"
    if config.lowest_gain is None:
        told += f", from {count:,} samples"
    return [*lines, _sized(Line("interval", gain.low, lowest, gain.low >= lowest, told), new, old, gain)]


def _sized(line: Line, new: Measured, old: Measured, gain: measures.Difference) -> Line:
    """The line with the holdout size that would decide it, where the gain's interval contains the bound."""
    bound, count = float(line.bound or 0.0), len(new.right)
    if not gain.low < bound < gain.high:
        return line
    better, worse = int((new.right & ~old.right).sum()), int((old.right & ~new.right).sum())
    needed = samples_to_decide(better, worse, count, bound)
    if needed is None:
        return replace(line, told=f"{line.told}; {count:,} samples cannot decide it")
    needed = max(needed, count + 1)
    return replace(
        line, needed=needed, told=f"{line.told}; {count:,} samples cannot decide it, about {rounded(needed):,} would"
    )


def _recalls(config: GateConfig, manifest: Manifest, new: Measured, old: Measured | None) -> list[Line]:
    """A line a class that has a floor of its own or fails, and one for all others together."""
    unknown = [label for label in config.recall_of if label not in manifest.labels]
    if unknown:
        raise ConfigError(
            f"gate.recall_of: {unknown[0]!r} is no class of the hold-out; it has {', '.join(manifest.labels)}"
        )
    lines, lowest = [], None
    members = [
        np.array([place in sample.labels for sample in manifest.samples]) for place in range(len(manifest.labels))
    ]
    chance = _chance_of_falling(members, new, old) if old is not None else {}
    for place, (label, has) in enumerate(zip(manifest.labels, members, strict=True)):
        if not has.any():
            lines.append(Line(f"recall {label}", None, None, False, "the hold-out has no sample of it"))
            continue
        floor, own = config.recall_of.get(label, config.recall), new.given[has, place]
        recall, count = float(own.mean()), int(has.sum())
        lowest = recall if lowest is None else min(lowest, recall)
        told, passed = f"{recall:.4f} of {count}, at least {floor:g}", recall >= floor
        if old is not None:
            before = old.given[has, place]
            lost = not own.any() and before.sum() >= LOST
            fell = before.mean() - recall > config.recall_loss and (lost or chance[place] < 0.05)
            passed = passed and not fell
            told += f", the champion's {before.mean():.4f} (p = {chance[place]:.2g} of {len(chance)} classes)"
        if label in config.recall_of or not passed:
            lines.append(Line(f"recall {label}", recall, floor, passed, told))
    if lowest is not None:
        told = f"{lowest:.4f} at the lowest of {len(manifest.labels)} classes"
        lines.append(Line("recall", lowest, config.recall, lowest >= config.recall, told))
    return lines


def _chance_of_falling(members: Sequence[np.ndarray], new: Measured, old: Measured) -> dict[int, float]:
    """class → p of so many of its samples being lost where as many are won on the whole, by the exact one-sided test of the samples that
    only one answers; by Holm for all classes together. McNemar 1947, Holm 1979."""
    from scipy.stats import binomtest

    from refract.pipeline.drift.two_samples import holm

    values = {}
    for place, has in enumerate(members):
        if has.any():
            own, before = new.given[has, place], old.given[has, place]
            lost, differ = int((before & ~own).sum()), int((before ^ own).sum())
            values[place] = float(binomtest(lost, differ, alternative="greater").pvalue) if differ else 1.0
    return dict(zip(values, holm(list(values.values())), strict=True))


def _calibration(config: GateConfig, new: Measured) -> Line:
    line = _limit("calibration_error", new.calibration, config.calibration_error, "expected calibration error")
    if line.passed or len(new.right) >= CALIBRATED:
        return line
    return replace(
        line, passed=True, told=f"{line.told}; not judged on {len(new.right)} samples, fewer than {CALIBRATED}"
    )


def _robustness(config: GateConfig, new: Measured, old: Measured | None) -> Line:
    bound = config.robustness_loss
    if new.error is None:
        return Line("robustness", None, bound, True, "not measured")
    if old is None or old.error is None:
        return Line(
            "robustness", new.error, bound, True, f"{new.error:.4f} wrong under corruptions; there is no champion yet"
        )
    assert bound is not None
    loss = new.error - old.error
    told = f"{new.error:.4f} wrong under corruptions, the champion {old.error:.4f}; at most {bound:g} more"
    return Line("robustness", loss, bound, loss <= bound, told)


def _latency(config: GateConfig, took: Sequence[float]) -> list[Line]:
    """took: ms of the challenger, and of the champion where there is one."""
    lines = [_limit("latency", took[0], config.latency_ms, "ms a sample")]
    if len(took) == 1 or config.latency_ratio is None:
        return lines
    ratio = took[0] / took[1]
    told = f"{ratio:.2f} × the champion's {took[1]:.2f} ms, at most {config.latency_ratio:g} ×"
    return [*lines, Line("latency_ratio", ratio, config.latency_ratio, ratio <= config.latency_ratio, told)]


def _milliseconds(challenger: Bundle, champion: Bundle | None, sample: Sample) -> list[float]:
    """The shortest of TRIES each, in turn: what else the machine does lengthens some, and shortens none."""
    asks = [_asker(bundle, sample) for bundle in (challenger, champion) if bundle is not None]
    shortest = [math.inf] * len(asks)
    for _ in range(TRIES):
        for place, ask in enumerate(asks):
            began = time.perf_counter()
            ask()
            shortest[place] = min(shortest[place], (time.perf_counter() - began) * 1e3)
    return shortest


def _asker(bundle: Bundle, sample: Sample) -> Callable[[], object]:
    """The network, asked about one sample that is prepared already."""
    import torch

    from refract.models.multimodal.tokens import rows
    from refract.pipeline.inference.scoring import preprocess_of

    classifier, preprocess = bundle.classifier(), preprocess_of(bundle.info)
    image = None
    if "images" in classifier.reads:
        image = torch.from_numpy(preprocess(sample.read())).permute(2, 0, 1)[None]
    beside = []
    if classifier.tokens is not None:
        beside = [torch.from_numpy(rows([classifier.tokens(sample.text)[0]])), torch.tensor([sample.has_image])]

    def ask() -> object:
        with torch.inference_mode():
            return classifier(image, *beside)

    return ask


def _limit(name: str, value: float, bound: float | None, unit: str) -> Line:
    if bound is None:
        return Line(name, value, None, True, f"{value:.4g} {unit}; no limit is set")
    return Line(name, value, bound, value <= bound, f"{value:.4g} {unit}, at most {bound:g}")
