"""`refract evaluate BUNDLE DATA`"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.evaluation.evaluate import Evaluation
    from refract.pipeline.evaluation.slices import Slice


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="refract evaluate", description="Measure a bundle on labelled images.")
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or its URL")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="data set: a folder (CLASS/… or train|val|test/CLASS/…), a CSV or Parquet manifest, or `digits`",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="split to measure (default: test if the data has one, else all samples)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON to FILE.json, or print it")
    parser.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="write report.html, with embedded images, and report.json to this folder",
    )
    parser.add_argument(
        "--robustness",
        choices=("none", "quick", "full"),
        default="none",
        help="measure the error under 19 corruptions, with its interval: none (default), quick (50 images, 3 severities) or full "
        "(all images, 5 severities)",
    )
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    return console.run("evaluate", lambda: _evaluate(args), plugins=args.plugin)


def _evaluate(args: argparse.Namespace) -> int:
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.data.sources.folders import skipped_lines
    from refract.pipeline.evaluation.advice import notes_on
    from refract.pipeline.evaluation.evaluate import evaluate
    from refract.pipeline.evaluation.hierarchy import back_off_lines, back_off_numbers, with_levels
    from refract.pipeline.evaluation.report import make_report
    from refract.pipeline.evaluation.robustness import EFFORTS, measure_robustness
    from refract.pipeline.evaluation.slices import slices
    from refract.pipeline.evaluation.test_data import labelled_data, samples_of
    from refract.pipeline.files import write_atomically
    from refract.pipeline.inference.scoring import preprocess_of

    bundle = load_bundle(args.bundle)
    info = bundle.info
    manifest, without_test = labelled_data(args.data, info)
    for line in [] if without_test else skipped_lines(manifest.skipped):  # else they are logged
        print(f"refract evaluate: {args.data}: {line}", file=sys.stderr)
    samples, split = samples_of(manifest, info.labels, args.split)
    classifier = bundle.classifier()
    if args.robustness != "none" and "images" not in classifier.reads:
        raise DataError(f"--robustness: {args.bundle} reads no images; remove the option")
    decision: dict[str, Any] = {
        "task": info.task, "temperature": info.temperature, "thresholds": info.thresholds
    }  # fmt: skip
    result = evaluate(classifier, preprocess_of(info), samples, labels=info.labels, **decision)
    result = with_levels(result, info.tree)
    notes, parts = notes_on(result, drawn=False), slices(samples, result.right)
    print(f"{info.name} on {len(samples):,} images of {args.data} ({split or 'all'})")
    _print_result(result, notes, parts)
    back_off, threshold = None, None if info.hierarchy is None else info.hierarchy["threshold"]
    if info.tree is not None and info.abstain_below is not None and threshold is not None:
        back_off = back_off_numbers(result, info.tree, info.abstain_below, threshold)
        for line in back_off_lines(back_off):
            print(f"  {line}")
    robustness = None
    if args.robustness != "none":
        seed = info.config.get("trainer", {}).get("seed", 0)  # the seed of the training
        robustness = measure_robustness(
            classifier, preprocess_of(info), samples, EFFORTS[args.robustness], seed=seed, **decision
        )
        print(f"  {robustness.text()}")
        for severity, error in list(robustness.by_severity().items())[1:]:
            print(f"    severity {severity}: error {error:.4f}")
    if args.report:
        facts = {
            "bundle": bundle.digest[:16],
            "data": f"{args.data} ({split or 'all'})",
            "images": f"{len(samples):,}",
        }
        trained = info.config.get("evaluation", {})
        report = make_report(
            f"{info.name} on {args.data}", result, info.labels, facts=facts, robustness=robustness,
            precision=trained.get("precision", 0.95), abstain_below=info.abstain_below, back_off=threshold,
            images=trained.get("images", True),
            near=manifest.near_of(samples), notes=notes, subject=f"The bundle {info.name}",
        )  # fmt: skip
        print("wrote " + ", ".join(map(str, report.write(args.report))))
    numbers = {
        "bundle": bundle.digest,
        "images": len(samples),
        "split": split,
        **_numbers(result, info.labels, notes, parts),
    }
    if without_test:  # else near-duplicates were not searched
        numbers |= {"near_duplicates": [[a.path, b.path] for a, b in manifest.near_of(samples)]}
    numbers |= {"robustness": robustness.to_dict()} if robustness is not None else {}
    numbers |= {"back_off": back_off} if back_off is not None else {}
    output.result(numbers)
    if args.json:
        write_atomically(args.json, json.dumps(numbers, indent=2, ensure_ascii=False).encode())
        print(f"wrote {args.json}")
    return 0


def _numbers(
    result: "Evaluation", labels: Sequence[str], notes: Sequence[str], parts: "Sequence[Slice]"
) -> dict[str, Any]:
    return {
        "metrics": result.metrics,
        "labels": list(labels),
        "per_class": result.per_class,
        **({"confusion": None} if result.confusion is None else result.confusion.to_json(labels)),
        "notes": list(notes),
        "intervals": result.intervals,
        "slices": [dataclasses.asdict(part) for part in parts],
    }


def _print_result(result: "Evaluation", notes: Sequence[str], parts: "Sequence[Slice]") -> None:
    """Print the metrics with intervals, the notes, a line for each class, and a line for each part of the data."""
    for name, value in result.metrics.items():
        bounds = result.intervals.get(name)
        print(
            f"  {name:<24} {value:.4f}"
            + ("" if bounds is None else "  (95 % interval {:.4f} to {:.4f})".format(*bounds))
        )
    for note in notes:
        print(f"  note: {note}")
    absent = [row["label"] for row in result.per_class if not row["count"]]
    if absent:
        more = " …" if len(absent) > 10 else ""
        print(f"  {len(absent)} labels have no images and count as 0 in macro_f1: {', '.join(absent[:10])}{more}")
    width = max(len(row["label"]) for row in result.per_class)
    print(f"  {'label':<{width}}  precision  recall      f1   count{'  threshold' if result.thresholds else ''}")
    for row in result.per_class:
        threshold = f"  {row['threshold']:9.4f}" if result.thresholds else ""
        print(
            f"  {row['label']:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['count']:6d}{threshold}"
        )
    for part in parts:
        warning = f", below all samples ({result.right.mean():.4f})" if part.worse else ""
        print(f"  {part.column} = {part.value}  {part.right:.4f} correct of {part.count}{warning}")
