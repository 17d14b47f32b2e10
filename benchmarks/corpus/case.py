"""What the corpus's makers share: a case, and images as files."""

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

PREDICT = "/v1/predict"


@dataclass(frozen=True)
class Case:
    """A request, and what may come of it. statuses: of HTTP; None for anything below 500. label_of: an image (uint8 H×W×3) whose likeliest
    label it must get; gap: how far its probability may lie from that image's."""

    name: str
    body: bytes
    kind: str = "application/octet-stream"
    path: str = PREDICT
    headers: dict[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] | None = None
    label_of: np.ndarray | None = None
    gap: float = 0.02


def random_image(rng: np.random.Generator, height: int = 60, width: int = 90) -> np.ndarray:
    """Smooth colours, so that JPEG changes little."""
    coarse = Image.fromarray(rng.integers(20, 236, (4, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, form: str, **options: object) -> bytes:
    """The bytes of a file."""
    return saved(Image.fromarray(pixels), form, **options)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def changed(rng: np.random.Generator, data: bytes, count: int, end: int | None = None) -> bytes:
    """The data with count bytes of its first end ones drawn anew."""
    body = bytearray(data)
    for place in rng.integers(0, end or len(body), count):
        body[place] = int(rng.integers(256))
    return bytes(body)


def part(name: str, data: bytes, headers: str = "") -> bytes:
    """A file of a form with boundary b."""
    return (
        f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x.jpg"\r\n{headers}\r\n'.encode()
        + data
        + b"\r\n"
    )
