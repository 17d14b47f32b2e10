"""Metrics that plugins add to each evaluation. Independent of scikit-learn, so that a server may load the same plugins."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from refract.plugins import PluginError, add_entry

log = logging.getLogger(__name__)

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(probabilities (N, C) float32, truth: class indices (N,), or bool (N, C) for multi-label) → a finite number."""

_metrics: dict[str, Metric] = {}

METRICS: Mapping[str, Metric] = MappingProxyType(_metrics)
"""Name → metric, of the loaded plugins."""

RESERVED = frozenset(
    {
        "accuracy",
        "top5_accuracy",
        "macro_f1",
        "micro_f1",
        "sample_f1",
        "subset_accuracy",
        "mean_average_precision",
        "mean_auroc",
        "nll",
        "calibration_error",
        "label_calibration_error",
        "risk_coverage_area",
        "corruption_error",
        "lca_height",
        "back_off_coverage",
        "back_off_precision",
    }
)
"""The names of Refract's metrics, without those that end in a number."""

_NUMBERED = re.compile(r"accuracy_level_\d+")


def is_reserved(name: str) -> bool:
    """Return whether a metric of Refract has the name."""
    return name in RESERVED or _NUMBERED.fullmatch(name) is not None


def is_fraction(name: str) -> bool:
    """Return whether it is a metric of Refract with values in 0…1."""
    return is_reserved(name) and name not in ("nll", "lca_height")


def register_metric(name: str, metric: Metric) -> None:
    """Add the metric of a plugin. PluginError if Refract or another plugin has the name."""
    if is_reserved(name):
        raise PluginError(f"the metric {name!r} exists already, in refract.pipeline.evaluation; rename the new metric")
    add_entry("metric", _metrics, name, metric)


def custom_metrics(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compute the metrics of the plugins. One that fails or is not finite is skipped with a warning: it must not cost a training."""
    values: dict[str, float] = {}
    for name, metric in METRICS.items():
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
