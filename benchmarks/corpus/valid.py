"""Images that any viewer shows, in unusual files."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from benchmarks.corpus.case import Case, encoded, random_image, saved

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation → how the stored image is turned to be shown."""


def odd_but_valid(rng: np.random.Generator) -> Iterator[Case]:
    """Each is to be answered as the same pixels in a plain PNG."""
    pixels = random_image(rng)
    image = Image.fromarray(pixels)

    def case(name: str, data: bytes, shown: np.ndarray = pixels, gap: float = 0.02, kind: str = "image/*") -> Case:
        return Case(f"valid: {name}", data, kind, statuses=(200,), label_of=shown, gap=gap)

    def as_rgb(other: Image.Image) -> np.ndarray:
        return np.asarray(other.convert("RGB"))

    grey, palette = image.convert("L"), image.convert("P", palette=Image.Palette.ADAPTIVE)
    yield case("grey png", saved(grey, "PNG"), as_rgb(grey))
    yield case("grey jpeg", saved(grey, "JPEG", quality=98), as_rgb(grey))
    yield case("palette png", saved(palette, "PNG"), as_rgb(palette))
    yield case("palette gif", saved(palette, "GIF"), as_rgb(palette))
    yield case("one bit", saved(image.convert("1"), "PNG"), as_rgb(image.convert("1")))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    yield case("16-bit png", saved(deep, "PNG"), as_rgb(grey))
    yield case("16-bit tiff", saved(deep, "TIFF"), as_rgb(grey))
    yield case("cmyk jpeg", saved(image.convert("CMYK"), "JPEG", quality=98), gap=0.1)
    yield case("cmyk tiff", saved(image.convert("CMYK"), "TIFF"), as_rgb(image.convert("CMYK")), gap=0.1)
    opaque = image.copy()
    opaque.putalpha(255)
    yield case("rgba", saved(opaque, "PNG"))
    half = image.copy()
    half.putalpha(128)
    over_white = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), half).convert("RGB"))
    yield case("half transparent, over white", saved(half, "PNG"), over_white)
    other = Image.fromarray(random_image(rng))
    for form in ("GIF", "WEBP", "PNG"):
        first = palette if form == "GIF" else image
        moving = saved(
            first, form, save_all=True, append_images=[other] * 3, **({"lossless": True} if form == "WEBP" else {})
        )
        yield case(f"animated {form.lower()}, by its first frame", moving, as_rgb(first))
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        shown = np.asarray(image.transpose(TURNS[orientation])) if orientation in TURNS else pixels
        forms: dict[str, dict[str, Any]] = {
            "JPEG": {"quality": 98, "subsampling": 0},
            "PNG": {},
            "WEBP": {"lossless": True},
            "TIFF": {},
        }
        for form, settings in forms.items():
            yield case(f"{form.lower()} of orientation {orientation}", saved(image, form, exif=exif, **settings), shown)
    jpegs: dict[str, dict[str, Any]] = {
        "progressive": {"progressive": True},
        "4:2:0": {"subsampling": 2},
        "optimised": {"optimize": True},
        "restart markers": {"restart_marker_blocks": 1},
        "kept in rgb": {"keep_rgb": True},
        "300 dpi": {"dpi": (300, 300)},
    }
    for name, options in jpegs.items():
        yield case(f"jpeg {name}", saved(image, "JPEG", quality=97, **options))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield case("jpeg with an icc profile", saved(image, "JPEG", quality=97, icc_profile=profile))
    yield case(
        "jpeg with 3 MB of icc profile", saved(image, "JPEG", quality=97, icc_profile=profile + bytes(3_000_000))
    )
    yield case("png with an icc profile", saved(image, "PNG", icc_profile=profile))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield case(f"tiff by {compression}", saved(image, "TIFF", compression=compression))
    yield case("tiff in tiles", saved(image, "TIFF", tiffinfo=TiffImagePlugin.ImageFileDirectory_v2()))
    yield case("bmp", saved(image, "BMP"))
    yield case("png called jpeg", saved(image, "PNG"), kind="image/jpeg")
    yield case("jpeg called webp", saved(image, "JPEG", quality=97), kind="image/webp")
    yield case("image without a type", saved(image, "PNG"), kind="")
    yield case("jpeg with a zip behind it", saved(image, "JPEG", quality=97) + b"PK\x03\x04" + rng.bytes(500))
    yield case(
        "jpeg with comments",
        (lambda d: d[:2] + (b"\xff\xfe\x10\x00" + bytes(4_094)) * 9 + d[2:])(saved(image, "JPEG", quality=97)),
    )
    for height, width in ((1, 1), (1, 300), (300, 1), (2, 2), (7, 3), (2_000, 3), (1_500, 2_000)):
        small = (
            random_image(rng, height, width)
            if min(height, width) > 3
            else np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
        )
        yield case(f"{width} × {height} pixels", encoded(small, "PNG"), small)
        yield case(
            f"{width} × {height} pixels, jpeg", encoded(small, "JPEG", quality=98, subsampling=0), small, gap=0.05
        )
