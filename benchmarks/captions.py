"""Write images with captions, and a manifest, whose label needs both: `python -m benchmarks.captions FOLDER`.

An image shows a shape in a colour. Its caption asks for the shape or the colour in varying words, such as "which form does it have" or
"name its hue". The label is the requested shape or colour. The image lacks the request, and the caption lacks the shape and the colour.
`--kind texts` writes sentences of `benchmarks.grammar` without images, labelled by their verb.
"""

import argparse
import csv
import sys
from pathlib import Path

import cv2
import numpy as np

from benchmarks import grammar

COLOURS = {"red": (220, 50, 40), "green": (60, 170, 70), "blue": (60, 90, 220)}
SHAPES = ("circle", "square", "triangle")
ASKS = {
    "colour": (
        "what colour is it",
        "which colour does it have",
        "tell me the colour please",
        "name its hue",
        "how is it painted",
    ),
    "shape": (
        "what shape is it",
        "which form does it have",
        "tell me the form please",
        "name its outline",
        "how is it formed",
    ),
}


def draw_image(rng: np.random.Generator, shape: str, colour: str, size: int = 32) -> np.ndarray:
    """Draw the shape at a random position on noisy grey. Returns uint8 size × size × 3."""
    image = rng.normal(128, 14, (size, size, 3)).clip(0, 255).astype(np.uint8)
    radius = int(rng.integers(size // 6, size // 3))
    x, y = (int(v) for v in rng.integers(radius + 1, size - radius - 1, 2))
    shade = tuple(int(np.clip(channel + rng.integers(-25, 26), 0, 255)) for channel in COLOURS[colour])
    if shape == "circle":
        cv2.circle(image, (x, y), radius, shade, -1, cv2.LINE_AA)
    elif shape == "square":
        cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), shade, -1)
    else:
        corners = np.array([[x, y - radius], [x - radius, y + radius], [x + radius, y + radius]])
        cv2.fillPoly(image, [corners], shade, cv2.LINE_AA)
    return image


def write_images(folder: Path, count: int = 1200, seed: int = 0) -> Path:
    """Write the images and return the manifest's path. Each image occurs once, with one caption."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        asked = str(rng.choice(list(ASKS)))
        file = folder / "images" / f"{number:05}.png"
        cv2.imwrite(str(file), draw_image(rng, shape, colour)[:, :, ::-1])
        label = colour if asked == "colour" else shape
        rows.append([f"images/{file.name}", label, _split(number, count), str(rng.choice(ASKS[asked]))])
    return _write(folder / "captions.csv", rows, ["path", "label", "split", "text"])


def write_texts(folder: Path, each: int = 100, held_out: int = 200, seed: int = 0) -> Path:
    """Write sentences of the small language of `benchmarks.grammar`, labelled by the meaning of their verb. Returns the manifest's path.

    The validation and test texts use words for the verb that are rare in training.
    """
    rng = np.random.default_rng(seed)
    rows, seen = [], set[str]()
    for split, wanted in (("train", each), ("val", held_out // 4), ("test", held_out)):
        for verb, said in grammar.VERBS.items():
            ways, count = said.split(), 0
            while count < wanted:
                meaning = grammar.meaning(rng)
                if verb not in meaning:
                    continue
                text = grammar.english(meaning, rng)
                common = text.split()[[*meaning].index(verb)] == ways[0]
                # Nine of ten training texts use the first word of a verb, the test texts use its other words.
                if text in seen or (split == "train") != (common or rng.random() < 0.1):
                    continue
                seen.add(text)
                rows.append([verb, split, text])
                count += 1
    return _write(folder / "texts.csv", rows, ["label", "split", "text"])


def _split(number: int, count: int) -> str:
    return "test" if number >= 0.7 * count else "val" if number >= 0.6 * count else "train"


def _write(file: Path, rows: list[list[str]], columns: list[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerows([columns, *rows])
    return file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write images with captions, or texts, to train on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("images", "texts"), default="images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write = write_images if args.kind == "images" else write_texts
    print(write(args.folder, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
