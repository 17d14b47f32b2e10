"""The error for invalid data."""


class DataError(ValueError):
    """Raised for invalid data; the message lists the problems, their locations, and the remedy."""
