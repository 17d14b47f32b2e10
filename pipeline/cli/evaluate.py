"""`refract evaluate BUNDLE DATA`"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from refract.pipeline.cli import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="refract evaluate", description="Measure a bundle on labelled images.")
    parser.add_argument("bundle", help="a bundle's folder")
    parser.add_argument(
        "data", help="a folder (CLASS/… or train|val|test/CLASS/…), a CSV or Parquet manifest, or `digits`"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="default: test where the data has it, else all of it"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there too")
    parser.add_argument(
        "--report", metavar="DIR", type=Path, help="write report.html, with its images inside, and report.json there"
    )
    parser.add_argument(
        "--robustness",
        choices=("none", "quick", "full"),
        default="none",
        help="error under 19 corruptions, with its interval: none (the default) does not measure it, quick takes 50 images and 3 "
        "severities, full all images and 5",
    )
    args = parser.parse_args(argv)
    return console.run("evaluate", lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> int:
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.data.manifest import DataError, load_manifest
    from refract.pipeline.data.prepare import held_out
    from refract.pipeline.data.sources.folders import skipped_lines
    from refract.pipeline.evaluation.advice import notes_on
    from refract.pipeline.evaluation.evaluate import evaluate
    from refract.pipeline.evaluation.report import make_report
    from refract.pipeline.evaluation.robustness import EFFORTS, measure_robustness
    from refract.pipeline.evaluation.slices import slices
    from refract.pipeline.files import write_atomically
    from refract.pipeline.inference.scoring import preprocess_of

    bundle = load_bundle(args.bundle)
    info = bundle.info
    manifest = load_manifest(args.data, "multilabel" if info.task == "multilabel" else "multiclass", to_train=False)
    drawn = "test" not in manifest.splits()
    if drawn:
        manifest = held_out(info, manifest)  # which reports what it skips
    for line in () if drawn else skipped_lines(manifest.skipped):
        print(f"refract evaluate: {args.data}: {line}", file=sys.stderr)
    samples = relabelled(manifest, info.labels)
    split = args.split or ("test" if "test" in manifest.splits() else None)
    if split is not None:
        samples = [sample for sample in samples if sample.split == split]
    if not samples:
        raise DataError(
            f"{args.data}: no images in the split {split}; it has {', '.join(manifest.splits()) or 'no splits'}"
        )
    classifier = bundle.classifier()
    if args.robustness != "none" and "images" not in classifier.reads:
        raise DataError(
            f"--robustness: {args.bundle} reads no images, so that none can be corrupted; leave the option out"
        )
    answering: dict[str, Any] = {
        "task": info.task, "temperature": info.temperature, "thresholds": info.thresholds
    }  # fmt: skip
    result = evaluate(classifier, preprocess_of(info), samples, labels=info.labels, **answering)
    notes = notes_on(result, drawn=False)
    print(f"{info.name} on {len(samples):,} images of {args.data} ({split or 'all'})")
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
        print(f"  no images of {len(absent)} labels, which macro_f1 takes as 0: {', '.join(absent[:10])}{more}")
    width = max(len(row["label"]) for row in result.per_class)
    print(f"  {'label':<{width}}  precision  recall      f1   count{'  threshold' if result.thresholds else ''}")
    for row in result.per_class:
        threshold = f"  {row['threshold']:9.4f}" if result.thresholds else ""
        print(
            f"  {row['label']:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['count']:6d}{threshold}"
        )
    parts = slices(samples, result.right)
    for part in parts:
        low = f", worse than the whole ({result.right.mean():.4f})" if part.worse else ""
        print(f"  {part.column} = {part.value}  {part.right:.4f} right of {part.count}{low}")
    robustness = None
    if args.robustness != "none":
        seed = info.config.get("trainer", {}).get("seed", 0)  # as the training did
        robustness = measure_robustness(
            classifier, preprocess_of(info), samples, EFFORTS[args.robustness], seed=seed, **answering
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
        report = make_report(
            f"{info.name} on {args.data}", result, info.labels, facts=facts, robustness=robustness,
            precision=info.config.get("evaluation", {}).get("precision", 0.95), abstain_below=info.abstain_below,
            near=manifest.near_of(samples), notes=notes,
        )  # fmt: skip
        print("wrote " + ", ".join(map(str, report.write(args.report))))
    if args.json:
        confusion = None if result.confusion is None else result.confusion.tolist()
        numbers = {"bundle": bundle.digest, "images": len(samples), "split": split, "metrics": result.metrics}
        numbers |= {"labels": list(info.labels), "per_class": result.per_class, "confusion": confusion}
        numbers |= {
            "notes": notes,
            "intervals": result.intervals,
            "slices": [dataclasses.asdict(part) for part in parts],
        }
        if drawn:  # else nobody has looked
            numbers |= {"near_duplicates": [[a.path, b.path] for a, b in manifest.near_of(samples)]}
        numbers |= {"robustness": robustness.to_dict()} if robustness is not None else {}
        write_atomically(args.json, json.dumps(numbers, indent=2, ensure_ascii=False).encode())
        print(f"wrote {args.json}")
    return 0


def relabelled(manifest, labels):
    """The samples with their labels' places in the bundle. DataError names labels that the bundle does not know."""
    from dataclasses import replace

    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.data.sources.folders import inner_hint, label_of

    known = {label_of(label): place for place, label in enumerate(labels)}
    unknown = [label for label in manifest.labels if label not in known]
    if unknown:
        hint = inner_hint(manifest.source) if Path(manifest.source).is_dir() else ""
        raise DataError(
            f"{manifest.source}: the bundle does not know {len(unknown)} of the labels: {', '.join(unknown[:20])}; it knows "
            f"{', '.join(labels[:20])}{' …' if len(labels) > 20 else ''}{hint}"
        )
    place = [known[label] for label in manifest.labels]
    return [replace(sample, labels=tuple(place[i] for i in sample.labels)) for sample in manifest.samples]
