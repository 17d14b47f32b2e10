"""`refract compare RUN RUN…`"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.evaluation.measures import Difference


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract compare",
        description="Compare finished runs: the differences of their configs, their test metrics, and the accuracy of each against the "
        "first run, with a bootstrap interval and McNemar's test, on the images of both test sets.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or their URLs, two or more")
    parser.add_argument("--curves", metavar="FILE", type=Path, help="write the learning curves to this PNG file")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error(f"got {len(args.runs)} run; expected two or more")
    return console.run("compare", lambda: _compare(args))


def _compare(args: argparse.Namespace) -> int:
    from refract.pipeline.evaluation.compare import against, curves, differences, read_run
    from refract.remote.address import path_or_url

    runs = [read_run(path_or_url(name)) for name in args.runs]
    comparisons = [(run, *against(runs[0], run)) for run in runs[1:]]
    rows = [(key, [str(value) for value in values]) for key, values in differences(runs).items()]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    metrics = [(name, [f"{run.metrics[name]:.4f}" if name in run.metrics else "-" for run in runs]) for name in names]
    width = max(len(name) for name, _ in [*rows, *metrics])
    columns = [
        max(12, *(len(values[i][:40]) for _, values in [*rows, *metrics]), len(run.name)) for i, run in enumerate(runs)
    ]

    def line(name: str, values: list[str]) -> None:
        print(
            f"{name:<{width}}  "
            + "  ".join(f"{value[:40]:>{size}}" for value, size in zip(values, columns, strict=True))
        )

    line("", [run.name for run in runs])
    for name, values in [*rows, *metrics]:
        line(name, values)
    metric = runs[0].metric
    for run, difference, count in comparisons:
        print(f"\n{run.name} against {runs[0].name} {compared(metric, difference, count)}")
    if args.curves:
        curves(runs, args.curves)
        print(f"wrote {args.curves}")
    output.result(
        {
            "runs": [run.name for run in runs],
            "config": dict(differences(runs)),
            "metrics": {name: [run.metrics.get(name) for run in runs] for name in names},
            "comparisons": [
                {"run": run.name, "against": runs[0].name, "images": count, "metric": metric, **vars(difference)}
                for run, difference, count in comparisons
            ],
        }
    )
    return 0


def compared(metric: str, difference: "Difference", count: int) -> str:
    """Describe a paired difference of two runs on `count` images."""
    chance = "more than chance" if difference.p_value < 0.05 else "within chance"
    return (
        f"on {count:,} images: {metric} {difference.value:+.4f}, 95 % interval {difference.low:+.4f} to {difference.high:+.4f}, "
        f"McNemar p = {difference.p_value:.3g}: {chance}"
    )
