"""`refract predict --url URL FILE…`: classify images by a running server."""

import argparse
import json
import os
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Returns 0, 1 where an image was not answered, 2 for what cannot be asked."""
    parser = argparse.ArgumentParser(prog="refract predict", description="Classify images by a running server.")
    parser.add_argument("--url", required=True, help="of the server, as http://localhost:8000")
    parser.add_argument("--key", default=os.environ.get("REFRACT_KEY"), help="where it asks for one; else REFRACT_KEY")
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument(
        "--text", action="append", help="that goes with each image, or alone, where the model reads texts"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line and image")
    parser.add_argument("--top", type=int, metavar="N", help="how many labels for each image")
    args = parser.parse_args(argv)
    from refract.models.multimodal.tokens import trimmed

    given = args.text or []
    if len(given) > 1:
        parser.error("--text: given more than once; a question has one text")
    args.text = given[0] if given else ""
    if not args.paths and not trimmed(args.text):
        parser.error(f"--text: {args.text!r} is an empty text" if given else "name images, or give a --text")
    from refract.models.prediction import line
    from refract.serve.client import Client, ServerError

    failed = 0
    try:
        opened = Client(args.url, key=args.key)
    except ValueError as err:
        parser.error(f"--{err}")
    with opened as client:
        asked: list[Path | None] = [file for given in args.paths for file in _files(given)]
        for path in asked or [None]:
            try:
                texts = [args.text] if args.text else None
                (found,) = client.predict([path] if path else [], top=args.top, texts=texts)
            except (OSError, ServerError) as err:
                failed += 1
                told = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
                if isinstance(err, ServerError) and err.status == 401:
                    told = f"{err}: here by --key KEY, or the environment's REFRACT_KEY"
                if args.json:
                    print(json.dumps({"path": str(path or "text"), "error": told}, ensure_ascii=False))
                else:
                    print(f"refract predict: {path or 'text'}: {told}", file=sys.stderr)
                if isinstance(err, ServerError) and err.status in (0, 401):  # the others would fare no better
                    return 1
                continue
            if args.json:
                print(json.dumps({"path": str(path or "text"), **found}, ensure_ascii=False))
            else:
                print(line(path or Path("text"), found))
    if failed and len(asked) > 1:
        print(f"refract predict: {failed} of {len(asked)} were not answered", file=sys.stderr)
    return 1 if failed else 0


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    from refract.augment.image_files import image_files

    return [Path(file) for file in image_files(path)]
