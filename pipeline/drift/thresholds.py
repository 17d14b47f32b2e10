"""What drift may come to before it is told, and before it stops what waits for it."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

LEVELS = ("none", "warn", "stop")
FEWEST = 20
"""Samples on either side: below, not even two data sets that have nothing in common are told apart by all tests."""


class Threshold(NamedTuple):
    """Of a check's effect, the distance beyond what chance makes of it. None: never."""

    warn: float | None
    stop: float | None


ALPHA = 0.01
"""The chance, over all tests together, that data of one kind come below it: one look of a hundred. An effect must be as improbable as well
as large: small samples alone make large distances, large samples alone make small p-values."""

THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {
        "features": Threshold(0.02, 0.1),
        "classifier": Threshold(0.1, 0.25),
        # Of the stability index these are the usual ones (Siddiqi 2006): below 0.1 little, above 0.25 much.
        "answers": Threshold(0.1, 0.25),
        "confidence": Threshold(0.1, 0.3),
        "brightness": Threshold(0.1, 0.5),
        "contrast": Threshold(0.1, 0.5),
        "sharpness": Threshold(0.1, 0.5),
        # Another camera's images are all of another size: that alone says nothing against them.
        "width": Threshold(0.1, None),
        "height": Threshold(0.1, None),
        "aspect": Threshold(0.1, None),
        "characters": Threshold(0.2, None),
        "classes": Threshold(0.1, 0.25),
        "new classes": Threshold(0.0, 0.05),
        "vanished classes": Threshold(0.0, None),
    }
)
"""features: MMD²; classifier: the share that is told apart, less the half; answers, classes: the stability index; new classes: their share
of the new images; vanished classes: their share of the reference; the others: Kolmogorov and Smirnov's distance."""


def parse_thresholds(given: Mapping[str, Any], base: Mapping[str, Threshold] = THRESHOLDS) -> dict[str, Threshold]:
    """`base` with what is given in its place: {check: {"warn": number or None, "stop": …}}. ValueError names what is wrong."""
    found = dict(base)
    for name, own in given.items():
        if name not in THRESHOLDS:
            near = difflib.get_close_matches(str(name), THRESHOLDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no check {name!r}; known: {', '.join(THRESHOLDS)}{hint}")
        if not isinstance(own, Mapping) or not set(own) <= {"warn", "stop"}:
            raise ValueError(f"{name}: {own!r}: expected `warn` and `stop`, numbers or null for never")
        for key, value in own.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
                raise ValueError(f"{name}.{key}: {value!r}: expected a number of at least 0, or null for never")
        found[name] = found[name]._replace(**own)
    return found
