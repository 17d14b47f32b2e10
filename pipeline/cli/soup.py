"""`refract soup RUN RUN… -o FOLDER`"""

import argparse
import dataclasses
import shlex
from pathlib import Path

from refract import output
from refract.pipeline import console
from refract.pipeline.cli.compare import compared


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract soup",
        description="Average the weights of finished runs of one network into one bundle, which costs no more to serve than one of them. "
        "Recompute the batch norms on training images, calibrate and evaluate the average, and compare it with the run that is best on "
        "validation. The runs need the same data, splits, labels, network and preprocessing, and should start from the same weights.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, two or more")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new folder of the average")
    parser.add_argument(
        "--method",
        choices=("greedy", "uniform"),
        default="greedy",
        help="greedy (default): start with the run of the best validation score, and add each further run unless the score of the average "
        "falls; uniform: average all runs",
    )
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error(f"got {len(args.runs)} run; expected two or more")
    return console.run("soup", lambda: _soup(args))


def _soup(args: argparse.Namespace) -> int:
    from refract.pipeline.training.soup import make_soup

    soup = make_soup(args.runs, args.output, args.method)
    output.result(dataclasses.asdict(soup))
    count = sum(member.averaged for member in soup.members)
    print(f"{soup.method} average of {count} of {len(soup.members)} runs: validation {soup.metric} {soup.score:.4f}")
    width = max(len(str(member.run)) for member in soup.members)
    for member in soup.members:
        why = "averaged" if member.averaged else f"not averaged: the average would have {member.with_it:.4f}"
        print(f"  {member.run!s:<{width}}  {member.score:.4f}  {why}")
    print("test:     " + ", ".join(f"{name} {value:.4f}" for name, value in soup.metrics.items()))
    best = soup.members[0].run
    print(
        f"{soup.run_dir} against {best}, the best on validation, {compared(soup.compared, soup.difference, soup.count)}"
    )
    print(f"folder:   {soup.run_dir}/ (report.html, soup.json, splits.csv)")
    print(f"bundle:   {soup.run_dir / 'bundle'}")
    if not output.is_quiet():
        bundle = shlex.quote(str(soup.run_dir / "bundle"))
        print(f"next:     {console.bin_prefix()}refract serve {bundle}")
    return 0
