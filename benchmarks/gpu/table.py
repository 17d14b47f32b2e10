"""The final lines: each number next to its goal."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.plan import STAGES, Measure

Row = tuple[str, Measure, float | None, str]
"""(stage, measure, value or None, verdict or the reason why the value is missing)."""


def rows(stages: Mapping[str, Any], *, judged: bool) -> Iterator[Row]:
    """A row for each measure of the plan. stages: name → a stage's record; judged: compare with the goals."""
    for name, stage in STAGES.items():
        record = stages.get(name)
        for measure in stage.measures:
            value = None if record is None else record["values"].get(measure.name)
            if value is None:
                yield name, measure, None, f"not measured ({_reason(record, measure.name)})"
                continue
            met = measure.met(value) if judged else None
            yield name, measure, value, {None: "", True: "reached", False: "MISSED"}[met]


def lines(stages: Mapping[str, Any], *, judged: bool) -> Iterator[str]:
    """The rows as text."""
    for name, measure, value, verdict in rows(stages, judged=judged):
        shown = "" if value is None else f"{value:,.5g} {measure.unit}".strip()
        bound = "" if measure.goal is None else f"goal {'≤' if measure.at_most else '≥'} {measure.goal:g}"
        yield f"{name:<11}  {measure.name:<52}  {shown:>18}  {bound:<11}  {verdict}".rstrip()


def _reason(record: Mapping[str, Any] | None, name: str) -> str:
    if record is None:
        return "the stage was not asked for"
    reason: str = record["skipped"].get(name) or record.get("ending") or "the stage gave no reason"
    return reason
