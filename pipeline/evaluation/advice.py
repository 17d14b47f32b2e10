"""Notes at the end of a training or an evaluation: small test sets, bundles that always abstain, unmeasured robustness."""

import json
import shlex
from pathlib import Path

from refract.pipeline.config.sections import EvaluationConfig
from refract.pipeline.evaluation.evaluate import Evaluation
from refract.pipeline.evaluation.report.summary import predicts_parents

WIDE = 0.15
"""A 95 % interval of at least this width is too wide to compare models, which usually differ by less."""


def notes_on(evaluation: Evaluation, *, drawn: bool) -> list[str]:
    """Return notes if the 95 % interval of the accuracy, for multi-label of the sample F1, is at least WIDE.

    drawn: whether the seed selected the test set, so that another seed selects another one.
    """
    metric = "accuracy" if "accuracy" in evaluation.intervals else "sample_f1"
    low, high = evaluation.intervals[metric]
    if high - low < WIDE:
        return []
    count = len(evaluation.samples)
    images = "1 test image leaves" if count == 1 else f"{count:,} test images leave"
    next_step = "Measure on more labelled images."
    if drawn:
        next_step = (
            "Label more images, or train again with --trainer.seed 1, 2, 3 and more: each seed draws another test set. "
            "Then compare the means."
        )
    return [
        f"{images} {metric} between {low:.2f} and {high:.2f} (95 % interval): too wide to compare models. {next_step}"
    ]


def closing_notes(
    run_dir: Path, evaluation: EvaluationConfig, prefix: str, *, source: str, images: bool
) -> list[tuple[str, str]]:
    """Return (topic, sentence) pairs to print when a training ends, from the run's `report.json`.

    source: `data.source`; images: whether the network reads images; prefix: text before `refract` in printed commands, see
    `console.bin_prefix`.
    """
    try:
        numbers = json.loads((run_dir / "report.json").read_text("utf-8"))
    except FileNotFoundError:
        return []
    notes = [("note", note) for note in numbers.get("notes", [])]
    if numbers.get("abstaining", {}).get("abstain_below", 0) >= 1:
        wanted = evaluation.precision
        what = "abstains on every image" + (" and predicts parents only" if predicts_parents(numbers) else "")
        notes.append(
            ("note", f"The bundle {what}: on the validation set no confidence reaches {wanted:.0%} precision. "
             "Add validation images, or lower --evaluation.precision.")
        )  # fmt: skip
    full = f"{prefix}refract evaluate {shlex.quote(str(run_dir / 'bundle'))} {shlex.quote(source)} --robustness full"
    if (robustness := numbers.get("robustness")) is not None:
        command = "" if evaluation.robustness == "full" else f"; to measure all images: {full}"
        return [*notes, ("robust", robustness["summary"] + command)]
    if evaluation.robustness == "auto" and images:
        reason = "it would take more than a third of the training time"
        return [*notes, ("robust", f"not measured, because {reason}; to measure it: {full}")]
    return notes
