"""What a user should know when a training or an evaluation ends: small test sets, bundles that always abstain, robustness not measured."""

import json
import shlex
from pathlib import Path

from refract.pipeline.config.config import Config
from refract.pipeline.evaluation.evaluate import Evaluation

WIDE = 0.15
"""Width of a 95 % interval from which it decides nothing: two usual models differ by less."""


def notes_on(evaluation: Evaluation, *, drawn: bool) -> list[str]:
    """Sentences about the accuracy, or for multi-label the sample F1, where its interval is WIDE or wider. drawn: whether the test set was
    drawn from the seed, so that another seed gives another one."""
    metric = "accuracy" if "accuracy" in evaluation.intervals else "sample_f1"
    low, high = evaluation.intervals[metric]
    if high - low < WIDE:
        return []
    count = len(evaluation.samples)
    images = "1 test image leaves" if count == 1 else f"{count:,} test images leave"
    cure = "Measure on more labelled images."
    if drawn:
        cure = (
            "Label more images, or train again with --trainer.seed 1, 2, 3 and more: each seed draws another test set. "
            "Then compare the means."
        )
    return [f"{images} {metric} between {low:.2f} and {high:.2f} (95 % interval): too wide to compare models. {cure}"]


def closing_notes(run_dir: Path, config: Config, prefix: str) -> list[tuple[str, str]]:
    """(topic, sentence) for the end of a training, from the run's `report.json`. prefix: of the `refract` command, see `console`."""
    try:
        numbers = json.loads((run_dir / "report.json").read_text("utf-8"))
    except FileNotFoundError:
        return []
    notes = [("note", note) for note in numbers.get("notes", [])]
    if numbers.get("abstaining", {}).get("abstain_below", 0) >= 1:
        wanted = config.evaluation.precision
        notes.append(
            ("note", f"The bundle leaves every answer to a person: on validation no confidence reaches {wanted:.0%} precision. "
             "Add validation images, or lower --evaluation.precision.")
        )  # fmt: skip
    full = f"{prefix}refract evaluate {shlex.quote(str(run_dir / 'bundle'))} {shlex.quote(config.data.source)} --robustness full"
    if (found := numbers.get("robustness")) is not None:
        more = "" if config.evaluation.robustness == "full" else f"; all images: {full}"
        return [*notes, ("robust", found["summary"] + more)]
    if config.evaluation.robustness == "auto" and config.model.name != "none":
        return [*notes, ("robust", f"not measured: it would take over a third of the training's time; {full}")]
    return notes
