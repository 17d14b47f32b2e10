"""The errors for invalid data."""

from refract.errors import InputError


class DataError(InputError):
    """Raised for invalid data; the message lists the problems, their locations, and the remedy."""


class DataChanged(DataError):
    """The data or an input file of a run have changed since it started, so that it cannot resume."""
