"""`refract drift BUNDLE NEW_DATA`"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.drift.compare import Drift

STOP = 20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract drift",
        description="Compare new data with the held-out data that a bundle was evaluated on. Exit codes: 0 no drift, or warnings only; "
        f"{STOP} a check reaches its stop threshold; 2 the input cannot be used.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or its URL")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="images in a folder or in CLASS/… folders, a CSV or Parquet table (path or text, optionally label), `digits`, or a server's "
        "sampled inputs (refract serve --sample)",
    )
    parser.add_argument(
        "--reference",
        metavar="DATA",
        help="held-out data to compare with (default: the profile in the bundle)",
    )
    parser.add_argument(
        "--test", choices=("mmd", "classifier"), default="mmd",
        help="test of the features: maximum mean discrepancy (default), or the accuracy of a classifier that separates both",
    )  # fmt: skip
    parser.add_argument(
        "--images",
        "--pictures",  # the name in earlier versions
        metavar="N",
        type=int,
        default=2000,
        help="number of new samples, drawn at random (default 2000; 0: all)",
    )
    parser.add_argument("--unlabelled", action="store_true", help="ignore folder names and the column label")
    for level in ("warn", "stop"):
        parser.add_argument(
            f"--{level}", action="append", default=[], metavar="CHECK=EFFECT",
            help=f"{level} from this effect on, or `never`; such as features=0.05; repeatable",
        )  # fmt: skip
    parser.add_argument(
        "--thresholds", metavar="FILE", type=Path, help="YAML: {features: {warn: 0.02, stop: 0.1}, …}; null for never"
    )
    parser.add_argument("--report", metavar="DIR", type=Path, help="write report.html and report.json to this folder")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON to FILE.json, or print it")
    parser.add_argument(
        "--features", metavar="FOLDER", default="features",
        help="the feature store that has or receives the embeddings, as of `refract embed` (default features; none: keep no embeddings)",
    )  # fmt: skip
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    if args.images < 0:
        parser.error(f"--images {args.images}: expected at least 0")
    return console.run("drift", lambda: _drift(args), plugins=args.plugin)


def _drift(args: argparse.Namespace) -> int:
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.drift.measure import measure_drift
    from refract.pipeline.files import write_atomically

    thresholds = _thresholds(args)
    measured = measure_drift(
        load_bundle(args.bundle), args.data, reference=args.reference, test=args.test, thresholds=thresholds,
        images=args.images, unlabelled=args.unlabelled, features=None if args.features == "none" else Path(args.features),
    )  # fmt: skip
    for path, why in list(measured.bad.items())[:5]:
        print(f"refract drift: {path}: skipped: {why}", file=sys.stderr)
    if len(measured.bad) > 5:
        print(f"refract drift: skipped {len(measured.bad) - 5} more unreadable files", file=sys.stderr)
    _show(measured.drift)
    if args.report:
        print("wrote " + ", ".join(map(str, measured.report.write(args.report))))
    numbers = {**measured.numbers, "unreadable": dict(measured.bad)}
    output.result(numbers)
    if args.json:
        write_atomically(args.json, json.dumps(numbers, indent=2, ensure_ascii=False).encode())
        print(f"wrote {args.json}")
    return STOP if measured.drift.level == "stop" else 0


def _show(drift: "Drift") -> None:
    print(f"{drift.count:,} new samples, {drift.reference_count:,} reference samples")
    print(f"  {'check':<17}{'measure':<12}{'distance':>9}{'chance':>9}{'p':>8}{'effect':>9}")
    for check in drift.checks:
        p = "" if check.p is None else f"{check.p:.4f}"
        level = "" if check.level == "none" else f"  {check.level}"
        print(
            f"  {check.name:<17}{check.measure:<12}{check.value:>9.4f}{check.chance:>9.4f}{p:>8}{check.effect:>9.4f}{level}"
        )
    for name, counts in (("new", drift.new_classes), ("vanished", drift.vanished)):
        if counts:
            print(f"  {name} classes: {', '.join(f'{label} ({count})' for label, count in counts.items())}")
    if drift.far is not None:
        print(f"  {drift.far:.1%} of the new samples are farther from the reference than 99 % of the reference samples")
    if any(check.p is not None for check in drift.checks):
        print(
            "  p: probability of this distance by chance, Holm-corrected; effect: distance minus chance, for --warn and --stop"
        )
    checks = ", ".join(check.name for check in drift.checks if check.level == drift.level)
    verdict = {"none": "no drift", "warn": "drift: warning", "stop": "drift: stop"}[drift.level]
    print(f"{verdict} ({checks})" if checks and drift.level != "none" else verdict)


def _thresholds(args: argparse.Namespace) -> Any:
    """Merge the thresholds of --thresholds, --warn and --stop into the defaults. DataError names the option."""
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.drift.thresholds import THRESHOLDS, parse_thresholds

    thresholds = dict(THRESHOLDS)
    if args.thresholds:
        import yaml

        try:
            values = yaml.safe_load(args.thresholds.read_text())
            if not isinstance(values, dict):
                raise ValueError("expected {check: {warn: number, stop: number}}")
            thresholds = parse_thresholds(values, thresholds)
        except (ValueError, yaml.YAMLError) as error:
            raise DataError(f"--thresholds {args.thresholds}: {error}") from error
    for level in ("warn", "stop"):
        for text in getattr(args, level):
            name, _, value = text.rpartition("=")
            try:
                thresholds = parse_thresholds({name: {level: None if value == "never" else float(value)}}, thresholds)
            except ValueError as error:
                raise DataError(f"--{level} {text}: {error}; expected CHECK=EFFECT, such as features=0.05") from error
    return thresholds
