"""The error of data that cannot be used."""


class DataError(ValueError):
    """The data cannot be used; the message lists what is wrong, where, and what to do."""
