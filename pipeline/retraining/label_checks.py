"""Whether a retraining run's labels can be trusted: against the last accepted snapshot, and against the champion's predictions."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refract.models.multimodal.tokens import trimmed
from refract.models.prediction import predicted_labels
from refract.pipeline.data.manifest import Manifest, Sample, load_manifest
from refract.pipeline.data.new_data import NewData
from refract.pipeline.drift.thresholds import ALPHA, FEWEST, Threshold
from refract.pipeline.files import write_atomically
from refract.pipeline.retraining.snapshot import Snapshot
from refract.pipeline.retraining.stored_snapshots import FILES, decided_contents
from refract.pipeline.retraining.workspace import Check, read

if TYPE_CHECKING:
    from refract.models.bundle.bundle import Bundle
    from refract.pipeline.drift.profile import ProfiledSamples

SHOWN = 10
"""Pairs of labels that a message names, the most frequent first."""

Names = frozenset[str]


@dataclass(frozen=True)
class LabelChanges:
    """Samples of known content whose label changed.

    known: number of samples in both snapshots; changed: how many of them changed label; kinds: change → count, where a change is
    `cat → dog`, or, for multi-label, `+cat` and `-dog` for each label; rows: (sample, its labels before, its labels now) for each;
    decided: number of further samples whose label changed by a decision in the label history.
    """

    known: int
    changed: int
    kinds: Mapping[str, int]
    rows: Sequence[tuple[Sample, Names, Names]] = ()
    decided: int = 0

    @property
    def fraction(self) -> float:
        """The fraction of the known samples that changed label, in [0, 1]."""
        return self.changed / self.known if self.known else 0.0

    def text(self) -> str:
        decided = f"; decisions corrected {self.decided:,} more" if self.decided else ""
        if not self.changed:
            return f"none of {self.known:,} known samples changed label{decided}"
        return f"{self.changed:,} of {self.known:,} known samples changed label: {listed(self.kinds)}{decided}"

    def record(self, threshold: Threshold) -> Check:
        """Return the entry of the run's record: `level`, `summary`, and numbers."""
        return {
            "level": level_of(self.fraction, threshold),
            "summary": self.text(),
            "known": self.known,
            "changed": self.changed,
            "kinds": dict(Counter(self.kinds).most_common(100)),
        }

    def write(self, file: Path) -> None:
        """Write each changed sample as a CSV row `path,was,is`, and `text` where a sample has one. OSError if that fails."""
        with_texts = any(sample.text for sample, _, _ in self.rows)
        table = io.StringIO(newline="")
        writer = csv.writer(table, quoting=csv.QUOTE_ALL)
        writer.writerow(["path", "was", "is", *(["text"] if with_texts else [])])
        for sample, old, new in sorted(self.rows, key=lambda row: row[0].key):
            path = sample.path if sample.has_image else ""
            writer.writerow([path, _listed(old), _listed(new), *([sample.text] if with_texts else [])])
        write_atomically(file, table.getvalue().encode("utf-8", "replace"))


@dataclass(frozen=True)
class Disagreement:
    """The champion's predictions compared with the labels of new samples.

    wrong: errors in `count` new samples; held_wrong: errors in `held` samples of the holdout; doubt: the error rate that the champion's
    own confidence predicts for the new samples; p: the one-sided p-value (Fisher's exact test) of so many more errors than on the
    holdout; kinds: `cat, predicted dog` → count.
    """

    count: int
    wrong: int
    held: int
    held_wrong: int
    doubt: float
    p: float
    kinds: Mapping[str, int]

    @property
    def expected(self) -> float:
        """The larger of the error rate on the holdout and `doubt`, so that hard images do not count as label errors."""
        return max(self.held_wrong / self.held, self.doubt)

    @property
    def excess(self) -> float:
        """The error rate on the new samples above the expected one."""
        return self.wrong / self.count - self.expected

    def text(self) -> str:
        numbers = (
            f"{self.wrong:,} of {self.count:,} new labels ({self.wrong / self.count:.0%}, {self.expected:.0%} expected)"
        )
        kinds = f": {listed(self.kinds)}" if self.wrong else ""
        return f"the champion disagrees with {numbers}{kinds}"

    def record(self, threshold: Threshold) -> Check:
        """Return the entry as `LabelChanges.record`. The level is raised only by an excess that is both large and improbable."""
        level = level_of(self.excess, threshold) if self.p <= ALPHA else "none"
        return {
            "level": level,
            "summary": self.text(),
            "count": self.count,
            "wrong": self.wrong,
            "held": self.held,
            "held_wrong": self.held_wrong,
            "doubt": self.doubt,
            "p": self.p,
            "kinds": dict(Counter(self.kinds).most_common(100)),
        }


def level_of(effect: float, threshold: Threshold) -> str:
    """Return `none`, `warn` or `stop`."""
    if threshold.stop is not None and effect >= threshold.stop:
        return "stop"
    return "warn" if threshold.warn is not None and effect >= threshold.warn else "none"


def listed(kinds: Mapping[str, int]) -> str:
    """List the kinds, the most frequent first: `cat → dog 130, dog → cat 90, and 12 others`."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[SHOWN:])
    return ", ".join(
        [f"{kind} {count:,}" for kind, count in ordered[:SHOWN]] + ([f"and {rest:,} others"] if rest else [])
    )


def label_changes(now: Snapshot, before: Snapshot, reads: frozenset[str]) -> LabelChanges:
    """Compare the labels of all content that both snapshots train or validate on.

    reads: `images`, `texts` or both, which the network reads; they identify the content. Changes by decisions in the label history are
    counted apart: a reviewer made them.
    """
    earlier, files = _labels_of(before, reads), read(now.folder / FILES)
    reviewed, decided = decided_contents(now.folder) | decided_contents(before.folder), 0
    multilabel = "multilabel" in (now.task, before.task)
    known, rows, kinds = 0, [], Counter[str]()
    for content, (sample, names) in _labels_of(now, reads).items():
        old = earlier[content][1] if content in earlier else None
        known += old is not None
        if old is not None and old != names and files.get(sample.path) in reviewed:
            decided += 1
        elif old is not None and old != names:
            rows.append((sample, old, names))
            kinds.update(_kinds(old, names) if multilabel else [f"{_joined(old)} → {_joined(names)}"])
    return LabelChanges(known, len(rows), kinds, rows, decided)


def moved_by_decisions(now: Snapshot, before: Snapshot, reads: frozenset[str]) -> tuple[Counter[str], Counter[str]]:
    """Return label → samples of `before` that decisions have taken from it since, and label → samples that they have given to it.

    An excluded sample is taken from its labels. reads: as for `label_changes`. A sample that the source has lost was not moved.
    """
    decided, undone = decided_contents(now.folder), decided_contents(before.folder)
    taken, given = Counter[str](), Counter[str]()
    if not (decided or undone):
        return taken, given
    present, files = _labels_of(now, reads), read(before.folder / FILES)
    for content, (sample, old) in _labels_of(before, reads).items():
        image = files.get(sample.path)
        if image in decided or (image in undone and content in present):
            new = present[content][1] if content in present else frozenset[str]()
            taken.update(old - new)
            given.update(new - old)
    return taken, given


def _labels_of(snapshot: Snapshot, reads: frozenset[str]) -> dict[str, tuple[Sample, Names]]:
    """Return content → (sample, its labels). Samples with equal labels share one frozenset."""
    manifest, files = load_manifest(snapshot.manifest, snapshot.task, to_train=False), read(snapshot.folder / FILES)
    shared: dict[tuple[int, ...], Names] = {}
    labels_of = {}
    for sample in manifest.samples:
        if sample.split != "test":
            names = shared.setdefault(sample.labels, frozenset(manifest.labels[i] for i in sample.labels))
            labels_of[_content(sample, files, reads)] = sample, names
    return labels_of


def _content(sample: Sample, files: Mapping[str, str], reads: frozenset[str]) -> str:
    """Return a digest of the parts of the sample that the network reads."""
    image = files.get(sample.path, sample.path) if sample.has_image and "images" in reads else ""
    if "texts" not in reads and image:
        return image
    return hashlib.sha256(f"{image}\0{trimmed(sample.text)}".encode("utf-8", "replace")).hexdigest()


def disagreement(
    bundle: "Bundle",
    now: Snapshot,
    rows: Sequence[tuple[Sample, list[str]]],
    profiled: "ProfiledSamples | None",
    most: int,
) -> Disagreement | None:
    """Compare the champion's errors on new samples with its errors on the holdout.

    rows: (sample, labels) of new samples, with labels that the champion knows; profiled: the champion's predictions for them, or None: then
    at most `most` samples, drawn at random, are predicted, as they are for the holdout. Returns None for fewer than FEWEST new samples,
    and without a holdout. DataError if an image cannot be read.
    """
    info = bundle.info
    if profiled is None:
        drawn = NewData([s for s, _ in rows], [tuple(n) for _, n in rows]).drawn(most)
        samples, probabilities = drawn.samples, _predicted(bundle, drawn.samples)
    else:
        samples, probabilities = profiled.samples, profiled.probabilities
    names = {sample.key: frozenset(labels) for sample, labels in rows}
    table = load_manifest(now.manifest, now.task)
    held = _known(table, set(info.labels), most)
    if len(samples) < FEWEST or not held:
        return None
    kinds, wrong = _errors(bundle, probabilities, [names[sample.key] for sample in samples])
    _, held_wrong = _errors(bundle, _predicted(bundle, [s for s, _ in held]), [labels for _, labels in held])
    p = _more_errors(wrong, len(samples), held_wrong, len(held))
    return Disagreement(len(samples), wrong, len(held), held_wrong, _doubt(bundle, probabilities), p, kinds)


def _known(table: Manifest, labels: set[str], most: int) -> list[tuple[Sample, Names]]:
    """Return at most `most` samples of the holdout, drawn at random, whose labels the champion knows."""
    rows = [(s, frozenset(table.labels[i] for i in s.labels)) for s in table.of("test")]
    rows = [row for row in rows if labels.issuperset(row[1])]
    indices = np.random.default_rng(0).permutation(len(rows))[:most]
    return [rows[i] for i in indices.tolist()]


def _predicted(bundle: "Bundle", samples: Sequence[Sample]) -> np.ndarray:
    """Return (N, C) float32 probabilities."""
    from refract.pipeline.evaluation.evaluate import probabilities_of
    from refract.pipeline.inference.scoring import preprocess_of

    info = bundle.info
    if not samples:
        return np.zeros((0, len(info.labels)), np.float32)
    return probabilities_of(
        bundle.classifier(), preprocess_of(info), samples, task=info.task, temperature=info.temperature
    )


def _errors(bundle: "Bundle", probabilities: np.ndarray, truth: Sequence[Names]) -> tuple[Counter[str], int]:
    """Return (kind of error → count, number of samples with an error)."""
    info, kinds, wrong = bundle.info, Counter[str](), 0
    for row, names in zip(predicted_labels(probabilities, info.task, info.thresholds), truth, strict=True):
        predicted = frozenset(info.labels[i] for i in np.flatnonzero(row).tolist())
        if predicted != names:
            wrong += 1
            multilabel = info.task == "multilabel"
            kinds.update(
                _kinds(names, predicted) if multilabel else [f"{_joined(names)}, predicted {_joined(predicted)}"]
            )
    return kinds, wrong


def _doubt(bundle: "Bundle", probabilities: np.ndarray) -> float:
    """Return the error rate that the calibrated probabilities predict; for multi-label the rate of samples with any wrong label.

    Labels are assumed to be wrong independently of each other.
    """
    given = predicted_labels(probabilities, bundle.info.task, bundle.info.thresholds)
    if bundle.info.task != "multilabel":
        return float(1 - probabilities[given].mean())
    return float(1 - np.where(given, probabilities, 1 - probabilities).prod(axis=1).mean())


def _more_errors(wrong: int, count: int, held_wrong: int, held: int) -> float:
    """Return the one-sided p-value of Fisher's exact test for the excess of errors among the new samples. Source: Fisher 1922."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(wrong - 1, count + held, wrong + held_wrong, count))


def _kinds(old: Names, new: Names) -> Iterable[str]:
    return [*(f"+{name}" for name in sorted(new - old)), *(f"-{name}" for name in sorted(old - new))]


def _joined(names: Names) -> str:
    return _listed(names) or "no label"


def _listed(names: Names) -> str:
    """Join the labels as a manifest's column `label` does."""
    return ";".join(sorted(names))
