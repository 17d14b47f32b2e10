"""`refract predict BUNDLE FILE_OR_FOLDER…`"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract import output
from refract.pipeline import console
from refract.remote.address import path_or_url

if TYPE_CHECKING:
    from refract.models.bundle.info import BundleInfo
    from refract.pipeline.inference.scoring import Scored


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract predict",
        description="Classify images with a bundle, or with a running server: `refract predict --url URL --help` lists its options. "
        "An unreadable image is reported, and the exit code is then 1.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or its URL")
    parser.add_argument(
        "paths",
        nargs="*",
        type=path_or_url,
        metavar="FILE_OR_FOLDER",
        help="images, or folders and archives of images, also at URLs",
    )
    parser.add_argument(
        "--text", action="append", help="text to classify, alone or with each image, for a bundle that reads texts"
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="labels per image (default 5)")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top: {args.top} is not at least 1")
    from refract.models.multimodal.tokens import trimmed

    texts = args.text or []
    if len(texts) > 1:
        parser.error("--text: given more than once; a request has one text")
    args.text = texts[0] if texts else ""
    if not args.paths and not trimmed(args.text):
        parser.error(f"--text: {args.text!r} is an empty text" if texts else "expected images or --text")
    return console.run("predict", lambda: _predict(args), plugins=args.plugin)


def _predict(args: argparse.Namespace) -> int:
    import torch

    from refract.models.bundle.bundle import load_bundle
    from refract.models.familiarity import Familiarity
    from refract.pipeline.data import storage
    from refract.pipeline.inference.scoring import SampleInput, Scored, preprocess_of, score_outputs

    bundle = load_bundle(args.bundle)
    info = bundle.info
    classifier = bundle.classifier()
    files = _image_files(args, classifier.reads)
    inputs = [SampleInput(partial(storage.read, str(file)), args.text) for file in files] or [
        SampleInput(bytes, args.text, False)
    ]
    training = bundle.training_features()
    familiarity = None if training is None else Familiarity(training, torch.device("cpu"))
    predictions = score_outputs(
        classifier,
        preprocess_of(info),
        inputs,
        embed=False,
        familiarity=familiarity,
        task=info.task,
        temperature=info.temperature,
    )
    failed, cut = 0, classifier.tokens is not None and classifier.tokens(args.text)[1]
    for file, outcome in zip(files or [Path("text")], predictions, strict=True):
        if isinstance(outcome, Scored):
            _show(file, outcome, info, args, cut=cut)
            continue
        failed += 1
        reason = outcome.strerror if isinstance(outcome, OSError) and outcome.strerror else str(outcome)
        if output.is_json():
            output.result({"path": file, "error": reason})
        else:
            print(f"refract predict: {file}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _image_files(args: argparse.Namespace, reads: frozenset[str]) -> list[Path | str]:
    """Return the image files. DataError for an input that the bundle does not read."""
    from refract.pipeline.data.manifest import DataError

    if args.text and "texts" not in reads:
        raise DataError(f"--text: {args.bundle} reads no texts; remove the option")
    if args.paths and "images" not in reads:
        raise DataError(f"{args.bundle} reads no images; pass --text TEXT instead of files")
    if not args.paths:
        return []
    from refract.pipeline.data.image_paths import listed_images

    return listed_images(args.paths)


def _show(file: Path | str, outcome: "Scored", info: "BundleInfo", args: argparse.Namespace, *, cut: bool) -> None:
    from refract.models.prediction import confidences, format_prediction, prediction

    probabilities = outcome.probabilities
    thresholds = info.thresholds if info.task == "multilabel" else None
    options: dict[str, Any] = {"top": args.top, "thresholds": thresholds, "abstain_below": info.abstain_below}
    confidence = float(confidences(probabilities[None], info.task, info.thresholds)[0])
    if outcome.familiarity is not None:
        options["familiarity"] = outcome.familiarity
    options["backed_off"] = info.back_offs(probabilities[None])[0]
    result = prediction(probabilities, info.labels, confidence=confidence, cut=cut, **options)
    if output.is_json():
        output.result({"path": file, **result})
    else:
        print(format_prediction(file, result))
