"""Two profiles beside each other: what differs, by how much, and whether by more than chance. Pure: arrays in, numbers out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from refract.pipeline.drift import two_samples
from refract.pipeline.drift.profile import STATISTICS, Profile
from refract.pipeline.drift.thresholds import ALPHA, FEWEST, LEVELS, THRESHOLDS, Threshold
from refract.pipeline.drift.two_samples import Found

NEIGHBOUR = 5
"""The distance to which of the nearest is how far an image is."""

TESTS = {"mmd": ("features", "MMD²"), "classifier": ("classifier", "told apart")}


@dataclass(frozen=True)
class Check:
    """One thing that was compared. value: the distance; chance: what of it chance makes; p: by Holm over all checks, None where nothing was
    tested; level: of LEVELS."""

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
    """checks: in a fixed order; new_classes: label that the reference lacks → count; vanished: label that the new data lack → count in the
    reference; distances: (N,) of each new image to the reference, None without features; usual: the distance that one of a hundred of
    the reference's own exceeds."""

    checks: tuple[Check, ...]
    reference_count: int
    count: int
    new_classes: Mapping[str, int] = field(default_factory=dict)
    vanished: Mapping[str, int] = field(default_factory=dict)
    distances: np.ndarray | None = None
    usual: float | None = None

    @property
    def level(self) -> str:
        """The worst of the checks'."""
        return max((check.level for check in self.checks), key=LEVELS.index, default="none")

    @property
    def far(self) -> float | None:
        """The share of the new images that are farther than `usual`; where nothing drifted, about 1 %."""
        return None if self.distances is None else float((self.distances > self.usual).mean())

    def furthest(self, count: int) -> list[int]:
        """The places of the new images that are farthest from the reference."""
        return [] if self.distances is None else np.argsort(-self.distances, kind="stable")[:count].tolist()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, but for the distances."""
        checks = [{**asdict(c), "threshold": c.threshold._asdict(), "effect": c.effect} for c in self.checks]
        own: dict[str, Any] = {"level": self.level, "alpha": ALPHA}
        own |= {"reference": self.reference_count, "images": self.count, "checks": checks}
        return own | {"new_classes": dict(self.new_classes), "vanished": dict(self.vanished), "far": self.far}


def compare(
    reference: Profile,
    new: Profile,
    *,
    test: str = "mmd",
    thresholds: Mapping[str, Threshold] = THRESHOLDS,
    seed: int = 0,
) -> Drift:
    """What of `new` is not as in `reference`, which are of one bundle. test: of TESTS, for the features; thresholds: one for each check.

    A check warns, or stops, where its effect reaches the threshold and its p-value, by Holm over all checks, is at most ALPHA. What one of
    the two lacks, as labels, is not compared. ValueError for profiles of other labels, or of fewer than FEWEST samples.
    """
    if reference.labels != new.labels:
        raise ValueError("the profiles are of bundles with other labels")
    if min(reference.count, new.count) < FEWEST:
        raise ValueError(
            f"{reference.count} samples in the reference and {new.count} new ones: {FEWEST} of each are needed to tell anything"
        )
    found = _tested(reference, new, test, seed)
    adjusted = two_samples.holm([one.p for _, one in found.values()])
    checks = [
        _check(name, measure, one.value, one.chance, p, thresholds[name])
        for (name, (measure, one)), p in zip(found.items(), adjusted, strict=True)
    ]
    new_classes: dict[str, int] = {}
    vanished: dict[str, int] = {}
    if reference.classes is not None and new.classes is not None:
        new_classes, vanished = _changed(reference.classes, new.classes)
        for name, counts, total in (
            ("new classes", new_classes, sum(new.classes.values())),
            ("vanished classes", vanished, sum(reference.classes.values())),
        ):
            share = sum(counts.values()) / max(1, total)
            checks.append(_check(name, "share", share, 0.0, None, thresholds[name]))
    distances = usual = None
    if reference.features is not None and new.features is not None:
        distances, usual = far_from(reference.features, new.features)
    return Drift(tuple(checks), reference.count, new.count, new_classes, vanished, distances, usual)


def far_from(reference: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, float]:
    """(the distance of each new row to its NEIGHBOUR-th nearest of the reference, what one of a hundred of the reference's own exceeds).

    Source: Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbors", arXiv:2204.06507. Deviation: the features are not
    divided by their lengths, which tell of drift as well.
    """
    nearest = min(NEIGHBOUR, len(reference) - 1)
    own = np.sqrt(np.partition(two_samples.squared_distances(reference, reference), nearest, axis=1)[:, nearest])
    chunks = [new[start : start + 1000] for start in range(0, len(new), 1000)]
    found = [
        np.partition(two_samples.squared_distances(reference, c).T, nearest - 1, axis=1)[:, nearest - 1] for c in chunks
    ]
    return np.sqrt(np.concatenate(found)), float(np.quantile(own, 0.99))


def _tested(reference: Profile, new: Profile, test: str, seed: int) -> dict[str, tuple[str, Found]]:
    found: dict[str, tuple[str, Found]] = {}
    if reference.features is not None and new.features is not None:
        if reference.features.shape[1] != new.features.shape[1]:
            raise ValueError("the profiles are of networks with other features")
        name, measure = TESTS[test]
        tested = {"mmd": two_samples.mmd, "classifier": two_samples.classifier}[test]
        found[name] = (measure, tested(reference.features, new.features, seed=seed))
    found["answers"] = ("PSI, χ²", _shares(reference.answered, new.answered, reference, new, seed))
    found["confidence"] = ("KS", two_samples.kolmogorov(reference.confidence, new.confidence))
    for name in (name for name in STATISTICS if name in reference.statistics):
        values = reference.statistics[name]
        pair = [own[np.isfinite(own)] for own in (values, new.statistics.get(name, np.empty(0)))]
        if min(map(len, pair)) >= FEWEST:
            found[name] = ("KS", two_samples.kolmogorov(*pair))
    if reference.classes and new.classes:
        known = list(reference.classes)  # of the others `new classes` tells
        before, after = (np.array([own.get(label, 0) for label in known]) for own in (reference.classes, new.classes))
        found["classes"] = ("PSI, χ²", _shares(before, after, reference, new, seed))
    return found


def _shares(expected: np.ndarray, actual: np.ndarray, reference: Profile, new: Profile, seed: int) -> Found:
    """Of one label a sample: of all counts together. Of several: of each label, given or not, that which differs most; its p is for the
    smallest of so many (Bonferroni), as a sample is counted with each of its labels and the counts are not drawn apart."""
    if not reference.multilabel:
        return two_samples.counts(expected, actual, seed=seed)
    found = [
        two_samples.counts(np.array([e, reference.count - e]), np.array([a, new.count - a]), seed=seed)
        for e, a in zip(expected, actual, strict=True)
    ]
    most = max(found, key=lambda one: one.value - one.chance)
    return most._replace(p=min(1.0, len(found) * min(one.p for one in found)))


def _changed(reference: Mapping[str, int], new: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """(labels that only `new` has, those that it lacks though chance would have left out one of such labels once in 1 / ALPHA at most)."""
    total, here = sum(reference.values()), sum(new.values())
    known = {label: count for label, count in reference.items() if count}
    absent = {label: count for label, count in known.items() if not new.get(label)}
    # A label that the reference's sample happens to lack is no new one while the bundle knows it.
    strange = {label: count for label, count in new.items() if count and label not in reference}
    bound = ALPHA / max(1, len(known))
    return strange, {label: count for label, count in absent.items() if (1 - count / total) ** here <= bound}


def _check(name: str, measure: str, value: float, chance: float, p: float | None, threshold: Threshold) -> Check:
    effect = max(0.0, value - chance)
    level = "none"
    if (p is None or p <= ALPHA) and effect > 0:
        for reached in ("warn", "stop"):
            least = getattr(threshold, reached)
            if least is not None and effect >= least:
                level = reached
    return Check(name, measure, value, chance, p, threshold, level)
