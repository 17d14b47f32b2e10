"""The table of a shrink: which rows are Pareto-optimal, which one is chosen, and how they are printed. Independent of files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One classifier, measured.

    name: of the network and its size; precision: float32 or int8; runtime: pytorch, onnx or openvino; folder: its bundle or export;
    accuracy: the fraction of right predictions in 0…1, for multi-label right in all labels; difference: to the accuracy of the original,
    with its 95 % interval low…high and McNemar's p_value; agreement: fraction of samples with the prediction of the original;
    megabytes: of the files of the network; shortest_ms, median_ms: latency of one image.
    """

    name: str
    network: str
    image_size: tuple[int, int]
    precision: str
    runtime: str
    folder: str
    accuracy: float
    difference: float
    low: float
    high: float
    p_value: float
    agreement: float
    megabytes: float
    shortest_ms: float
    median_ms: float

    @property
    def loss(self) -> float:
        """The loss of accuracy in percentage points, negative for a gain."""
        return -100 * self.difference

    def title(self) -> str:
        """Return the name with precision and runtime."""
        return f"{self.name} {self.precision} ({self.runtime})"


@dataclass(frozen=True)
class Choice:
    """chosen: the best row within the budget, None if none fits; nearest: the fastest row that is accurate enough."""

    chosen: Row | None
    nearest: Row | None


def dominates(row: Row, other: Row) -> bool:
    """Whether `row` is at least as good as `other` in accuracy, size and latency, and better in one of them."""
    a = (-row.accuracy, row.megabytes, row.shortest_ms)
    b = (-other.accuracy, other.megabytes, other.shortest_ms)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def pareto(rows: Sequence[Row]) -> list[bool]:
    """Return, for each row, whether no other row dominates it."""
    return [not any(dominates(other, row) for other in rows) for row in rows]


def accurate_enough(row: Row, max_loss: float) -> bool:
    """Whether the row loses at most `max_loss` percentage points."""
    return row.loss <= max_loss + 1e-9


def choose(rows: Sequence[Row], budget_ms: float, max_loss: float) -> Choice:
    """Choose the most accurate row within the budget that is accurate enough; of equals the smallest, then the fastest."""
    accurate = [row for row in rows if accurate_enough(row, max_loss)]
    fitting = [row for row in accurate if row.shortest_ms <= budget_ms]
    chosen = min(fitting, key=lambda row: (-row.accuracy, row.megabytes, row.shortest_ms), default=None)
    return Choice(chosen, min(accurate, key=lambda row: row.shortest_ms, default=None))


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, the fastest first."""
    return sorted(rows, key=lambda row: (row.shortest_ms, row.megabytes, -row.accuracy))


def no_fit(rows: Sequence[Row], choice: Choice, budget_ms: float, max_loss: float) -> str:
    """Say why no row is chosen, and what is nearest."""
    text = f"no candidate takes at most {budget_ms:g} ms and loses at most {max_loss:g} points"
    if (nearest := choice.nearest) is not None:
        text += f"; the nearest is {nearest.title()}: {nearest.shortest_ms:.3g} ms, {nearest.loss:.2f} points"
    within = [row for row in rows if row.shortest_ms <= budget_ms]
    if within:
        best = max(within, key=lambda row: row.accuracy)
        text += f"; the most accurate within the budget is {best.title()}, and loses {best.loss:.2f} points"
    return f"{text}; raise --budget-ms or --max-loss, or name smaller networks by --networks"


def table(rows: Sequence[Row], chosen: Row | None, max_loss: float) -> str:
    """Format the rows for the terminal, in their order."""
    head = ("", "candidate", "precision", "ms", "median", "accuracy", "difference", "95 % interval", "agreement", "MB")
    lines = [
        head,
        *(_cells(row, optimal, row is chosen, max_loss) for row, optimal in zip(rows, pareto(rows), strict=True)),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = (0, 1, 2)
    formatted = [
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    return "\n".join(line.rstrip() for line in formatted)


def _cells(row: Row, optimal: bool, chosen: bool, max_loss: float) -> tuple[str, ...]:
    mark = ("→" if chosen else " ") + ("*" if optimal else " ") + ("" if accurate_enough(row, max_loss) else "!")
    precision = row.precision if row.precision == "float32" else f"{row.precision} {row.runtime}"
    return (
        mark, row.name, precision, f"{row.shortest_ms:.3f}", f"{row.median_ms:.3f}", f"{row.accuracy:.4f}",
        f"{row.difference:+.4f}", f"{row.low:+.4f} to {row.high:+.4f}", f"{row.agreement:.4f}", f"{row.megabytes:.3f}",
    )  # fmt: skip


LEGEND = "→ chosen, * Pareto-optimal in accuracy, size and latency, ! loses more than --max-loss"


def to_json(rows: Sequence[Row], chosen: Row | None, max_loss: float) -> list[dict[str, Any]]:
    """Return the rows as plain JSON values, with their marks."""
    return [
        asdict(row) | {
            "image_size": list(row.image_size), "pareto_optimal": optimal, "too_inaccurate": not accurate_enough(row, max_loss),
            "chosen": row is chosen,
        }
        for row, optimal in zip(rows, pareto(rows), strict=True)
    ]  # fmt: skip
