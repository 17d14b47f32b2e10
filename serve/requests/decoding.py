"""From a request's bytes to the network's input: plain functions, run on worker threads but for the quickest."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from refract.augment.decoding import jpeg
from refract.augment.decoding.decode import ImageError, TooManyPixelsError, image_size, is_jpeg
from refract.augment.preprocess import Preprocess
from refract.serve.http.errors import RequestError
from refract.serve.requests.limits import Budget, Limits, OverloadedError
from refract.serve.requests.multimodal_samples import blank
from refract.serve.requests.parsing import samples_in

logger = logging.getLogger(__name__)


QUICK_BYTES, QUICK_PIXELS = 16 * 1024, 128 * 128

EACH = 0.1
"""Megapixels that an image's decoding costs beside its pixels: else small ones would make a large one look dear."""


class RequestImages(NamedTuple):
    """What a request sent, before anything is decoded. megapixels: what it costs to decode, by the headers; decode: makes the uint8
    N×H×W×3 batch of `number` images, or raises RequestError, or OverloadedError where too much is being decoded; texts: as many, or
    none; has_image: whether each is an image, none where all are; encoded: their files, none where tensors were sent; sides: of each its
    height and width, (0, 0) for what is no image, where they are known."""

    number: int
    megapixels: float
    decode: Callable[[Preprocess, Budget], np.ndarray]
    texts: Sequence[str] = ()
    has_image: Sequence[bool] = ()
    encoded: Sequence[bytes | None] = ()
    sides: Sequence[tuple[int, int]] = ()


def is_quick(content_type: str, body: bytes) -> bool:
    """Whether to prepare it takes less time than to have another thread do it: a small JPEG of one scan, sent as it is."""
    if len(body) > QUICK_BYTES or not (content_type.startswith("image/") or not content_type):
        return False
    if not is_jpeg(body):
        return False
    try:
        header = jpeg.read_header(body)
    except jpeg.JpegError:
        return False
    # What is not of these colours is Pillow's, which may see another size.
    return header.baseline and header.components in (1, 3) and header.height * header.width <= QUICK_PIXELS


def read(content_type: str, body: bytes, limits: Limits) -> RequestImages:
    """The images and texts in `body`. RequestError 4xx, naming the image where there are several."""
    sent = samples_in(content_type, body, max_images=limits.max_images)
    count = len(sent.images)
    found = encoded_images(sent.images, ["the image"] if count == 1 else numbered(count), limits)
    there = [image is not None for image in sent.images]
    return found._replace(texts=sent.texts, has_image=[] if all(there) else there)


def numbered(count: int) -> list[str]:
    """What images are called in messages."""
    return [f"image {index}" for index in range(count)]


def encoded_images(images: Sequence[bytes | None], names: Sequence[str], limits: Limits) -> RequestImages:
    """images: None for what has no image. RequestError where a header cannot be read, or 413 where they announce more pixels than one
    request may have decoded."""
    sides = [(0, 0) if data is None else _sides(data, name) for data, name in zip(images, names, strict=True)]
    sizes = [height * width for height, width in sides]
    total = sum(sizes)
    if len(images) > 1 and total > limits.max_total_pixels:
        message = f"the images have {total:,} pixels together; at most {limits.max_total_pixels:,} in one request"
        raise RequestError(413, "images_too_large", message)
    # What is too large alone is refused before it is decoded.
    megapixels = min(total, limits.max_total_pixels) / 1e6 + EACH * len(images)
    return RequestImages(len(images), megapixels, partial(_batch, images, names, sizes), encoded=images, sides=sides)


def _sides(data: bytes, name: str) -> tuple[int, int]:
    if not data:
        raise RequestError(400, "invalid_image", f"{name} is empty")
    try:
        return image_size(data)
    except MemoryError:
        raise
    except Exception as err:
        raise _fault(err, name) from err


def _batch(
    images: Sequence[bytes | None], names: Sequence[str], sizes: Sequence[int], preprocess: Preprocess, room: Budget
) -> np.ndarray:
    rows = [_pixels(*one, preprocess, room) for one in zip(images, names, sizes, strict=True)]
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


def _pixels(data: bytes | None, name: str, size: int, preprocess: Preprocess, room: Budget) -> np.ndarray:
    """One image as uint8 H×W×3. The limits are held against the header, before anything is decoded."""
    if data is None:
        return blank(preprocess)
    largest = room.limits.max_pixels
    try:
        with room.taken(min(size, largest)):
            return preprocess(data, max_pixels=largest)
    except (MemoryError, OverloadedError):
        raise
    except Exception as err:
        raise _fault(err, name) from err


def _fault(err: Exception, name: str) -> RequestError:
    if isinstance(err, TooManyPixelsError):
        return RequestError(413, "image_too_large", f"{name}: {err}")
    if isinstance(err, ImageError):
        return RequestError(400, "invalid_image", f"{name}: {err}")
    # A parser stumbled over hostile bytes in a way of its own. That is the image's fault, and a line for our log.
    logger.warning("unexpected %s while reading an image", type(err).__name__, exc_info=err)
    return RequestError(400, "invalid_image", f"{name} cannot be read")
