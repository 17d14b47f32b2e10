"""Draw the plots of docs/ from the committed results.

speed.png: the recipes against their peers, and each op against the fastest peer. growth.png: processor time and memory against the
numbers of samples and classes.

    python -m benchmarks.plot
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    for draw in (speed, growth):
        target = DOCS / f"{draw.__name__}.png"
        draw().savefig(target, dpi=90)
        print(f"wrote {target}")


def speed() -> Figure:
    recipes = json.loads((RESULTS / "augment.json").read_text())["cases"]
    ops = json.loads((RESULTS / "augment_ops.json").read_text())["sides"]["224"]
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(2, len(recipes), height_ratios=(1, 2.4))
    for place, (title, rows) in enumerate(recipes.items()):
        axes = figure.add_subplot(grid[0, place])
        names = [name.replace(" (", "\n(") for name in rows]
        axes.barh(
            names,
            [row["images_per_second"] for row in rows.values()],
            color=["tab:red"] + ["tab:grey"] * (len(rows) - 1),
        )
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("images per second, one core", fontsize=8)
        axes.tick_params(labelsize=7)
    axes = figure.add_subplot(grid[1, :])
    ordered = sorted(ops.items(), key=lambda item: item[1]["over_fastest_peer"])
    ratios = [row["over_fastest_peer"] for _, row in ordered]
    labels = [f"{name} ({row['fastest_peer']})" for name, row in ordered]
    axes.barh(labels, ratios, color=["tab:red" if ratio >= 1 else "tab:orange" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_title("each op at 224 × 224 pixels: red is faster than the fastest peer, orange slower", fontsize=9)
    axes.set_xlabel("images per second, divided by those of the fastest peer (in brackets)", fontsize=8)
    axes.tick_params(labelsize=7)
    return figure


def growth() -> Figure:
    results = json.loads((RESULTS / "growth.json").read_text())
    lines = {
        "first step": [(row["samples"], row) for row in results["samples"]],
        "first step, images checked before": [
            (row["samples"], {key.removeprefix("again_"): value for key, value in row.items() if "again" in key})
            for row in results["samples"]
        ],
        **{
            name: [(row["samples"], row[name]) for row in results.get("commands", [])]
            for name in ("train", "evaluate", "score", "retrain")
        },
    }
    classes = {"evaluation, two samples per class": [(row["classes"], row) for row in results["classes"]]}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex="col", layout="constrained", width_ratios=(2, 1))
    for column, (size, each) in enumerate((("samples", lines), ("classes", classes))):
        for row, (value, title) in enumerate(
            (("processor_seconds", "processor time, s"), ("peak_mb", "most memory, MB"))
        ):
            for name, points in each.items():
                numbers, values = [number for number, _ in points], [measured[value] for _, measured in points]
                axes[row, column].loglog(numbers, values, marker="o", markersize=4, linewidth=1.2, label=name)
            axes[row, column].set_ylabel(title, fontsize=8)
            axes[row, column].tick_params(labelsize=7)
            axes[row, column].grid(which="major", linewidth=0.4)
            axes[row, column].set_ylim(bottom=100 if value == "peak_mb" else 1)
        axes[0, column].legend(fontsize=7)
        axes[1, column].set_xlabel(size, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
