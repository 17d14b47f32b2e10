"""The errors of every decoder here."""


class ImageError(ValueError):
    """Refract cannot read these bytes as an image; the message tells the owner of the file why."""


class TooManyPixelsError(ImageError):
    """The header announces more pixels than the limit."""


def check_pixels(height: int, width: int, limit: int) -> None:
    """TooManyPixelsError for an image of more than `limit` pixels."""
    if height * width > limit:
        raise TooManyPixelsError(f"the image has {height}×{width} = {height * width:,} pixels; the limit is {limit:,}")
