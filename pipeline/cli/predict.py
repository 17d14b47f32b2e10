"""`refract predict BUNDLE FILE_OR_FOLDER…`"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from refract.pipeline.cli import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract predict",
        description="Classify images with a bundle; with --url URL in its place, by a running server (refract predict --url URL --help "
        "tells its options). Exit code 1 where an image could not be read; the others are answered.",
    )
    parser.add_argument("bundle", help="a bundle's folder")
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="FILE_OR_FOLDER", help="images, or folders searched for them"
    )
    parser.add_argument(
        "--text", action="append", help="that goes with each image, or alone, where the bundle reads texts"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line and image")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many labels for each image (default 5)")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top: {args.top} is not at least 1")
    from refract.models.multimodal.tokens import trimmed

    given = args.text or []
    if len(given) > 1:
        parser.error("--text: given more than once; a question has one text")
    args.text = given[0] if given else ""
    if not args.paths and not trimmed(args.text):
        parser.error(f"--text: {args.text!r} is an empty text" if given else "name images, or give a --text")
    return console.run("predict", lambda: _predict(args))


def _predict(args: argparse.Namespace) -> int:
    import numpy as np

    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.files import read_file
    from refract.pipeline.inference.scoring import SampleInput, preprocess_of, score

    bundle = load_bundle(args.bundle)
    info = bundle.info
    classifier = bundle.classifier()
    files = _asked(args, classifier.reads)
    questions = [SampleInput(partial(read_file, file), args.text) for file in files] or [
        SampleInput(bytes, args.text, False)
    ]
    answers = score(
        classifier,
        preprocess_of(info),
        questions,
        task=info.task,
        temperature=info.temperature,
    )
    failed, cut = 0, classifier.tokens is not None and classifier.tokens(args.text)[1]
    for file, answer in zip(files or [Path("text")], answers, strict=True):
        if isinstance(answer, np.ndarray):
            _show(file, answer, info, args, cut)
            continue
        failed += 1
        reason = answer.strerror if isinstance(answer, OSError) and answer.strerror else str(answer)
        if args.json:
            print(json.dumps({"path": str(file), "error": reason}, ensure_ascii=False))
        else:
            print(f"refract predict: {file}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _asked(args: argparse.Namespace, reads: frozenset[str]) -> list[Path]:
    """The images. DataError for what the bundle does not read."""
    from refract.pipeline.data.manifest import DataError

    if args.text and "texts" not in reads:
        raise DataError(f"--text: {args.bundle} reads no texts")
    if args.paths and "images" not in reads:
        raise DataError(f"{args.bundle} reads no images, only --text")
    return listed_images(args.paths) if args.paths else []


def _show(file: Path, answer, info, args: argparse.Namespace, cut: bool) -> None:
    from refract.models.prediction import confidences, line, prediction

    thresholds = info.thresholds if info.task == "multilabel" else None
    own = {"top": args.top, "thresholds": thresholds, "abstain_below": info.abstain_below}
    sure = float(confidences(answer[None], info.task, info.thresholds)[0])
    found = prediction(answer, info.labels, confidence=sure, cut=cut, **own)
    print(json.dumps({"path": str(file), **found}, ensure_ascii=False) if args.json else line(file, found))


def listed_images(paths: list[Path]) -> list[Path]:
    from refract.augment.decoding.decode import SUFFIXES
    from refract.augment.image_files import walk
    from refract.pipeline.data.manifest import DataError

    if not any(path.exists() for path in paths):
        raise DataError(f"{paths[0]}: no such file or folder")
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [Path(file) for file in walk(path).images]
            if not inside:
                raise DataError(f"{path}: no images in this folder; Refract reads {', '.join(SUFFIXES)}")
            files += inside
        else:  # one that is not there is told when its turn comes, as one that cannot be read
            files.append(path)
    return files
