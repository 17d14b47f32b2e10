"""The error for invalid data."""

from refract.errors import InputError


class DataError(InputError):
    """Raised for invalid data; the message lists the problems, their locations, and the remedy."""
