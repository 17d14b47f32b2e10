"""Run plans on JPEG files on any device: decode them together, by nvJPEG on an NVIDIA GPU, and then run the batch executor.

A device decodes whole images. For the files that only the CPU decodes, or decodes cheaper, see `header_of`.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch

from refract.augment.decoding import jpeg
from refract.augment.decoding.color_profiles import changes_colors
from refract.augment.decoding.errors import ImageError
from refract.augment.decoding.exif import ORIENTATIONS
from refract.augment.decoding.jpeg import JpegError
from refract.augment.executors import torch_batch
from refract.augment.plan import Plan

MOST_PIXELS, MOST_BYTES = 1 << 22, 1 << 20
"""Largest image that a device decodes. The CPU decodes larger ones at a reduced scale, and only where the plan reads them."""

PIXELS_AT_ONCE = 1 << 25
"""Pixels of the images that are decoded together. Decoding and augmentation take up to 24 bytes for each: 800 MB."""


_SCAN, _END = b"\xff\xda", b"\xff\xd9"
"""Markers, which compressed data do not contain: a file whose last scan has no end is repaired by the CPU."""


class StoredImage(NamedTuple):
    """What a device needs of a JPEG header. height, width: pixels with the orientation applied; orientation: 1…8, of EXIF or XMP."""

    height: int
    width: int
    orientation: int


def header_of(data: bytes, *, color_profile: str = "ignore") -> StoredImage | None:
    """Return the facts of a JPEG that a device decodes; None for bytes that the CPU must decode.

    The CPU decodes other formats, CMYK, RGB components, more than 8 bits, arithmetic or lossless coding, damaged headers, files without an
    end, images above MOST_PIXELS or MOST_BYTES, and, if color_profile is `convert`, grey images with a profile and colour images whose
    profile changes their colours.
    """
    if len(data) > MOST_BYTES or not jpeg.is_jpeg(data) or not _has_end(data):
        return None
    try:
        header = jpeg.read_header(data)
        if not header.baseline:
            jpeg.check_scans(data)
    except JpegError:
        return None
    if header.precision != 8 or header.components not in (1, 3) or not header.huffman:
        return None
    if header.components == 3 and header.rgb:
        return None
    if header.height * header.width > MOST_PIXELS:
        return None
    profile = jpeg.profile_of(data, header) if color_profile == "convert" and header.profile else b""
    if profile and (header.components == 1 or changes_colors(profile)):
        return None
    orientation = jpeg.orientation(data, header)
    transposed = ORIENTATIONS[orientation][0]
    size = (header.width, header.height) if transposed else (header.height, header.width)
    return StoredImage(*size, orientation)


def _has_end(data: bytes) -> bool:
    """Whether an end marker follows the start of the last scan."""
    return data.endswith(_END) or data.rfind(_END) > data.rfind(_SCAN)


def run(
    plans: Sequence[Plan], files: Sequence[torch.Tensor], orientations: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Decode files[i], turn it by orientations[i], and apply plans[i], without the batch ops.

    files: at least one JPEG, as uint8 (bytes,) in host memory. Returns uint8 N×3×H×W on the device: the images of `Augmenter.apply`,
    but for the decoder's rounding and upsampling of colours. ImageError if the device cannot decode a file, ValueError as
    `torch_batch.run`.
    """
    results = []
    for start, stop in _chunks([plan.size[0] * plan.size[1] for plan in plans]):
        images = _decoded(files[start:stop], device)
        upright = [_upright(image, which) for image, which in zip(images, orientations[start:stop], strict=True)]
        results.append(torch_batch.run(plans[start:stop], upright))
    return results[0] if len(results) == 1 else torch.cat(results)


def _chunks(pixels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) of runs of images with at most PIXELS_AT_ONCE together, or of one larger image."""
    start = total = 0
    for position, count in enumerate(pixels):
        if total and total + count > PIXELS_AT_ONCE:
            yield start, position
            start, total = position, 0
        total += count
    yield start, len(pixels)


def _decoded(files: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return uint8 3×H×W for each file, on the device, with the stored orientation."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # deprecated since 0.29

        if device.type != "cuda":
            return decode_jpeg(list(files), ImageReadMode.RGB, device=device)
        # nvJPEG writes on a separate stream, which does not wait for the current one. A block that the current stream's allocator
        # hands out may still be read by kernels that have not run. Blocks of a separate stream return to it only when the current
        # stream has passed their last use.
        current, separate = torch.cuda.current_stream(device), _stream(device)
        with torch.cuda.stream(separate):
            images: list[torch.Tensor] = decode_jpeg(list(files), ImageReadMode.RGB, device=device)
        current.wait_stream(separate)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0].rpartition(", ")[2]  # without torchvision's source file
        raise ImageError(f"{device} cannot decode a JPEG of the batch ({reason})") from error
    for image in images:
        image.record_stream(current)
    return images


@cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def _upright(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn 3×H×W pixels by an EXIF orientation."""
    transposed, rows, columns = ORIENTATIONS[orientation]
    image = image.transpose(1, 2) if transposed else image
    flipped = [axis for axis, flip in ((1, rows), (2, columns)) if flip]
    return image.flip(flipped) if flipped else image
