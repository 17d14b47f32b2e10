"""What an evaluation found, put together for people and for programs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.evaluate import Evaluation
from refract.pipeline.evaluation.label_errors import likely_label_errors
from refract.pipeline.evaluation.multilabel import WrongLabel, likely_wrong_labels
from refract.pipeline.evaluation.report import figures
from refract.pipeline.evaluation.robustness import Robustness
from refract.pipeline.evaluation.slices import slices
from refract.pipeline.files import write_atomically

SHOWN = 24
TEXT_SHOWN = 120
"""Characters of a sample's text."""


@dataclass(frozen=True)
class Report:
    """numbers: JSON values; figures: title → data address; galleries: title → images, each with `src`, `caption` and `path`; template: of
    this folder."""

    title: str
    numbers: dict[str, Any]
    figures: dict[str, str] = field(default_factory=dict)
    galleries: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    template: str = "report.html"

    def write(self, folder: Path) -> list[Path]:
        """`report.html` and `report.json`, in a folder. OSError as usual."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        env = Environment(
            loader=PackageLoader("refract.pipeline.evaluation.report", "."), autoescape=True, undefined=StrictUndefined
        )
        html = env.get_template(self.template).render(
            title=self.title, numbers=self.numbers, figures=self.figures, galleries=self.galleries
        )
        paths = {"report.html": html, "report.json": json.dumps(self.numbers, indent=1, ensure_ascii=False) + "\n"}
        for name, text in paths.items():
            write_atomically(folder / name, text.encode())
        return [folder / name for name in paths]


def make_report(
    title: str,
    evaluation: Evaluation,
    labels: Sequence[str],
    *,
    facts: Mapping[str, Any],
    precision: float,
    abstain_below: float | None,
    robustness: Robustness | None = None,
    findings: Sequence[Mapping[str, str]] | None = None,
    near: Sequence[tuple[Sample, Sample]] = (),
    notes: Sequence[str] = (),
) -> Report:
    """facts: what it was measured on and with, for the head. precision: that `abstain_below` was chosen for. findings: the doctor's, each
    with name, evidence and cure; None where it did not watch. near: images and those of the training that they resemble. notes: see
    `refract.pipeline.evaluation.advice`."""
    numbers: dict[str, Any] = {"facts": dict(facts), "metrics": evaluation.metrics, "per_class": evaluation.per_class}
    numbers["macro_f1_classes"] = evaluation.macro_classes
    numbers["notes"] = [*notes, *_absent_classes(evaluation, len(labels))]
    numbers["findings"] = None if findings is None else list(findings)
    numbers["intervals"] = {name: list(pair) for name, pair in evaluation.intervals.items()}
    numbers["slices"] = [dataclasses.asdict(part) for part in slices(evaluation.samples, evaluation.right)]
    multilabel = evaluation.truth.ndim == 2
    bins = measures.reliability(evaluation.probabilities, evaluation.truth, multilabel=multilabel)
    numbers["reliability"] = [list(row) for row in bins]
    shown = {"Reliability": figures.reliability_chart(bins)}
    galleries: dict[str, list[dict[str, str]]] = {}
    curve = measures.risk_curve(evaluation.confidences, evaluation.errors)
    shown["Risk and coverage"] = figures.risk_chart(curve.coverage, curve.risk)
    if abstain_below is not None:
        numbers["abstaining"] = _abstaining(evaluation, precision, abstain_below)
    if evaluation.confusion is not None:
        numbers["confusion"] = evaluation.confusion.tolist()
        shown["Confusion matrix"] = figures.confusion_chart(evaluation.confusion, labels)
    if multilabel:
        wrong_labels = likely_wrong_labels(evaluation.probabilities, evaluation.truth)
        numbers["likely_wrong_labels"] = [_wrong_label(evaluation, wrong, labels) for wrong in wrong_labels]
        numbers["likely_label_errors"] = list(dict.fromkeys(row["path"] for row in numbers["likely_wrong_labels"]))
        galleries["The most confident errors"] = _label_images(evaluation, labels)
        galleries["Labels that are likely wrong"] = _wrong_label_images(evaluation, wrong_labels, labels)
    else:
        given, truth = evaluation.probabilities, evaluation.truth
        wrong = np.flatnonzero(~evaluation.right)
        surest = wrong[np.argsort(-given[wrong].max(axis=1), kind="stable")]
        suspects = likely_label_errors(given, truth)
        numbers["likely_label_errors"] = [evaluation.samples[i].path for i in suspects]
        galleries["The most confident errors"] = _images(evaluation, surest, labels)
        galleries["Labels that are likely wrong"] = _images(evaluation, suspects, labels)
    if near:
        known = {sample.path for sample, _ in near}
        new = np.array([sample.path not in known for sample in evaluation.samples])
        right = float(evaluation.right[new].mean()) if new.any() else None
        pairs = [[sample.path, other.path] for sample, other in near]
        numbers["near_duplicates"] = {"pairs": pairs, "right_without_them": right}
        galleries["Like an image of the training"] = [
            {"src": figures.pair_thumbnail(a.read(), b.read()), "caption": f"{_named(a, labels)} ~ {_named(b, labels)}",
             "path": f"{a.path} ~ {b.path}"}
            for a, b in near[:SHOWN]
        ]  # fmt: skip
    if robustness is not None:
        numbers["robustness"] = robustness.to_dict()
        shown["Robustness to corruptions"] = figures.severity_chart(robustness.by_severity())
        shown["Noise on the images"] = figures.noise_chart({0: robustness.clean, **robustness.noise})
    return Report(title, numbers, shown, galleries)


def _absent_classes(evaluation: Evaluation, count: int) -> list[str]:
    """A note where classes have neither samples nor predictions here."""
    if evaluation.macro_classes == count:
        return []
    return [
        f"macro_f1 is the mean over {evaluation.macro_classes} of {count} classes; "
        "the others have no sample here and are never predicted."
    ]


def _images(evaluation: Evaluation, places: np.ndarray, labels: Sequence[str]) -> list[dict[str, str]]:
    rows = []
    for i in places[:SHOWN]:
        sample, answer = evaluation.samples[i], int(evaluation.probabilities[i].argmax())
        said = f"{labels[answer]} {evaluation.probabilities[i, answer]:.0%}, labelled {_named(sample, labels)}"
        rows.append({"src": figures.thumbnail(sample.read()), "caption": said + _said(sample), "path": sample.path})
    return rows


def _abstaining(evaluation: Evaluation, precision: float, abstain_below: float) -> dict[str, Any]:
    answered = (evaluation.confidences >= abstain_below) & (abstain_below < 1)  # 1: none is answered
    return {
        "wanted_precision": precision,
        "abstain_below": abstain_below,
        "coverage": float(answered.mean()),
        "precision": float(1 - evaluation.errors[answered].mean()) if answered.any() else None,
    }


def _label_images(evaluation: Evaluation, labels: Sequence[str]) -> list[dict[str, str]]:
    """For multi-label: the images with a wrong label, that whose probability is furthest from the truth first, each image once."""
    off = np.abs(evaluation.probabilities - evaluation.truth) * (evaluation.answers != evaluation.truth)
    order = [i for i in np.argsort(-off.max(axis=1), kind="stable").tolist() if not evaluation.right[i]]
    rows = []
    for i in order[:SHOWN]:
        label = int(off[i].argmax())
        how = "missed" if evaluation.truth[i, label] else "predicted"
        rows.append(_label_image(evaluation, i, label, how, labels))
    return rows


def _wrong_label_images(
    evaluation: Evaluation, wrong: Sequence[WrongLabel], labels: Sequence[str]
) -> list[dict[str, str]]:
    return [_label_image(evaluation, w.image, w.label, f"likely {w.kind}:", labels) for w in wrong[:SHOWN]]


def _label_image(evaluation: Evaluation, place: int, label: int, how: str, labels: Sequence[str]) -> dict[str, str]:
    sample = evaluation.samples[place]
    said = f"{how} {labels[label]} {evaluation.probabilities[place, label]:.0%}, labelled {_named(sample, labels)}"
    return {"src": figures.thumbnail(sample.read()), "caption": said + _said(sample), "path": sample.path}


def _wrong_label(evaluation: Evaluation, wrong: WrongLabel, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "path": evaluation.samples[wrong.image].path,
        "label": labels[wrong.label],
        "kind": wrong.kind,
        "probability": wrong.probability,
    }


def _said(sample: Sample) -> str:
    text = sample.text.strip()
    return f": “{text[:TEXT_SHOWN]}{'…' if len(text) > TEXT_SHOWN else ''}”" if text else ""


def _named(sample: Sample, labels: Sequence[str]) -> str:
    return ", ".join(labels[k] for k in sample.labels) or "nothing"
