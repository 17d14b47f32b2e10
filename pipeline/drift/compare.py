"""Compare two profiles: what differs, by how much, and whether by more than chance. Pure functions of arrays."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from refract.pipeline.drift import two_samples
from refract.pipeline.drift.profile import STATISTICS, Profile
from refract.pipeline.drift.thresholds import ALPHA, FEWEST, LEVELS, THRESHOLDS, Threshold
from refract.pipeline.drift.two_samples import Found

NEIGHBOUR = 5
"""An image's distance to the reference is the distance to its fifth nearest neighbour there."""

TESTS = {"mmd": ("features", "MMD²"), "classifier": ("classifier", "distinguished")}


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    value: the distance; chance: the distance that chance alone causes; p: adjusted by Holm over all checks, None without a test; level:
    one of LEVELS.
    """

    name: str
    measure: str
    value: float
    chance: float
    p: float | None
    threshold: Threshold
    level: str

    @property
    def effect(self) -> float:
        return max(0.0, self.value - self.chance)


@dataclass(frozen=True)
class Drift:
    """checks: in a fixed order; new_classes: label missing in the reference → count; vanished: label missing in the new data → count in
    the reference; distances: (N,) distance of each new image to the reference, None without features; usual: the 99 % quantile of the
    reference's own distances.
    """

    checks: tuple[Check, ...]
    reference_count: int
    count: int
    new_classes: Mapping[str, int] = field(default_factory=dict)
    vanished: Mapping[str, int] = field(default_factory=dict)
    distances: np.ndarray | None = None
    usual: float | None = None

    @property
    def level(self) -> str:
        """The worst level of all checks."""
        return max((check.level for check in self.checks), key=LEVELS.index, default="none")

    @property
    def far(self) -> float | None:
        """The fraction of the new images that are farther than `usual`; about 0.01 without drift."""
        return None if self.distances is None else float((self.distances > self.usual).mean())

    def furthest(self, count: int) -> list[int]:
        """Return the indices of the new images that are farthest from the reference."""
        return [] if self.distances is None else np.argsort(-self.distances, kind="stable")[:count].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the distances."""
        checks = [{**asdict(c), "threshold": c.threshold._asdict(), "effect": c.effect} for c in self.checks]
        values: dict[str, Any] = {"level": self.level, "alpha": ALPHA}
        values |= {"reference": self.reference_count, "images": self.count, "checks": checks}
        return values | {"new_classes": dict(self.new_classes), "vanished": dict(self.vanished), "far": self.far}


def compare(
    reference: Profile,
    new: Profile,
    *,
    test: str = "mmd",
    thresholds: Mapping[str, Threshold] = THRESHOLDS,
    seed: int = 0,
) -> Drift:
    """Compare two profiles of one bundle. test: one of TESTS, for the features; thresholds: one for each check.

    A check warns, or stops, if its effect reaches the threshold and its p-value, by Holm over all checks, is at most ALPHA. Data that
    one profile lacks, such as labels, are not compared. ValueError for profiles of other labels, or of fewer than FEWEST samples.
    """
    if reference.labels != new.labels:
        raise ValueError("the profiles are of bundles with other labels")
    if min(reference.count, new.count) < FEWEST:
        raise ValueError(
            f"{reference.count} samples in the reference and {new.count} new ones: {FEWEST} of each are needed"
        )
    results = _tested(reference, new, test, seed)
    adjusted = two_samples.holm([result.p for _, result in results.values()])
    checks = [
        _check(name, measure, result.value, result.chance, p, thresholds[name])
        for (name, (measure, result)), p in zip(results.items(), adjusted, strict=True)
    ]
    new_classes: dict[str, int] = {}
    vanished: dict[str, int] = {}
    if reference.classes is not None and new.classes is not None:
        new_classes, vanished = _changed(reference.classes, new.classes)
        for name, counts, total in (
            ("new classes", new_classes, sum(new.classes.values())),
            ("vanished classes", vanished, sum(reference.classes.values())),
        ):
            fraction = sum(counts.values()) / max(1, total)
            checks.append(_check(name, "fraction", fraction, 0.0, None, thresholds[name]))
    distances = usual = None
    if reference.features is not None and new.features is not None:
        distances, usual = far_from(reference.features, new.features)
    return Drift(tuple(checks), reference.count, new.count, new_classes, vanished, distances, usual)


def far_from(reference: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (the distance of each new row to its NEIGHBOUR-th nearest of the reference, the 99 % quantile of the reference's own).

    Source: Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbors", arXiv:2204.06507. Deviation: the features are not
    divided by their norms, as the norms drift as well.
    """
    nearest = min(NEIGHBOUR, len(reference) - 1)
    usual = np.sqrt(np.partition(two_samples.squared_distances(reference, reference), nearest, axis=1)[:, nearest])
    chunks = [new[start : start + 1000] for start in range(0, len(new), 1000)]
    squares = [
        np.partition(two_samples.squared_distances(reference, c).T, nearest - 1, axis=1)[:, nearest - 1] for c in chunks
    ]
    return np.sqrt(np.concatenate(squares)), float(np.quantile(usual, 0.99))


def _tested(reference: Profile, new: Profile, test: str, seed: int) -> dict[str, tuple[str, Found]]:
    results: dict[str, tuple[str, Found]] = {}
    if reference.features is not None and new.features is not None:
        if reference.features.shape[1] != new.features.shape[1]:
            raise ValueError("the profiles are of networks with other features")
        name, measure = TESTS[test]
        tested = {"mmd": two_samples.mmd, "classifier": two_samples.classifier}[test]
        results[name] = (measure, tested(reference.features, new.features, seed=seed))
    results["answers"] = ("PSI, χ²", _fractions(reference.answered, new.answered, reference, new, seed))
    results["confidence"] = ("KS", two_samples.kolmogorov(reference.confidence, new.confidence))
    for name in (name for name in STATISTICS if name in reference.statistics):
        values = reference.statistics[name]
        pair = [column[np.isfinite(column)] for column in (values, new.statistics.get(name, np.empty(0)))]
        if min(map(len, pair)) >= FEWEST:
            results[name] = ("KS", two_samples.kolmogorov(*pair))
    if reference.classes and new.classes:
        known = list(reference.classes)  # the check `new classes` reports the others
        before, after = (
            np.array([counts.get(label, 0) for label in known]) for counts in (reference.classes, new.classes)
        )
        results["classes"] = ("PSI, χ²", _fractions(before, after, reference, new, seed))
    return results


def _fractions(expected: np.ndarray, actual: np.ndarray, reference: Profile, new: Profile, seed: int) -> Found:
    """Compare label counts: all counts together if a sample has one label.

    For multi-label, each label (assigned or not) is compared, and the one that differs most is returned. Its p is the smallest of all
    labels, corrected by Bonferroni, as the counts of labels of one sample are dependent.
    """
    if not reference.multilabel:
        return two_samples.counts(expected, actual, seed=seed)
    results = [
        two_samples.counts(np.array([e, reference.count - e]), np.array([a, new.count - a]), seed=seed)
        for e, a in zip(expected, actual, strict=True)
    ]
    most = max(results, key=lambda result: result.value - result.chance)
    return most._replace(p=min(1.0, len(results) * min(result.p for result in results)))


def _changed(reference: Mapping[str, int], new: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Return (the labels that only `new` has, those that it lacks and that chance alone would omit with a probability of at most ALPHA)."""
    total, count_new = sum(reference.values()), sum(new.values())
    known = {label: count for label, count in reference.items() if count}
    absent = {label: count for label, count in known.items() if not new.get(label)}
    # A label with a count of 0 in the reference is known to the bundle, so it is not new.
    unknown = {label: count for label, count in new.items() if count and label not in reference}
    bound = ALPHA / max(1, len(known))
    return unknown, {label: count for label, count in absent.items() if (1 - count / total) ** count_new <= bound}


def _check(name: str, measure: str, value: float, chance: float, p: float | None, threshold: Threshold) -> Check:
    effect = max(0.0, value - chance)
    level = "none"
    if (p is None or p <= ALPHA) and effect > 0:
        for reached in ("warn", "stop"):
            least = getattr(threshold, reached)
            if least is not None and effect >= least:
                level = reached
    return Check(name, measure, value, chance, p, threshold, level)
