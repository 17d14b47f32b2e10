"""Measure how often the promotion gate accepts a challenger, by the holdout's size and the true difference in accuracy.

python -m benchmarks.gate_power --json benchmarks/results/gate_power.json

Draws the samples that only one of the two classifiers predicts right, and applies the gate's two rules about accuracy: the observed gain is
at least 0, and the lower end of its 95 % interval (normal approximation) is at least the bound. The former bound was -0.03 for every size;
the current one depends on the size.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.report import environment, write
from refract.pipeline.retraining.holdout_size import Z, lowest_gain

SIZES = (100, 120, 200, 500, 1000, 2000, 5000, 10000)
DIFFERENCES = (-0.02, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02)
BEFORE = -0.03


def accepted(count: int, difference: float, bound: float, *, disagreement: float, draws: int, seed: int) -> float:
    """Return the fraction of `draws` holdouts of `count` samples on which the gate accepts a true difference."""
    only = np.array([disagreement + difference, disagreement - difference]) / 2
    rng = np.random.default_rng([seed, count])  # one stream for both bounds and all differences of a size
    drawn = rng.multinomial(count, [*only, 1 - disagreement], size=draws)
    gain = (drawn[:, 0] - drawn[:, 1]) / count
    spread = np.sqrt(((drawn[:, 0] + drawn[:, 1]) / count - gain**2) / count)
    return float(((gain >= 0) & (gain - Z * spread >= bound)).mean())


def table(rows: list[dict[str, float]], key: str) -> str:
    """Return a Markdown table of one rule, with a row for each size and a column for each difference in points."""
    lines = ["| holdout | bound | " + " | ".join(f"{100 * d:+g}" for d in DIFFERENCES) + " |"]
    lines.append("|---" * (len(DIFFERENCES) + 2) + "|")
    for size in SIZES:
        size_rows = [row for row in rows if row["size"] == size]
        cells = " | ".join(f"{row[key]:.0%}" for row in size_rows)
        lines.append(f"| {size:,} | {size_rows[0][f'{key}_bound']:.3f} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--disagreement",
        type=float,
        default=0.1,
        help="fraction of the samples that only one classifier predicts right",
    )
    parser.add_argument("--draws", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = {"disagreement": args.disagreement, "draws": args.draws, "seed": args.seed}
    rows = []
    for size in SIZES:
        for difference in DIFFERENCES:
            row = {"size": size, "difference": difference}
            for key, bound in (("before", BEFORE), ("now", lowest_gain(size))):
                row |= {key: accepted(size, difference, bound, **options), f"{key}_bound": bound}
            rows.append(row)
    for key in ("before", "now"):
        print(f"{key}: accepted, by the true difference in points\n{table(rows, key)}\n")
    if args.json:
        write(args.json, {**environment("numpy"), **options, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
