"""The errors of every decoder here."""


class ImageError(ValueError):
    """Refract cannot read these bytes as an image; the message tells the owner of the file why."""


class TooManyPixelsError(ImageError):
    """The header announces more pixels than the limit."""
