"""Metrics that plugins add to each evaluation. Independent of scikit-learn, so that a server may load the same plugins."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from refract.pipeline.evaluation.metrics import METRICS
from refract.plugins import PluginError, add_entry

log = logging.getLogger(__name__)

CustomMetric = Callable[[np.ndarray, np.ndarray], float]
"""(probabilities (N, C) float32, truth: class indices (N,), or bool (N, C) for multi-label) → a finite number."""

_metrics: dict[str, CustomMetric] = {}

CUSTOM_METRICS: Mapping[str, CustomMetric] = MappingProxyType(_metrics)
"""Name → metric, of the loaded plugins."""

ELSEWHERE: Mapping[str, bool] = MappingProxyType(
    {"corruption_error": True, "lca_height": False, "back_off_coverage": True, "back_off_precision": True}
)
"""Metrics that `robustness.py` and `hierarchy.py` add → whether their values are in 0…1. Further ones end in a number."""

_NUMBERED = re.compile(r"accuracy_level_\d+")


def is_reserved(name: str) -> bool:
    """Return whether a metric of Refract has the name."""
    return name in METRICS or name in ELSEWHERE or _NUMBERED.fullmatch(name) is not None


def is_fraction(name: str) -> bool:
    """Return whether it is a metric of Refract with values in 0…1."""
    if name in METRICS:
        return METRICS[name].fraction
    return ELSEWHERE.get(name, _NUMBERED.fullmatch(name) is not None)


def register_metric(name: str, metric: CustomMetric) -> None:
    """Add the metric of a plugin. PluginError if Refract or another plugin has the name."""
    if is_reserved(name):
        raise PluginError(f"the metric {name!r} exists already, in refract.pipeline.evaluation; rename the new metric")
    add_entry("metric", _metrics, name, metric)


def custom_metrics(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compute the metrics of the plugins. One that fails or is not finite is skipped with a warning: it must not cost a training."""
    values: dict[str, float] = {}
    for name, metric in CUSTOM_METRICS.items():
        try:
            value = float(metric(probabilities.copy(), truth.copy()))
        except Exception as error:  # the plugin's code may raise any
            log.warning("the metric %s is skipped: it raised %s: %s", name, type(error).__name__, error)
            continue
        if math.isfinite(value):
            values[name] = value
        else:
            log.warning("the metric %s is skipped: it returned %s, which is not finite", name, value)
    return values
