"""`refract drift BUNDLE NEW_DATA`"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.pipeline.cli import console

if TYPE_CHECKING:
    from refract.pipeline.drift.compare import Drift

STOP = 20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract drift",
        description="Tell whether new data are still of the kind that a bundle was measured on. Exit code 0 where nothing stops, "
        f"though it may warn, {STOP} where a check passes the threshold to stop, 2 where it cannot be told.",
    )
    parser.add_argument("bundle", help="a bundle's folder")
    parser.add_argument(
        "data",
        help="images in a folder, in CLASS/… folders, a CSV or Parquet table (path or text, perhaps label), `digits`, or what a server "
        "sampled (refract serve --sample)",
    )
    parser.add_argument(
        "--reference",
        metavar="DATA",
        help="held-out data to compare with, in place of those whose profile is in the bundle",
    )
    parser.add_argument(
        "--test", choices=("mmd", "classifier"), default="mmd",
        help="of the features: maximum mean discrepancy (default), or how well a classifier tells both apart",
    )  # fmt: skip
    parser.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=2000,
        help="of the new data, drawn at random (default 2000; 0: all)",
    )
    parser.add_argument("--unlabelled", action="store_true", help="folders and the column label are no classes")
    for level in ("warn", "stop"):
        parser.add_argument(
            f"--{level}", action="append", default=[], metavar="CHECK=EFFECT",
            help=f"{level} from this effect on, or `never`; as features=0.05; may come several times",
        )  # fmt: skip
    parser.add_argument(
        "--thresholds", metavar="FILE", type=Path, help="YAML: {features: {warn: 0.02, stop: 0.1}, …}; null for never"
    )
    parser.add_argument("--report", metavar="DIR", type=Path, help="write report.html and report.json there")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there")
    args = parser.parse_args(argv)
    if args.images < 0:
        parser.error(f"--images: {args.images} is below 0")
    return console.run("drift", lambda: _drift(args))


def _drift(args: argparse.Namespace) -> int:
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.drift.measure import measure_drift
    from refract.pipeline.files import write_atomically

    thresholds = _thresholds(args)
    found = measure_drift(
        load_bundle(args.bundle), args.data, reference=args.reference, test=args.test, thresholds=thresholds,
        images=args.images, unlabelled=args.unlabelled,
    )  # fmt: skip
    for path, why in list(found.bad.items())[:5]:
        print(f"refract drift: {path}: left out: {why}", file=sys.stderr)
    if len(found.bad) > 5:
        print(f"refract drift: and {len(found.bad) - 5} others that cannot be read", file=sys.stderr)
    _show(found.drift)
    if args.report:
        print("wrote " + ", ".join(map(str, found.report.write(args.report))))
    if args.json:
        numbers = {**found.report.numbers, "unreadable": dict(found.bad)}
        write_atomically(args.json, json.dumps(numbers, indent=2, ensure_ascii=False).encode())
        print(f"wrote {args.json}")
    return STOP if found.drift.level == "stop" else 0


def _show(drift: "Drift") -> None:
    print(f"{drift.count:,} new samples with {drift.reference_count:,} of the reference")
    print(f"  {'check':<17}{'measure':<12}{'distance':>9}{'chance':>9}{'p':>8}{'effect':>9}")
    for check in drift.checks:
        p = "" if check.p is None else f"{check.p:.4f}"
        told = "" if check.level == "none" else f"  {check.level}"
        print(
            f"  {check.name:<17}{check.measure:<12}{check.value:>9.4f}{check.chance:>9.4f}{p:>8}{check.effect:>9.4f}{told}"
        )
    for name, counts in (("new", drift.new_classes), ("vanished", drift.vanished)):
        if counts:
            print(f"  {name} classes: {', '.join(f'{label} ({count})' for label, count in counts.items())}")
    if drift.far is not None:
        print(f"  {drift.far:.1%} are farther from the reference than 99 % of its own")
    if any(check.p is not None for check in drift.checks):
        print(
            "  p: of so much by chance, adjusted for the number of checks (Holm); effect: what --warn and --stop go by"
        )
    those = ", ".join(check.name for check in drift.checks if check.level == drift.level)
    told = {"none": "no drift", "warn": "drift: warning", "stop": "drift: stop"}[drift.level]
    print(f"{told} ({those})" if those and drift.level != "none" else told)


def _thresholds(args: argparse.Namespace) -> Any:
    """DataError names the option."""
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.drift.thresholds import THRESHOLDS, parse_thresholds

    found = dict(THRESHOLDS)
    if args.thresholds:
        import yaml

        try:
            given = yaml.safe_load(args.thresholds.read_text())
            if not isinstance(given, dict):
                raise ValueError("expected {check: {warn: number, stop: number}}")
            found = parse_thresholds(given, found)
        except (ValueError, yaml.YAMLError) as error:
            raise DataError(f"--thresholds {args.thresholds}: {error}") from error
    for level in ("warn", "stop"):
        for text in getattr(args, level):
            name, _, value = text.rpartition("=")
            try:
                found = parse_thresholds({name: {level: None if value == "never" else float(value)}}, found)
            except ValueError as error:
                raise DataError(f"--{level} {text}: {error}; it is CHECK=EFFECT, as features=0.05") from error
    return found
