"""Decode a request's bytes into the network's input. These functions run on worker threads, or for tiny images on the event loop."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refract.augment.decoding import jpeg
from refract.augment.decoding.decode import ImageError, TooManyPixelsError, image_size, is_jpeg
from refract.augment.preprocess import Preprocess
from refract.serve.errors import RequestError
from refract.serve.requests.limits import Budget, Limits, OverloadedError
from refract.serve.requests.multimodal_samples import blank
from refract.serve.requests.parsing import samples_in

logger = logging.getLogger(__name__)


QUICK_BYTES, QUICK_PIXELS = 16 * 1024, 128 * 128
"""Most bytes and pixels of an image that is decoded on the event loop."""

EACH = 0.1
"""Fixed cost of decoding an image, in megapixels. Without it, small images would raise the estimated cost of large ones."""


class RequestImages(NamedTuple):
    """The parsed samples of a request, not decoded yet.

    number: samples; megapixels: estimated cost of decoding, from the image headers; sides: (height, width) of each image, (0, 0) for a
    sample without an image. The images are either `encoded`, files with None for a sample without an image, which messages call by their
    `names`; or `pixels`, uint8 N×H×W×3. texts: one for each sample, or empty; has_image: whether each sample has an image, empty if all
    have.
    """

    number: int
    megapixels: float
    sides: Sequence[tuple[int, int]]
    encoded: Sequence[bytes | None] = ()
    names: Sequence[str] = ()
    pixels: np.ndarray | None = None
    texts: Sequence[str] = ()
    has_image: Sequence[bool] = ()


class ParsedRequest(NamedTuple):
    """A parsed request. The others are of the Open Inference Protocol only. outputs: names of the outputs that the response has; id: the
    client's name of the request; version: the only model version that may answer, if the body names one; each None without one."""

    images: RequestImages
    outputs: tuple[str, ...] = ()
    id: str | None = None
    version: str | None = None


def is_quick(content_type: str, body: bytes) -> bool:
    """Return whether decoding on the event loop is faster than on a thread: for a small baseline JPEG that is the whole body."""
    if len(body) > QUICK_BYTES or not (content_type.startswith("image/") or not content_type):
        return False
    if not is_jpeg(body):
        return False
    try:
        header = jpeg.read_header(body)
    except jpeg.JpegError:
        return False
    # Pillow decodes JPEGs with other components, and may read another size.
    return header.baseline and header.components in (1, 3) and header.height * header.width <= QUICK_PIXELS


def read(content_type: str, body: bytes, limits: Limits) -> RequestImages:
    """Parse the images and texts in `body`. RequestError 4xx, which names the image if there are several."""
    sent = samples_in(content_type, body, max_images=limits.max_images)
    count = len(sent.images)
    images = encoded_images(sent.images, ["the image"] if count == 1 else numbered(count), limits)
    has_image = [image is not None for image in sent.images]
    return images._replace(texts=sent.texts, has_image=[] if all(has_image) else has_image)


def numbered(count: int) -> list[str]:
    """Return the names of `count` images for messages."""
    return [f"image {index}" for index in range(count)]


def encoded_images(images: Sequence[bytes | None], names: Sequence[str], limits: Limits) -> RequestImages:
    """Read the headers of encoded images; None is a sample without an image. RequestError 400 if a header is invalid, 413 if the images
    together have more than `limits.max_total_pixels`."""
    sides = [(0, 0) if data is None else _sides(data, name) for data, name in zip(images, names, strict=True)]
    total = sum(height * width for height, width in sides)
    if len(images) > 1 and total > limits.max_total_pixels:
        message = f"the images have {total:,} pixels together; a request may have at most {limits.max_total_pixels:,}"
        raise RequestError(413, "images_too_large", message)
    # `decode` rejects a single image that is too large before it decodes it.
    megapixels = min(total, limits.max_total_pixels) / 1e6 + EACH * len(images)
    return RequestImages(len(images), megapixels, sides, images, names)


def decode(images: RequestImages, preprocess: Preprocess, budget: Budget) -> np.ndarray:
    """Return the network's inputs, uint8 N×H×W×3. RequestError, or OverloadedError if too many pixels are being decoded."""
    if images.pixels is not None:
        return np.stack([preprocess(image) for image in images.pixels])
    rows = [
        _pixels(data, name, height * width, preprocess, budget)
        for data, name, (height, width) in zip(images.encoded, images.names, images.sides, strict=True)
    ]
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


def _sides(data: bytes, name: str) -> tuple[int, int]:
    if not data:
        raise RequestError(400, "invalid_image", f"{name} is empty")
    try:
        return image_size(data)
    except MemoryError:
        raise
    except Exception as err:
        raise _image_error(err, name) from err


def _pixels(data: bytes | None, name: str, size: int, preprocess: Preprocess, budget: Budget) -> np.ndarray:
    """Decode one image to uint8 H×W×3. The size in its header is checked against the limits first."""
    if data is None:
        return blank(preprocess)
    largest = budget.limits.max_pixels
    try:
        with budget.reserved(min(size, largest)):
            return preprocess(data, max_pixels=largest)
    except (MemoryError, OverloadedError):
        raise
    except Exception as err:
        raise _image_error(err, name) from err


def _image_error(err: Exception, name: str) -> RequestError:
    if isinstance(err, TooManyPixelsError):
        return RequestError(413, "image_too_large", f"{name}: {err}")
    if isinstance(err, ImageError):
        return RequestError(400, "invalid_image", f"{name}: {err}")
    # Untrusted bytes caused an unexpected error in a parser. The client receives 400; the log has the details.
    logger.warning("unexpected %s while reading an image", type(err).__name__, exc_info=err)
    return RequestError(400, "invalid_image", f"{name} cannot be decoded")
