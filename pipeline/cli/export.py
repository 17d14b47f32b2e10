"""`refract export BUNDLE --to TARGET -o FOLDER`"""

import argparse
from pathlib import Path

from refract import output
from refract.pipeline import console
from refract.pipeline.export.targets import TARGETS


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract export",
        description="Write a bundle's network for another runtime, with the normalisation inside, and its preprocessing: preprocess.json, "
        "preprocess.py and preprocess.js. The export is run on the bundle's golden samples and compared before it is written.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or its URL")
    parser.add_argument("--to", required=True, choices=tuple(TARGETS), help="the format: see docs/export.md")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FOLDER", help="a new or empty folder for the export"
    )
    parser.add_argument(
        "--int8", action="store_true", help="quantise to 8-bit integers, for onnx, openvino, triton and web"
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="with --int8: measure the ranges of activations on these training images "
        "(default: the bundle's thumbnails of training images and its golden samples)",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="with --int8: measure the accuracy on the test set of these images (default: on the golden samples)",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        metavar="POINTS",
        help="with --int8: refuse a larger loss of accuracy, in percentage points (default 0.5)",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="PACKAGE",
        help="with --to web: the npm package onnxruntime-web, unpacked or as .tgz (default: from the cache folder, where npm puts it)",
    )
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    for name in ("calibrate", "data", "max_loss"):
        if getattr(args, name) is not None and not args.int8:
            parser.error(f"--{name.replace('_', '-')} belongs to --int8; add --int8 or remove it")
    if args.max_loss is not None and not 0 <= args.max_loss <= 100:
        parser.error(f"--max-loss: {args.max_loss:g} is not in 0…100")
    return console.run("export", lambda: _export(args), plugins=args.plugin)


def _export(args: argparse.Namespace) -> int:
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.export.export import export
    from refract.pipeline.export.int8 import Int8

    max_loss = 0.5 if args.max_loss is None else args.max_loss
    int8 = Int8(args.calibrate, args.data, max_loss) if args.int8 else None
    done = export(load_bundle(args.bundle), args.to, args.output, int8, runtime=args.runtime)
    samples, bound, largest, others = done.comparison
    labels = f"{others} with other labels" if others else "the same labels"
    print(f"{samples} golden samples: {labels}, probabilities differ by at most {largest:.2g} (allowed {bound:g})")
    if done.accuracy is not None:
        measured = done.accuracy
        print(
            f"8-bit integers, calibrated on {done.calibrated_on}: {measured.of} {measured.before:.4f} before, {measured.after:.4f} after "
            f"({measured.samples:,} samples)"
        )
    print(f"wrote {args.output}:")
    for name, size in done.sizes.items():
        print(f"  {name:<27} {size / 1e6:9,.3f} MB")
    accuracy = done.accuracy and {
        "of": done.accuracy.of, "samples": done.accuracy.samples, "before": done.accuracy.before, "after": done.accuracy.after,
        "loss_points": done.accuracy.loss, "calibrated_on": done.calibrated_on,
    }  # fmt: skip
    output.result(
        {
            "folder": args.output, "target": args.to, "files": done.sizes, "seconds": round(done.seconds, 3),
            "check": done.comparison._asdict(), "int8": accuracy,
        }
    )  # fmt: skip
    return 0
