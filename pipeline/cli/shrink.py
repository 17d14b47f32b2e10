"""`refract shrink BUNDLE --budget-ms MS -o FOLDER`"""

import argparse
import math
import shlex
import sys
from pathlib import Path

from refract import output
from refract.pipeline import console

NO_FIT = 10
"""Exit code if no candidate is fast and accurate enough."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract shrink",
        description="Make a smaller classifier with the predictions of a larger one. Train smaller networks by distillation from the "
        "bundle, with its config and data; quantise each to 8-bit integers; measure accuracy, size and latency of all; choose the most "
        "accurate one within the budget. The same command resumes an interrupted one, and chooses again for another budget.",
        epilog="exit codes: 0 done; 2 invalid input; 10 no candidate is fast and accurate enough",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or its URL")
    parser.add_argument(
        "--budget-ms", required=True, type=float, metavar="MS", help="largest latency of one image on this machine"
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        default=[],
        metavar="NAME[:PIXELS]",
        help="networks to train, as model.name, and the shorter side of their input (default: the bundle's network at smaller sizes, "
        "and small networks)",
    )
    parser.add_argument("--data", metavar="DATA", help="the bundle's training data, if they have moved")
    parser.add_argument(
        "--max-loss",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="choose none that loses more accuracy, in percentage points (default 1)",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FOLDER", help="a new folder, or that of the same shrink"
    )
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    if not (math.isfinite(args.budget_ms) and args.budget_ms > 0):
        parser.error(f"--budget-ms: {args.budget_ms:g} is not a number of milliseconds above 0")
    if not 0 <= args.max_loss <= 100:
        parser.error(f"--max-loss: {args.max_loss:g} is not in 0…100")
    return console.run("shrink", lambda: _shrink(args), plugins=args.plugin, resume="the same command resumes")


def _shrink(args: argparse.Namespace) -> int:
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.shrink.run import shrink
    from refract.pipeline.shrink.table import LEGEND, no_fit, table

    done = shrink(
        load_bundle(args.bundle),
        args.output,
        budget_ms=args.budget_ms,
        max_loss=args.max_loss,
        networks=args.networks,
        source=args.data,
        plugins=args.plugin,
    )
    output.result(done.numbers)
    chosen = done.choice.chosen
    print(table(done.rows, chosen, args.max_loss))
    print(LEGEND)
    for name, reason in done.failed:
        print(f"skipped:  {name}: {reason}")
    print(f"folder:   {args.output}/ (shrink.json, runs/, int8/)")
    if chosen is None:
        print(f"refract shrink: {no_fit(done.rows, done.choice, args.budget_ms, args.max_loss)}", file=sys.stderr)
        return NO_FIT
    print(f"chosen:   {chosen.title()}, {chosen.shortest_ms:.3g} ms, accuracy {chosen.accuracy:.4f}")
    if chosen.precision == "float32":
        print(f"bundle:   {done.bundle}")
        if not output.is_quiet():
            print(f"next:     {console.bin_prefix()}refract serve {shlex.quote(str(done.bundle))}")
    else:
        print(f"export:   {done.bundle}, for {chosen.runtime} with preprocess.json: not a bundle, see docs/export.md")
    return 0
