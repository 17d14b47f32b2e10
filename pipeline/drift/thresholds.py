"""The thresholds of drift: from which effect on a check warns, or stops."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

LEVELS = ("none", "warn", "stop")
FEWEST = 20
"""The fewest samples of each data set. Below, some tests cannot separate even completely different data."""


class Threshold(NamedTuple):
    """Thresholds of a check's effect, which is its distance minus the distance that chance causes. None: never."""

    warn: float | None
    stop: float | None


ALPHA = 0.01
"""The probability of a false alarm over all checks of one comparison. An effect must be both large and improbable: small samples cause
large distances, and large samples cause small p-values."""

THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {
        "features": Threshold(0.02, 0.1),
        "classifier": Threshold(0.1, 0.25),
        # The usual thresholds of the stability index (Siddiqi 2006): below 0.1 little drift, above 0.25 much.
        "answers": Threshold(0.1, 0.25),
        "confidence": Threshold(0.1, 0.3),
        "brightness": Threshold(0.1, 0.5),
        "contrast": Threshold(0.1, 0.5),
        "sharpness": Threshold(0.1, 0.5),
        # Another size, as of another camera, is not a reason to stop.
        "width": Threshold(0.1, None),
        "height": Threshold(0.1, None),
        "aspect": Threshold(0.1, None),
        "characters": Threshold(0.2, None),
        "classes": Threshold(0.1, 0.25),
        "new classes": Threshold(0.0, 0.05),
        "vanished classes": Threshold(0.0, None),
    }
)
"""Units of the effects. features: MMD²; classifier: accuracy above 0.5; answers, classes: the stability index; new classes: their fraction
of the new samples; vanished classes: their fraction of the reference; all others: the Kolmogorov-Smirnov distance."""


def parse_thresholds(given: Mapping[str, Any], base: Mapping[str, Threshold] = THRESHOLDS) -> dict[str, Threshold]:
    """Return `base` with the thresholds in `given` replaced: {check: {"warn": number or None, "stop": …}}. ValueError for invalid ones."""
    thresholds = dict(base)
    for name, values in given.items():
        if name not in THRESHOLDS:
            near = difflib.get_close_matches(str(name), THRESHOLDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no check {name!r}; known: {', '.join(THRESHOLDS)}{hint}")
        if not isinstance(values, Mapping) or not set(values) <= {"warn", "stop"}:
            raise ValueError(f"{name}: {values!r}: expected `warn` and `stop`, numbers or null for never")
        for key, value in values.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
                raise ValueError(f"{name}.{key}: {value!r}: expected a number of at least 0, or null for never")
        thresholds[name] = thresholds[name]._replace(**values)
    return thresholds
