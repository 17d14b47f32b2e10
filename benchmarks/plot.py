"""Draw docs/speed.png from the committed results: the recipes against their peers, and each op against the fastest peer.

python -m benchmarks.plot
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).with_name("results")
TARGET = Path(__file__).parents[1] / "docs" / "speed.png"


def main() -> None:
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
    figure.savefig(TARGET, dpi=90)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
