"""Draw the preview grid of an augmentation: one row per sample, with the original, its variants, and the drawn ops below each."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refract.augment import Augmenter, Plan, image_size

if TYPE_CHECKING:
    from PIL import Image

    from refract.pipeline.data.manifest import Manifest

_CELL, _GAP, _LINE, _LINES, _TEXT_LINES = 192, 8, 13, 6, 4


class Shown(NamedTuple):
    """One row of the grid. data: the encoded image; sample_index: index in the data set."""

    title: str
    data: bytes
    sample_index: int
    text: str = ""


def shown_samples(manifest: "Manifest", count: int) -> list[Shown]:
    """Return up to `count` training samples, evenly spread over the data. Raises DataError with the path of an unreadable image."""
    from refract.pipeline.data.manifest import DataError

    training = [sample for sample in manifest.samples if sample.split in ("", "train")]
    rows = []
    for index in spread(len(training), count):
        sample = training[index]
        try:
            title = ";".join(manifest.labels[i] for i in sample.labels) or "-"
            rows.append(Shown(title, sample.read(), index, sample.text))
        except OSError as error:
            raise DataError(f"{sample.path}: {error.strerror}") from error
    return rows


def spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` indices, evenly spread over the data: the first images often have the same class."""
    shown = min(count, wanted)
    return [i * count // shown for i in range(shown)]


def preview_grid(images: Sequence[Shown], augmenter: Augmenter, *, variants: int = 6) -> "Image.Image":
    """Return the grid. Variant k is the draw of training epoch k for the image's index, and for its text.

    Batch ops (MixUp, CutMix) mix within a column. Each image is shown in a square of 192 pixels.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    from refract.augment import decode

    plans = [
        [augmenter.draw(image_size(data), epoch=epoch, index=index) for _, data, index, _ in images]
        for epoch in range(variants)
    ]
    columns = [
        [augmenter.apply(plan, data) for plan, (_, data, _, _) in zip(column, images, strict=True)] for column in plans
    ]
    if augmenter.size is not None and augmenter.mixes:
        columns = [
            _mixed(augmenter, column, epoch, [shown.sample_index for shown in images])
            for epoch, column in enumerate(columns)
        ]
    width = (variants + 1) * (_CELL + _GAP) + _GAP
    count = _LINES + (_TEXT_LINES if any(shown.text for shown in images) else 0)
    row_height = _CELL + count * _LINE + _GAP
    grid = Image.new("RGB", (width, len(images) * row_height + _GAP), "white")
    # Pillow's font lacks ×, − and most alphabets; matplotlib's font has them.
    font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 10)
    canvas = ImageDraw.Draw(grid)
    for row, (title, data, index, text) in enumerate(images):
        original = decode(data, color_profile=augmenter.color_profile)
        texts = [augmenter.text(text, epoch=k, index=index) for k in range(variants)]
        cells = [(original, [title, f"{original.shape[0]}×{original.shape[1]}", *([text] if text else [])])]
        cells += [
            (columns[k][row], [*_words(plans[k][row]), *([variant] if variant else [])])
            for k, variant in enumerate(texts)
        ]
        for column, (pixels, lines) in enumerate(cells):
            left, top = _GAP + column * (_CELL + _GAP), _GAP + row * row_height
            thumb = _fitted(pixels)
            grid.paste(thumb, (left + (_CELL - thumb.width) // 2, top + (_CELL - thumb.height) // 2))
            wrapped = [piece for line in lines for piece in wrap(line, 33, subsequent_indent="  ")][:count]
            canvas.multiline_text((left, top + _CELL + 2), "\n".join(wrapped), "black", font, spacing=1)
    return grid


def _mixed(augmenter: Augmenter, column: list[np.ndarray], epoch: int, indices: list[int]) -> list[np.ndarray]:
    import torch

    images = torch.from_numpy(np.stack(column)).permute(0, 3, 1, 2)
    mixed, _ = augmenter.mix(images, torch.zeros(len(column), 1), epoch=epoch, indices=indices)
    return list(mixed.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _words(plan: Plan) -> list[str]:
    text = []
    for step in plan.steps:
        numbers = [
            f"{key} {_short(value)}" for key, value in step.args.items() if key not in _LONG and _is_short(value)
        ]
        name = step.args["transform"] if step.op == "ThirdPartyTransform" else step.op
        text.append(name + (f" ({', '.join(numbers)})" if numbers else ""))
    return text or ["(nothing drawn)"]


# Arguments that the image already shows, or that mean nothing to a reader.
_LONG = frozenset({"offset", "seed", "box", "boxes", "size", "fill", "border", "transform", "partner", "centre"})


def _is_short(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (
        isinstance(value, list) and len(value) <= 3 and not any(isinstance(v, list) for v in value)
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _fitted(pixels: np.ndarray) -> "Image.Image":
    """Return the image scaled to the cell. Small images are enlarged without smoothing, so that their pixels are visible."""
    from PIL import Image

    image = Image.fromarray(pixels)
    factor = _CELL / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS)
