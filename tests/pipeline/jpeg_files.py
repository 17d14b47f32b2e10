"""JPEG files of many kinds, for tests of the images that a device decodes."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixels(number: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth image: a decoder's rounding and upsampling hardly change it."""
    y, x = np.mgrid[:height, :width]
    phases = [np.sin(x / (9 + number / 3 + c)) + np.cos(y / (11 + c)) for c in range(3)]
    return np.uint8(60 * (np.stack(phases, -1) + 2))


def jpeg(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    mode = options.pop("mode", "RGB")
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def oriented(image: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif.tobytes())


def commented(data: bytes, length: int) -> bytes:
    """A JPEG with comments of `length` bytes in all."""
    segments, rest = divmod(length, 60_000)
    comments = [b"\xff\xfe" + (size + 2).to_bytes(2) + bytes(size) for size in [60_000] * segments + [rest]]
    return data[:2] + b"".join(comments) + data[2:]


def wide_gamut(profile: bytes) -> bytes:
    """An sRGB profile whose red and blue primaries are exchanged."""
    return profile.replace(b"rXYZ", b"tXYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tXYZ", b"bXYZ", 1)


FILES = {
    "landscape": jpeg(pixels(0)),
    "portrait": jpeg(pixels(1, 90, 50)),
    "subsampled": simplejpeg.encode_jpeg(pixels(2), 95, "RGB", "420"),
    "progressive": jpeg(pixels(3), progressive=True),
    "grey": jpeg(pixels(4), mode="L"),
    "with an sRGB profile": jpeg(pixels(5), icc_profile=SRGB),
    **{f"orientation {which}": oriented(pixels(6, 50, 70), which) for which in range(2, 9)},
}
ONLY_CPU = {
    "CMYK": jpeg(pixels(7), mode="CMYK"),
    "with another profile": jpeg(pixels(8), icc_profile=wide_gamut(SRGB)),
    "grey with a profile": jpeg(pixels(9), mode="L", icc_profile=SRGB),
    "more pixels than a device decodes": jpeg(pixels(10, 1700, 2500)),
    "RGB components": jpeg(pixels(11), keep_rgb=True),
    "more bytes than a device decodes": commented(jpeg(pixels(12)), 1 << 20),
    "without an end": jpeg(pixels(13))[:-2],
    "with a trailer in place of an end": jpeg(pixels(14))[:-2] + bytes(99),
}


def write_photos(root: Path, labels: list[str]) -> Path:
    """Write root/LABEL/KIND.jpg for each label and kind of file."""
    for number, label in enumerate(labels):
        (root / label).mkdir(parents=True)
        for name, data in {**FILES, **ONLY_CPU}.items():
            comment = b"\xff\xfe\x00\x03%d" % number  # copies of one file cannot have several labels
            (root / label / f"{name}.jpg").write_bytes(data[:2] + comment + data[2:])
    return root
