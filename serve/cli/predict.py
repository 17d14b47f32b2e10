"""`refract predict --url URL FILE…`: classify images with a running server."""

import argparse
import os
import sys
from pathlib import Path

from refract import output


def main(argv: list[str]) -> int:
    """Print a prediction for each image. Returns 0, 1 if an image has none, 2 for invalid options."""
    parser = argparse.ArgumentParser(prog="refract predict", description="Classify images with a running server.")
    parser.add_argument("--url", required=True, help="URL of the server, such as http://localhost:8000")
    parser.add_argument(
        "--key",
        default=os.environ.get("REFRACT_KEY"),
        help="API key, if the server requires one; default: the environment variable REFRACT_KEY",
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE_OR_FOLDER", help="image files or folders of them")
    parser.add_argument(
        "--text",
        action="append",
        help="text for a model that reads texts: the text of every image, or the only input without images",
    )
    parser.add_argument("--top", type=int, metavar="N", help="how many labels to list for each image")
    args = parser.parse_args(argv)
    from refract.models.multimodal.tokens import trimmed

    texts = args.text or []
    if len(texts) > 1:
        parser.error("--text: given more than once; a request has one text")
    args.text = texts[0] if texts else ""
    if not args.paths and not trimmed(args.text):
        parser.error(
            f"--text: {args.text!r} is an empty text" if texts else "no input: name image files or give a --text"
        )
    from refract.models.prediction import format_prediction
    from refract.serve.client import Client, ServerError

    failures = 0
    try:
        unopened = Client(args.url, key=args.key)
    except ValueError as err:
        parser.error(f"--{err}")
    with unopened as client:
        images: list[Path | None] = [file for path in args.paths for file in _files(path)]
        for image in images or [None]:
            try:
                image_texts = [args.text] if args.text else None
                (prediction,) = client.predict([image] if image else [], top=args.top, texts=image_texts)
            except (OSError, ServerError) as err:
                failures += 1
                message = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
                if isinstance(err, ServerError) and err.status == 401:
                    message = f"{err}; pass the API key as --key KEY or in the environment variable REFRACT_KEY"
                if output.is_json():
                    output.result({"path": image or "text", "error": message})
                else:
                    print(f"refract predict: {image or 'text'}: {message}", file=sys.stderr)
                if isinstance(err, ServerError) and err.status in (0, 401):  # the other images would fail, too
                    return 1
                continue
            if output.is_json():
                output.result({"path": image or "text", **prediction})
            else:
                print(format_prediction(image or Path("text"), prediction))
    if failures and len(images) > 1:
        print(f"refract predict: {failures} of {len(images)} images have no prediction", file=sys.stderr)
    return 1 if failures else 0


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    from refract.augment.image_files import image_files

    return [Path(file) for file in image_files(path)]
