"""From a request's bytes to the network's input: plain functions, run on a worker thread but for the quickest."""

import logging
from collections.abc import Callable

import numpy as np

from augment import jpeg
from augment.decode import ImageError, TooManyPixelsError, image_size, is_jpeg
from augment.preprocess import Preprocess
from serve.errors import RequestError
from serve.limits import Limits, OverloadedError, Room
from serve.uploads import images_in

logger = logging.getLogger(__name__)


QUICK_BYTES, QUICK_PIXELS = 16 * 1024, 128 * 128


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


def prepare(content_type: str, body: bytes, preprocess: Preprocess, room: Room) -> np.ndarray:
    """The uint8 N×H×W×3 batch of the images in `body`. RequestError 4xx, naming the image where there are several."""
    images = images_in(content_type, body, max_images=room.limits.max_images)
    name: Callable[[int], str] = (lambda index: f"image {index}") if len(images) > 1 else (lambda _: "the image")
    check_total(images, room.limits)
    rows = [pixels(data, name(i), preprocess=preprocess, room=room) for i, data in enumerate(images)]
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


def check_total(images: list[bytes], limits: Limits) -> None:
    """RequestError 413 where the headers together announce more pixels than one request may have decoded."""
    total = 0
    for data in images if len(images) > 1 else []:
        try:
            height, width = image_size(data)
        except ImageError:
            continue  # `pixels` tells which and why
        total += height * width
    if total > limits.max_total_pixels:
        message = f"the images have {total:,} pixels together; at most {limits.max_total_pixels:,} in one request"
        raise RequestError(413, "images_too_large", message)


def pixels(data: bytes, name: str, *, preprocess: Preprocess, room: Room) -> np.ndarray:
    """One picture as uint8 H×W×3. The limits are held against the header, before anything is decoded. OverloadedError where too much is
    being decoded."""
    if not data:
        raise RequestError(400, "invalid_image", f"{name} is empty")
    try:
        height, width = image_size(data)
        largest = room.limits.max_pixels
        with room.taken(min(height * width, largest)):  # what is larger is refused before it is decoded
            return preprocess(data, max_pixels=largest)
    except TooManyPixelsError as err:
        raise RequestError(413, "image_too_large", f"{name}: {err}") from err
    except ImageError as err:
        raise RequestError(400, "invalid_image", f"{name}: {err}") from err
    except (MemoryError, OverloadedError):
        raise
    except Exception as err:
        # A parser stumbled over hostile bytes in a way of its own. That is the picture's fault, and a line for our log.
        logger.warning("unexpected %s while decoding a picture", type(err).__name__, exc_info=True)
        raise RequestError(400, "invalid_image", f"{name} cannot be read") from err
