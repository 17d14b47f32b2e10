"""The live accuracy as Prometheus gauges, computed at each scrape."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from refract.serve.feedback.live_accuracy import Estimate, LiveAccuracy
from refract.serve.feedback.recent_predictions import RecentPredictions


class LiveMetrics(Collector):
    """Gauges of the judged predictions of `recent`. The number of series is bounded: few models, and few classes of each."""

    def __init__(self, recent: RecentPredictions) -> None:
        self._recent = recent

    def describe(self) -> Iterator[Metric]:
        return self._families([], 0)

    def collect(self) -> Iterator[Metric]:
        return self._families(self._recent.live(), self._recent.retained())

    def _families(self, models: list[LiveAccuracy], retained: int) -> Iterator[Metric]:
        yield GaugeMetricFamily("refract_feedback_retained", "Predictions that feedback can judge", retained)
        judged = GaugeMetricFamily("refract_live_judged", "Retained predictions with feedback", labels=["digest"])
        for model in models:
            judged.add_metric([model.digest], model.judged)
        yield judged
        yield from _estimates(
            "accuracy",
            "Fraction of the judged predictions with exactly the true labels",
            ["digest"],
            [([model.digest], model.accuracy) for model in models],
        )
        yield from _estimates(
            "calibration",
            "Mean confidence of the judged predictions minus their accuracy",
            ["digest"],
            [([model.digest], model.calibration) for model in models],
        )
        yield from _estimates(
            "class_accuracy",
            "Fraction of the judged images of a class that were predicted as it, for the classes with the most feedback",
            ["digest", "label"],
            [([model.digest, row.label], row.accuracy) for model in models for row in model.classes],
        )


def _estimates(
    name: str, text: str, labels: list[str], rows: list[tuple[list[str], Estimate]]
) -> Iterator[GaugeMetricFamily]:
    """Yield a gauge of the values, and one of each end of their intervals."""
    for suffix, meaning, end in (
        ("", "", 0),
        ("_low", ": lower end of its 95 % interval", 1),
        ("_high", ": upper end", 2),
    ):
        family = GaugeMetricFamily(f"refract_live_{name}{suffix}", text + meaning, labels=labels)
        for values, estimate in rows:
            family.add_metric(values, estimate[end])
        yield family
