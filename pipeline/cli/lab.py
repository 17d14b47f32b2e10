"""`refract lab [NAME…]`"""

import argparse
import re
import time
from pathlib import Path

from refract import output
from refract.pipeline import console
from refract.pipeline.config.config import ConfigError
from refract.pipeline.evaluation.plots import save
from refract.pipeline.lab import experiments
from refract.pipeline.lab.experiment import Outcome
from refract.progress import staged


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract lab",
        description="Test textbook claims by small seeded experiments and report which hold. Exit code 1 if a claim does not hold.",
    )
    parser.add_argument("name", nargs="*", help="experiments to run (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights, order and noise (default 0)")
    parser.add_argument("--plots", type=Path, help="folder for a plot of each experiment")
    args = parser.parse_args(argv)
    return console.run("lab", lambda: _lab(args))


def _lab(args: argparse.Namespace) -> int:
    available = experiments()
    for name in args.name:
        if name not in available:
            from refract.augment.ops.base import nearest

            raise ConfigError(f"no experiment {name!r}{nearest(name, available)} (experiments: {', '.join(available)})")
    failed = []
    for name in args.name or available:
        started = time.perf_counter()
        with staged(name):
            outcome = available[name].run(args.seed)
        claim, seconds = available[name].claim, time.perf_counter() - started
        print(f"{'holds' if outcome.holds else 'DOES NOT HOLD'}: {claim}")
        print(f"    {name}, {seconds:.1f} s: {outcome.summary}", flush=True)
        output.result(
            {"name": name, "holds": outcome.holds, "claim": claim, "summary": outcome.summary, "seconds": seconds}
        )
        if not outcome.holds:
            failed.append(name)
        if args.plots is not None and outcome.curves:
            _plot(args.plots / f"{name}.png", claim, outcome)
    if args.plots is not None:
        print(f"plots in {args.plots}/")
    if failed:
        print(
            f"{len(failed)} of {len(args.name or available)} claims did not hold with seed {args.seed}: {', '.join(failed)}"
        )
    return 1 if failed else 0


def _plot(path: Path, claim: str, outcome: Outcome) -> None:
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    if all(len(values) == 1 for values in outcome.curves.values()):
        axes.bar(list(outcome.curves), [values[0] for values in outcome.curves.values()])
    else:
        for name, values in outcome.curves.items():
            axes.plot(range(1, len(values) + 1), values, label=name, marker="o" if len(values) < 15 else None)
        axes.legend(fontsize=7)
    axes.set_yscale("log" if outcome.log else "linear")
    axes.set_xlabel(outcome.x)
    axes.set_ylabel(outcome.y)
    axes.set_title(re.sub(r"(.{60,75}) ", r"\1\n", claim), fontsize=8)
    axes.tick_params(labelsize=7)
    save(figure, path)
