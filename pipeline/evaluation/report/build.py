"""Build the report of an evaluation as HTML for people and as JSON for programs."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.evaluate import Evaluation, Predictions
from refract.pipeline.evaluation.hierarchy import back_off_numbers
from refract.pipeline.evaluation.label_errors import likely_label_errors
from refract.pipeline.evaluation.multilabel import WrongLabel, likely_wrong_labels
from refract.pipeline.evaluation.plots import confusion_of
from refract.pipeline.evaluation.report import figures
from refract.pipeline.evaluation.report.summary import summarized
from refract.pipeline.evaluation.robustness import Robustness
from refract.pipeline.evaluation.slices import slices
from refract.pipeline.files import write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment

GALLERY_IMAGES = 24
CONFUSION = "Confusion matrix"
"""The title of a chart."""
CLASSES = 200
"""Rows of the table of classes."""
TEXT_SHOWN = 120
"""Characters of a sample's text in a caption."""


@cache
def _templates() -> "Environment":
    """Return the environment of the templates in this folder, which compiles each once in a process."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("refract.pipeline.evaluation.report", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined)


@dataclass(frozen=True)
class Report:
    """The content of a report.

    numbers: JSON values; charts: chart title → data URL; galleries: title → images, each with `src` (empty without images), `caption` and
    `path`; template: file name in this folder.
    """

    title: str
    numbers: dict[str, Any]
    charts: dict[str, str] = field(default_factory=dict)
    galleries: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    template: str = "report.html"

    def png(self, chart: str) -> bytes:
        """Return a chart as PNG."""
        return base64.b64decode(self.charts[chart].partition(",")[2])

    def write(self, folder: Path) -> list[Path]:
        """Write `report.html` and `report.json` to a folder and return their paths. Raises OSError."""
        template = _templates().get_template(self.template)
        html = template.render(
            title=self.title,
            numbers=self.numbers,
            shown_classes=_shown_classes(self.numbers.get("per_class", [])),
            charts=self.charts,
            galleries=self.galleries,
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
    back_off: float | None = None,
    robustness: Robustness | None = None,
    findings: Sequence[Mapping[str, str]] | None = None,
    near: Sequence[tuple[Sample, Sample]] = (),
    notes: Sequence[str] = (),
    subject: str = "The classifier",
    checked: Predictions | None = None,
    images: bool = True,
) -> Report:
    """Build the report of an evaluation.

    facts: the data and the model, shown at the top. precision: the target from which `abstain_below` was chosen, and
    `back_off`, the threshold of the inner nodes of a hierarchy. findings: the doctor's,
    each with name, evidence and cure, or None if the doctor did not watch a training. near: pairs of a test image and the training image
    that it nearly duplicates. notes: see `refract.pipeline.evaluation.advice`. subject: the classifier, as the start of a sentence.
    checked: held-out predictions by which labels are checked, None for those of the evaluation. images: False lists captions and paths
    in the galleries, without images.
    """
    numbers: dict[str, Any] = {"facts": dict(facts), "metrics": evaluation.metrics, "per_class": evaluation.per_class}
    numbers["macro_f1_classes"] = evaluation.macro_classes
    numbers["notes"] = [*notes, *_absent_classes(evaluation, len(labels))]
    numbers["findings"] = None if findings is None else list(findings)
    numbers["intervals"] = {name: list(pair) for name, pair in evaluation.intervals.items()}
    numbers["slices"] = [dataclasses.asdict(part) for part in slices(evaluation.samples, evaluation.right)]
    multilabel = evaluation.truth.ndim == 2
    bins = measures.reliability(evaluation.probabilities, evaluation.truth, multilabel=multilabel)
    numbers["reliability"] = [list(row) for row in bins]
    charts = {"Reliability": figures.reliability_chart(bins)}
    galleries: dict[str, list[dict[str, str]]] = {}
    curve = measures.risk_curve(evaluation.confidences, evaluation.errors)
    charts["Risk and coverage"] = figures.risk_chart(curve.coverage, curve.risk)
    if abstain_below is not None:
        numbers["abstaining"] = _abstaining(evaluation, precision, abstain_below)
        if evaluation.hierarchy is not None and back_off is not None:
            numbers["back_off"] = back_off_numbers(evaluation, evaluation.hierarchy, abstain_below, back_off)
    if evaluation.confusion is not None:
        numbers |= evaluation.confusion.to_json(labels)
        charts[CONFUSION] = figures.data_url(confusion_of(evaluation.confusion, labels))
    checked = checked or Predictions(evaluation.samples, evaluation.probabilities, evaluation.truth)
    numbers["labels_checked"] = len(checked.samples)
    if multilabel:
        wrong_labels = likely_wrong_labels(checked.probabilities, checked.truth)
        numbers["likely_wrong_labels"] = [_wrong_label(checked, wrong, labels) for wrong in wrong_labels]
        numbers["likely_label_errors"] = list(dict.fromkeys(row["path"] for row in numbers["likely_wrong_labels"]))
        galleries["Most confident errors"] = _label_images(evaluation, labels)
        galleries["Labels that are likely wrong"] = _wrong_label_images(checked, wrong_labels, labels)
    else:
        wrong = np.flatnonzero(~evaluation.right)
        surest = wrong[np.argsort(-evaluation.probabilities[wrong].max(axis=1), kind="stable")]
        suspects = likely_label_errors(checked.probabilities, checked.truth)
        numbers["likely_label_errors"] = [checked.samples[i].path for i in suspects]
        galleries["Most confident errors"] = _images(evaluation, surest, labels)
        galleries["Labels that are likely wrong"] = _images(checked, suspects, labels)
    if near:
        near_paths = {sample.path for sample, _ in near}
        distinct = np.array([sample.path not in near_paths for sample in evaluation.samples])
        right = float(evaluation.right[distinct].mean()) if distinct.any() else None
        pairs = [[sample.path, other.path] for sample, other in near]
        numbers["near_duplicates"] = {"pairs": pairs, "right_without_them": right}
        galleries["Near-duplicates of training images"] = [
            {"src": figures.pair_thumbnail(a.read(), b.read()), "caption": f"{_named(a, labels)} ~ {_named(b, labels)}",
             "path": f"{a.path} ~ {b.path}"}
            for a, b in near[:GALLERY_IMAGES]
        ]  # fmt: skip
    if robustness is not None:
        numbers["robustness"] = robustness.to_dict()
        charts["Robustness to corruptions"] = figures.severity_chart(robustness.by_severity())
        charts["Robustness to Gaussian noise"] = figures.noise_chart({0: robustness.clean, **robustness.noise})
    if not images:
        galleries = {title: [row | {"src": ""} for row in rows] for title, rows in galleries.items()}
    numbers["summary"] = summarized(subject, evaluation, labels, numbers, notes)
    return Report(title, numbers, charts, galleries)


def _shown_classes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table of classes: all, or of more than CLASSES those with the lowest F1."""
    if len(rows) <= CLASSES:
        return rows
    return sorted((row for row in rows if row["count"]), key=lambda row: row["f1"])[:CLASSES]


def _absent_classes(evaluation: Evaluation, count: int) -> list[str]:
    """Return a note if some classes have neither samples nor predictions in this evaluation."""
    if evaluation.macro_classes == count:
        return []
    return [
        f"macro_f1 is the mean over {evaluation.macro_classes} of {count} classes; "
        "the others have no sample in this data and are never predicted."
    ]


def _images(predictions: Evaluation | Predictions, indices: np.ndarray, labels: Sequence[str]) -> list[dict[str, str]]:
    rows = []
    for i in indices[:GALLERY_IMAGES]:
        sample, predicted = predictions.samples[i], int(predictions.probabilities[i].argmax())
        caption = (
            f"{labels[predicted]} {predictions.probabilities[i, predicted]:.0%}, labelled {_named(sample, labels)}"
        )
        rows.append(
            {"src": figures.thumbnail(sample.read()), "caption": caption + _quoted(sample), "path": sample.path}
        )
    return rows


def _abstaining(evaluation: Evaluation, precision: float, abstain_below: float) -> dict[str, Any]:
    answered = (evaluation.confidences >= abstain_below) & (
        abstain_below < 1
    )  # a threshold of 1 abstains on every image
    return {
        "wanted_precision": precision,
        "abstain_below": abstain_below,
        "coverage": float(answered.mean()),
        "precision": float(1 - evaluation.errors[answered].mean()) if answered.any() else None,
    }


def _label_images(evaluation: Evaluation, labels: Sequence[str]) -> list[dict[str, str]]:
    """Return the multi-label images with a wrong predicted label, each once, the largest distance of probability and truth first."""
    distances = np.abs(evaluation.probabilities - evaluation.truth) * (evaluation.predicted != evaluation.truth)
    order = [i for i in np.argsort(-distances.max(axis=1), kind="stable").tolist() if not evaluation.right[i]]
    rows = []
    for i in order[:GALLERY_IMAGES]:
        label = int(distances[i].argmax())
        kind = "missed" if evaluation.truth[i, label] else "predicted"
        rows.append(_label_image(evaluation, i, label, kind, labels))
    return rows


def _wrong_label_images(
    predictions: Predictions, wrong: Sequence[WrongLabel], labels: Sequence[str]
) -> list[dict[str, str]]:
    return [_label_image(predictions, w.image, w.label, f"likely {w.kind}:", labels) for w in wrong[:GALLERY_IMAGES]]


def _label_image(
    predictions: Evaluation | Predictions, index: int, label: int, kind: str, labels: Sequence[str]
) -> dict[str, str]:
    sample = predictions.samples[index]
    caption = f"{kind} {labels[label]} {predictions.probabilities[index, label]:.0%}, labelled {_named(sample, labels)}"
    return {"src": figures.thumbnail(sample.read()), "caption": caption + _quoted(sample), "path": sample.path}


def _wrong_label(predictions: Predictions, wrong: WrongLabel, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "path": predictions.samples[wrong.image].path,
        "label": labels[wrong.label],
        "kind": wrong.kind,
        "probability": wrong.probability,
    }


def _quoted(sample: Sample) -> str:
    text = sample.text.strip()
    return f": “{text[:TEXT_SHOWN]}{'…' if len(text) > TEXT_SHOWN else ''}”" if text else ""


def _named(sample: Sample, labels: Sequence[str]) -> str:
    return ", ".join(labels[k] for k in sample.labels) or "nothing"
