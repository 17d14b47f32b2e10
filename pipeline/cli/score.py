"""`refract score BUNDLE FOLDER_OR_MANIFEST -o out.parquet`"""

import argparse
import sys
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.inference.batch_scoring import Summary


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract score",
        description="Classify all images of a folder, or the rows of a manifest, into a Parquet file with one row per input. After an "
        "interruption, the same command resumes. An unreadable input gets a row with an error. Exit code 1 if no input has a prediction.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or its URL")
    parser.add_argument(
        "source", metavar="FOLDER_OR_MANIFEST",
        help="folder of images at any depth, or a CSV or Parquet file with the columns path and/or text; a column label is copied",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the Parquet file to write, or its URL")
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="how to run: processes on this machine (default) or a Ray cluster",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of processes (default: one per GPU, else one per core)",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="rows per batch (default 64)")
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="N",
        help="rows per intermediate file; a killed process repeats at most this many rows (default 512)",
    )
    parser.add_argument(
        "--tta",
        choices=("none", "flip", "flip-shift"),
        default="none",
        help="test-time augmentation: average the predictions for an image and its horizontal flip, and for shifts (default none)",
    )
    parser.add_argument(
        "--embeddings", action="store_true",
        help="add the column embedding: the input of the network's last layer, a list of numbers for each row",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default) uses GPUs if available"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing FILE when the new one is complete"
    )
    parser.add_argument("--restart", action="store_true", help="discard the intermediate files of an interrupted run")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    for name in ("jobs", "batch_size", "shard_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} is not at least 1")
    if not args.output.endswith(".parquet"):
        parser.error(f"-o: {args.output} does not end in .parquet")
    resume = f"the same command resumes{', without --restart' if args.restart else ''}"
    return console.run("score", lambda: _score(args), plugins=args.plugin, resume=resume)


def _score(args: argparse.Namespace) -> int:
    from refract.pipeline.inference.batch_scoring import Options
    from refract.pipeline.inference.remote_output import score_to

    options = Options(
        jobs=args.jobs, batch_size=args.batch_size, shard_size=args.shard_size, tta=args.tta, device=args.device, engine=args.engine,
        embeddings=args.embeddings, overwrite=args.overwrite, restart=args.restart,
    )  # fmt: skip
    summary = score_to(args.bundle, args.source, args.output, options)
    _report(args, summary)
    output.result({"file": args.output, **vars(summary)})
    return 1 if summary.errors == summary.rows else 0


def _report(args: argparse.Namespace, summary: "Summary") -> None:
    rate = f", {summary.scored / summary.seconds:,.0f} rows a second" if summary.scored else ""
    print(f"wrote {args.output}: {summary.rows:,} rows ({summary.scored:,} scored in {summary.seconds:.1f} s{rate})")
    if summary.labelled:
        fraction = summary.right / summary.labelled
        if summary.overlap is None:
            print(
                f"  predicted label equals the manifest's in {summary.right:,} of {summary.labelled:,} ({fraction:.1%})"
            )
        else:
            print(
                f"  labels are exactly the manifest's in {summary.right:,} of {summary.labelled:,} ({fraction:.1%}), "
                f"mean F1 of a row's labels {summary.overlap / summary.labelled:.4f}"
            )
    if summary.errors:
        print(f"  {summary.errors:,} without a prediction; the column `error` has the reasons:", file=sys.stderr)
        for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1])[:5]:
            print(f"    {count:,} × {reason}", file=sys.stderr)
