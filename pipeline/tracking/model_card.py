"""Describe a trained model for its reviewers: the model card of a run, and the description and tags of its registered version."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refract.models.bundle.bundle import load_bundle
from refract.models.bundle.info import BundleInfo
from refract.models.modalities import NO_IMAGES
from refract.pipeline.evaluation.error_images import FOLDER
from refract.pipeline.files import write_atomically

CARD = "model_card.md"

MOST_CLASSES = 100
"""The most rows of the table of classes. With more classes, those of the lowest F1 are listed."""

SHOWN_LABELS = 20
"""Labels that the card names in its first lines."""

LABEL_STATE = ("label_state", "label_decisions", "label_changes")
"""Entries of a data set's identity that describe its label history."""


GATE = "The promotion gate"

GATE_TEXT = "`gate.txt` has its lines."
"""The end of what the gate adds to a version's description."""

_ADDED = re.compile(rf"\s*^{GATE} (?:passed|failed) [^\n]*{re.escape(GATE_TEXT)}", re.MULTILINE)

LONGEST_DESCRIPTION = 5000
"""Characters of a version's description that MLflow's databases accept."""

SHOWN_FAILURES = 10
"""Failed checks that the gate's sentence names: with a recall for each class there may be thousands."""


@dataclass(frozen=True)
class Gate:
    """The result of the promotion gate. verdict: `Verdict.to_dict()`; against: version of the champion, None without one."""

    verdict: Mapping[str, Any]
    against: str | None

    def sentence(self) -> str:
        """Say in one sentence whether the gate passed, against what, and which checks failed."""
        count, holdout = self.verdict["samples"], self.verdict["holdout"]
        compared = "without a champion" if self.against is None else f"against version {self.against}"
        measured = f"{compared}, on {count:,} samples of the holdout {holdout}"
        if self.verdict["passed"]:
            return f"{GATE} passed {measured}."
        failed = [line["name"] for line in self.verdict["lines"] if line["passed"] is False]
        rest = f" and {len(failed) - SHOWN_FAILURES:,} more" if len(failed) > SHOWN_FAILURES else ""
        return f"{GATE} failed {measured}, at: {', '.join(failed[:SHOWN_FAILURES])}{rest}."


@dataclass(frozen=True)
class ModelFacts:
    """What a run's folder says about its model.

    digest: the digest of the bundle; familiar: whether the bundle has training features; errors: whether the folder has a gallery of
    errors; report: the content of `report.json`; labels: the label state, empty without a label history; gate: None before the gate.
    """

    name: str
    info: BundleInfo
    digest: str
    familiar: bool
    errors: bool
    report: Mapping[str, Any]
    labels: Mapping[str, str] = field(default_factory=dict)
    gate: Gate | None = None

    def metric(self, name: str) -> str:
        """Return a metric with its 95 % interval, if it has one."""
        bounds = self.report.get("intervals", {}).get(name)
        return f"{self.info.metrics[name]:.4f}" + ("" if bounds is None else f" (95 % interval {_range(bounds)})")


def read_facts(run_dir: Path, labels: Mapping[str, str] | None = None, gate: Gate | None = None) -> ModelFacts:
    """Read the facts of a run with a bundle.

    labels: the label state, by default that in the bundle. BundleError for a damaged bundle, OSError or ValueError for a damaged report.
    """
    bundle = load_bundle(run_dir / "bundle")
    report = json.loads((run_dir / "report.json").read_text("utf-8"))
    source = {key: value for key, value in bundle.info.data.items() if key in LABEL_STATE} | dict(labels or {})
    familiar = bundle.training_features() is not None
    errors = (run_dir / FOLDER).is_dir()
    return ModelFacts(run_dir.name, bundle.info, bundle.digest, familiar, errors, report, source, gate)


def label_state(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the label state that a run's tags `data.…` have, without the prefix."""
    return {key: tags[f"data.{key}"] for key in LABEL_STATE if f"data.{key}" in tags}


def write_card(run_dir: Path, facts: ModelFacts) -> Path:
    """Write the model card to the run's folder and return its path. OSError if that fails."""
    write_atomically(run_dir / CARD, model_card(facts).encode())
    return run_dir / CARD


def version_description(facts: ModelFacts) -> str:
    """Return the Markdown that MLflow shows at the registered version: a paragraph, and the sentence of the gate."""
    info, data = facts.info, facts.info.data
    names = [name for name in ("accuracy", "sample_f1", "macro_f1", "calibration_error") if name in info.metrics]
    metrics = ", ".join(f"{name} {facts.metric(name)}" for name in names)
    tested = sum(data.get("counts", {}).get("test", {}).values()) if info.task != "multilabel" else None
    sentences = [
        f"`{info.network['name']}` for {len(info.labels):,} labels ({info.task}).",
        f"Trained on {_quoted(data.get('source', 'unknown data'))}, {_sizes(info)}{_state(facts.labels)}.",
        f"On the test set{'' if tested is None else f' of {tested:,} samples'}: {metrics}." if metrics else "",
        f"Files of the run `{facts.name}`: `{CARD}`, `report.html`, {'`errors/`, ' if facts.errors else ''}`bundle/`.",
    ]
    paragraph = " ".join(filter(None, sentences))
    return paragraph if facts.gate is None else with_gate(paragraph, facts.gate)


def with_gate(description: str, gate: Gate) -> str:
    """Return a version's description with the sentence of the gate at its end, in place of an earlier one."""
    before = _ADDED.sub("", description).rstrip()
    return f"{before}\n\n{gate.sentence()} {GATE_TEXT}"[: max(LONGEST_DESCRIPTION, len(before))]


def version_tags(facts: ModelFacts) -> dict[str, str]:
    """Return the tags of the registered version: the metrics with their intervals, and the identity of the data."""
    tags = {f"metric.{name}": facts.metric(name) for name in facts.info.metrics if re.fullmatch(r"[\w. -]+", name)}
    data = facts.info.data
    tags |= {f"data.{key}": str(data[key]) for key in ("source", "fingerprint") if key in data}
    return tags | {f"data.{key}": value for key, value in facts.labels.items()}


def model_card(facts: ModelFacts) -> str:
    """Return the model card as Markdown."""
    sections = {
        "Intended use": _intended_use(facts),
        "Data": _data(facts),
        "Training": _training(facts.info),
        "Metrics on the test set": _metrics(facts),
        "Calibration": _calibration(facts),
        "Limits": _limits(facts),
        "Promotion gate": _gate(facts.gate),
        "Versions": _table(("package", "version"), facts.info.versions.items()),
        "How to load it": _loading(facts),
    }
    text = [f"# Model card: {_cell(facts.info.name)}", f"Run `{facts.name}`, created {facts.info.created}."]
    for title, lines in sections.items():
        text += [f"## {title}", *lines]
    return "\n\n".join(text) + "\n"


def _intended_use(facts: ModelFacts) -> list[str]:
    info = facts.info
    reads = "texts" if info.network["name"] == NO_IMAGES else "images" if info.text is None else "images with texts"
    shown = ", ".join(map(_cell, info.labels[:SHOWN_LABELS]))
    rest = len(info.labels) - SHOWN_LABELS
    chosen = "any number of" if info.task == "multilabel" else "one of"
    return [
        f"The model classifies {reads}: it gives each {chosen} {len(info.labels):,} labels ({shown}"
        f"{f' and {rest:,} more' if rest > 0 else ''}).",
        "It is meant for inputs like those of its data set. It has not been measured on others.",
    ]


def _data(facts: ModelFacts) -> list[str]:
    data = facts.info.data
    counts = data.get("counts", {})
    rows = [
        (label, *(f"{counts[split].get(label, 0):,}" for split in counts)) for label in facts.info.labels[:MOST_CLASSES]
    ]
    lines = [f"Source: {_quoted(data.get('source', 'unknown'))}. Fingerprint: `{data.get('fingerprint', 'unknown')}`."]
    if facts.labels:
        state, decisions, changes = (facts.labels.get(key, "") for key in LABEL_STATE)
        lines.append(f"Label history: state `{state}`, {_cell(changes) or f'{decisions} decisions'}.")
    else:
        lines.append("Label history: none.")
    return [*lines, *_table(("label", *counts), rows), *_rest(len(facts.info.labels), "lists the first")]


def _training(info: BundleInfo) -> list[str]:
    config = info.config
    keys = (
        "model.name", "model.weights", "model.mode", "augment.policy", "data.image_size", "data.batch_size", "data.sampler", "optim.name",
        "optim.lr", "optim.schedule", "optim.weight_decay", "loss.name", "trainer.max_epochs", "trainer.seed",
    )  # fmt: skip
    rows = []
    for key in keys:
        section, _, name = key.partition(".")
        if name in config.get(section, {}):
            rows.append((key, f"`{_cell(_plain(config[section][name]))}`"))
    return [*_table(("key", "value"), rows), "`config.yaml` of the run has all keys."]


def _metrics(facts: ModelFacts) -> list[str]:
    rows = [(name, facts.metric(name)) for name in facts.info.metrics]
    classes = list(facts.report.get("per_class", []))
    shown = sorted(classes, key=lambda row: row["f1"])[:MOST_CLASSES] if len(classes) > MOST_CLASSES else classes
    cells = [
        (row["label"], f"{row['count']:,}", *(_rate(row, name) for name in ("precision", "recall", "f1")))
        for row in shown
    ]
    header = ("label", "samples", "precision", "recall", "F1")
    return [
        *_table(("metric", "value"), rows),
        *_table(header, cells),
        *_rest(len(classes), "lists those of the lowest F1,"),
        "The ranges are 95 % intervals.",
    ]


def _calibration(facts: ModelFacts) -> list[str]:
    info = facts.info
    error = info.metrics.get("calibration_error")
    measured = "" if error is None else f" The confidence differs from the accuracy by {error:.1%} on average."
    thresholds = " Each label has a threshold, chosen on the validation set." if info.thresholds else ""
    fitted = (
        "The confidence is not calibrated: the validation set had too few wrong predictions to fit a temperature."
        if info.temperature == 1
        else f"The temperature, fitted on the validation set, is {info.temperature:.3f}."
    )
    return [f"{fitted}{measured}{thresholds}"]


def _limits(facts: ModelFacts) -> list[str]:
    info, report = facts.info, facts.report
    lines = []
    if info.abstain_below is None:
        lines.append("Abstaining: the model has no limit of the confidence.")
    elif info.abstain_below <= 0:
        lines.append(
            "Abstaining: the model never abstains; without abstaining, the validation set reached the wanted precision."
        )
    elif info.abstain_below >= 1:
        lines.append("Abstaining: the model abstains on every sample, as none reached the wanted precision.")
    else:
        abstaining = report.get("abstaining", {})
        coverage, precision = abstaining.get("coverage"), abstaining.get("precision")
        coverage_text = (
            ""
            if precision is None
            else f" It predicts {coverage:.1%} of the test set, {precision:.1%} of these rightly."
        )
        lines.append(
            f"Abstaining: below the confidence {info.abstain_below:.3f} a person should decide.{coverage_text}"
        )
    if (back_off := report.get("back_off", {})) and back_off["threshold"] < 1:
        lines.append(
            f"Class hierarchy: where it abstains, the model names a parent of probability {back_off['threshold']:.3f} or more, "
            "if there is one."
        )
    lines.append(
        "Familiarity: the model compares each image with its training images."
        if facts.familiar
        else "Familiarity: not available; the model does not notice images unlike its training images."
    )
    robustness = report.get("robustness")
    lines.append(
        "Robustness: not measured."
        if robustness is None
        else f"Robustness: under image corruptions {robustness['mean_corruption_error']:.1%} of the predictions are wrong, "
        f"without them {robustness['clean_error']:.1%}."
    )
    suspects = len(report.get("likely_label_errors", ()))
    lines.append(f"Labels: {suspects:,} of {report.get('labels_checked', 0):,} checked labels are likely wrong.")
    lines += [_cell(note) for note in report.get("notes", ())]
    lines += [_cell(f"Doctor: {finding['name']}: {finding['evidence']}") for finding in report.get("findings") or ()]
    return ["\n".join(f"- {line}" for line in lines)]


def _gate(gate: Gate | None) -> list[str]:
    if gate is None:
        return ["The model has not been through the promotion gate of `refract retrain`."]
    words = {True: "passed", False: "failed", None: "unknown"}
    rows = [(line["name"], words[line["passed"]], line["summary"]) for line in gate.verdict["lines"]]
    return [gate.sentence(), *_table(("check", "result", "value"), rows)]


def _loading(facts: ModelFacts) -> list[str]:
    columns = [] if facts.info.network["name"] == NO_IMAGES else ['"image": [open("image.jpg", "rb").read()]']
    columns += [] if facts.info.text is None else ['"text": ["the text"]']
    example = f"pandas.DataFrame({{{', '.join(columns)}}})"
    return [
        f"The SHA-256 of the bundle's manifest is `{facts.digest}`. NAME and VERSION are those of the registered model.",
        "As a server:",
        "```\nrefract serve models:/NAME/VERSION\n```",
        "In Python, as an MLflow model:",
        f'```python\nimport mlflow, pandas\n\nmodel = mlflow.pyfunc.load_model("models:/NAME/VERSION")\nmodel.predict({example})\n```',
        "In Python, as PyTorch's network, from the folder `bundle` of the run:",
        '```python\nimport refract\n\nbundle = refract.load_bundle("bundle")\nnetwork = bundle.classifier()\n```',
    ]


def _sizes(info: BundleInfo) -> str:
    counts, unit = info.data.get("counts", {}), "labels" if info.task == "multilabel" else "samples"
    sizes = ", ".join(f"{sum(labels.values()):,} {split}" for split, labels in counts.items())
    return f"{sizes} {unit}" if sizes else "of unknown size"


def _state(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return f", with the label state `{labels.get('label_state', '')[:12]}` of {labels.get('label_decisions', '?')} decisions"


def _rate(row: Mapping[str, Any], name: str) -> str:
    bounds = row.get(f"{name}_interval")
    return f"{row[name]:.3f}" + ("" if bounds is None else f" ({_range(bounds, 3)})")


def _range(bounds: Sequence[float], digits: int = 4) -> str:
    return f"{bounds[0]:.{digits}f} – {bounds[1]:.{digits}f}"


def _rest(count: int, verb: str) -> Iterator[str]:
    if count > MOST_CLASSES:
        yield f"The table {verb} {MOST_CLASSES} of {count:,} labels."


def _table(header: Sequence[str], rows: Any) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["\n".join(f"| {' | '.join(_cell(str(cell)) for cell in line)} |" for line in lines)]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _quoted(text: Any) -> str:
    return f"`{_cell(str(text)).replace('`', chr(39))}`"


def _cell(text: str) -> str:
    """Return a text on one line that cannot end a table's cell, start HTML, link or load an image."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split())).replace("<", "&lt;").replace("](", r"]\(")
