"""Read the usual BMP: uncompressed, 24 bits, a header of 40 bytes. Its pixels lie in the file as they are. Pillow reads all others."""

import struct
from typing import NamedTuple

import cv2
import numpy as np

_HEADER = struct.Struct("<2s8xIIiiHHI")
"""Signature, offset of the pixels, bytes of the second header, width, height, planes, bits of a pixel, compression."""


class Layout(NamedTuple):
    """size: (height, width). offset: of the first row in the file. stride: bytes of a row in the file. upward: the last row is first."""

    size: tuple[int, int]
    offset: int
    stride: int
    upward: bool


def read_layout(data: bytes) -> Layout | None:
    """Return the layout, None for another format, another kind of BMP, and an incomplete file."""
    if data[:2] != b"BM" or len(data) < 54:
        return None
    _, offset, header, width, height, planes, bits, compression = _HEADER.unpack_from(data)
    stride = (3 * width + 3) // 4 * 4
    usual = header == 40 and planes == 1 and bits == 24 and compression == 0
    if not usual or width < 1 or height == 0 or offset < 54 or offset + stride * abs(height) > len(data):
        return None
    return Layout((abs(height), width), offset, stride, height > 0)


def read_pixels(data: bytes, layout: Layout, box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the pixels of a box (top, left, height, width) inside the image: uint8 height×width×3, RGB."""
    top, left, height, width = box
    first = layout.size[0] - top - height if layout.upward else top
    rows = np.frombuffer(data, np.uint8, height * layout.stride, layout.offset + first * layout.stride)
    stored = rows.reshape(height, layout.stride)[:, 3 * left : 3 * (left + width)].reshape(height, width, 3)
    pixels: np.ndarray = cv2.cvtColor(stored, cv2.COLOR_BGR2RGB)
    return cv2.flip(pixels, 0) if layout.upward else pixels
