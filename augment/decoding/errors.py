"""Errors of the decoders."""

from refract.errors import InputError


class ImageError(InputError):
    """The bytes are not an image that Refract decodes. The message names the reason for the owner of the file."""


class TooManyPixelsError(ImageError):
    """The header declares more pixels than the limit."""


def check_pixels(height: int, width: int, limit: int) -> None:
    """Check that an image has at most `limit` pixels; TooManyPixelsError otherwise."""
    if height * width > limit:
        raise TooManyPixelsError(f"the image has {height}×{width} = {height * width:,} pixels; the limit is {limit:,}")
