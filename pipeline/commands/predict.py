"""`refract predict BUNDLE FILE_OR_FOLDER…`"""

import argparse
import json
import sys
from pathlib import Path

from pipeline.commands import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract predict",
        description="Classify pictures with a bundle; with --url URL in its place, by a running server (refract predict --url URL --help "
        "tells its options). Exit code 1 where a picture could not be read; the others are answered.",
    )
    parser.add_argument("bundle", help="a bundle's folder")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="pictures, or folders searched for them"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line and picture")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many labels for each picture (default 5)")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top: {args.top} is not at least 1")
    return console.run("predict", lambda: _predict(args))


def _predict(args: argparse.Namespace) -> int:
    import numpy as np

    from models.bundle import load_bundle
    from pipeline.commands.evaluate import preprocess_of
    from pipeline.scoring import score

    bundle = load_bundle(args.bundle)
    info = bundle.info
    files = picture_files(args.paths)
    answers = score(
        bundle.classifier(),
        preprocess_of(info),
        [file.read_bytes for file in files],
        task=info.task,
        temperature=info.temperature,
    )
    failed = 0
    for file, answer in zip(files, answers, strict=True):
        if isinstance(answer, np.ndarray):
            _show(file, answer, info, args)
            continue
        failed += 1
        reason = answer.strerror if isinstance(answer, OSError) and answer.strerror else str(answer)
        if args.json:
            print(json.dumps({"path": str(file), "error": reason}, ensure_ascii=False))
        else:
            print(f"refract predict: {file}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _show(file: Path, answer, info, args: argparse.Namespace) -> None:
    order = (-answer).argsort(kind="stable")[: args.top]
    top = [{"label": info.labels[i], "confidence": round(float(answer[i]), 6)} for i in order]
    if not args.json:
        print(f"{file}: " + ", ".join(f"{item['label']} {item['confidence']:.1%}" for item in top))
        return
    line = {"path": str(file), "label": top[0]["label"], "confidence": top[0]["confidence"], "top": top}
    if info.task == "multilabel":
        line["labels"] = [
            name for name, p, least in zip(info.labels, answer, info.thresholds, strict=True) if p >= least
        ]
    print(json.dumps(line, ensure_ascii=False))


def picture_files(paths: list[Path]) -> list[Path]:
    from augment.decode import SUFFIXES
    from pipeline.data.manifest import DataError

    if not any(path.exists() for path in paths):
        raise DataError(f"{paths[0]}: no such file or folder")
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"{path}: no pictures in this folder; Refract reads {', '.join(SUFFIXES)}")
            files += inside
        else:  # one that is not there is told when its turn comes, as one that cannot be read
            files.append(path)
    return files
