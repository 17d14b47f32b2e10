"""The value of the config key `data.labels`: the address of a label history, with or without the last decision that counts."""

import re

from refract.pipeline.config.config import ConfigError
from refract.pipeline.labels.decisions import LabelError
from refract.pipeline.labels.history import LabelHistory


def pinned(labels: str | None) -> str | None:
    """Return `data.labels` with the newest decision, as `labels.db@57`: later decisions do not change this run."""
    address, number = split_address(labels)
    return labels if address is None or number is not None else f"{address}@{opened(address).state().last}"


def split_address(value: str | None) -> tuple[str | None, int | None]:
    """Split `labels.db@57` into the address and the ID of the last decision that counts, None for all."""
    if value is None:
        return None, None
    match = re.fullmatch(r"(?P<address>.+)@(?P<number>\d+)", value, re.DOTALL)
    return (match["address"], int(match["number"])) if match else (value, None)


def opened(address: str) -> LabelHistory:
    """Open the label history of `data.labels`. ConfigError if it cannot be used."""
    try:
        return LabelHistory(address)
    except LabelError as error:
        raise ConfigError(f"data.labels: {error}") from error
