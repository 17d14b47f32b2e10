"""A proposal as a commented YAML config."""

from collections.abc import Sequence
from typing import Any

from refract.pipeline.suggest.proposal import Choice, Proposal
from refract.pipeline.suggest.survey import Survey

COMMENT_AT = 32
"""Column of the comments, unless a value is longer."""

SHOWN = 12
"""Labels whose counts the header lists."""


def config_text(proposal: Proposal, survey: Survey) -> str:
    """Return the YAML text: a header that describes the data, then the sections with their choices and reasons."""
    sections: dict[str, list[Choice]] = {}
    for choice in proposal.choices:
        sections.setdefault(choice.key.partition(".")[0], []).append(choice)
    parts = [_head(survey)]
    for section, choices in sections.items():
        parts.append("\n".join([f"{section}:", *(line for choice in choices for line in _lines(choice))]))
    return "\n\n".join(parts) + "\n"


def _head(survey: Survey) -> str:
    counts = ", ".join(f"{label} {count:,}" for label, count in list(survey.counts.items())[:SHOWN])
    more = f" and {len(survey.counts) - SHOWN} more" if len(survey.counts) > SHOWN else ""
    splits = (
        ", ".join(f"{split} {count:,}" for split, count in survey.splits.items()) or "not given: drawn from the seed"
    )
    kind = f"images of {survey.sizes} pixels" if survey.images else "texts"
    return "\n".join(
        [
            f"# {survey.samples:,} {kind}, {survey.task}, {len(survey.labels)} labels: {' '.join((counts + more).split())}",
            f"# Splits: {splits}. Written by `refract init`; train with `refract train THIS_FILE`.",
            "# Any key can also be set on the command line: --optim.lr 1e-3. `refract train --help` lists all keys.",
        ]
    )


def _lines(choice: Choice) -> list[str]:
    key, comment = choice.key.partition(".")[2], f"# {choice.reason}" if choice.reason else ""
    if choice.value is None and choice.from_data:
        return [f"  # {key} has its default: {choice.reason}"]
    if isinstance(choice.value, list):
        return [_aligned(f"  {key}:", comment), *(f"    - {_yaml(op)}" for op in choice.value)]
    return [_aligned(f"  {key}: {_yaml(choice.value)}", comment)]


def _aligned(text: str, comment: str) -> str:
    return f"{text.ljust(COMMENT_AT - 1)} {comment}".rstrip()


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, allow_unicode=True, default_flow_style=True, width=10_000)
    return text.removesuffix("\n...\n").strip()


def choice_table(choices: Sequence[Choice]) -> str:
    """Return the choices as aligned columns: key, value, reason."""
    keys = max(len(choice.key) for choice in choices)
    values = min(max(len(choice.shown) for choice in choices), 32)
    return "\n".join(
        f"  {choice.key.ljust(keys)}  {choice.shown.ljust(values)}  {choice.reason}".rstrip() for choice in choices
    )
