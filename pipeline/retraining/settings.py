"""What the nightly run asks of new data and of a challenger: the config's sections `gate` and `retrain`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class GateConfig:
    """What a challenger has to hold before it becomes champion, both measured on one frozen hold-out.

    Args:
        holdout: a folder or manifest that is never trained on; null keeps the first night's test split. Later classes are added.
        margin: gain in accuracy over the champion, at least. At 0 the champion's accuracy on the holdout never falls.
        lowest_gain: the lower end of that gain's 95 % interval (paired bootstrap), at least; null: what the holdout's size resolves,
            -0.05 to -0.01; -1 asks nothing.
        accuracy: at least.
        recall: of each class, at least.
        recall_of: class → its own floor.
        recall_loss: so much may a class's recall fall below the champion's, or by chance (McNemar, Holm, p >= 0.05), not from 3 right to 0.
        calibration_error: expected calibration error, at most, judged from 100 samples on; null asks nothing.
        robustness_loss: mean error under 19 corruptions above the champion's, at most; null does not measure it.
        latency_ms: of one image through the network on this machine, median, at most; null asks nothing.
        latency_ratio: that latency over the champion's, at most; null asks nothing.
        size_mb: of the weights, at most; null asks nothing.
    """

    holdout: str | None = None
    margin: float = 0.0
    lowest_gain: float | None = None
    accuracy: float = 0.0
    recall: float = 0.0
    recall_of: dict[str, float] = field(default_factory=dict)
    recall_loss: float = 0.05
    calibration_error: float | None = 0.15
    robustness_loss: float | None = 0.1
    latency_ms: float | None = None
    latency_ratio: float | None = 2.0
    size_mb: float | None = None

    def rules(self) -> Iterator[tuple[str, object, bool, str]]:
        """(key, value, whether it can be, what could be) of each value that has a range."""
        yield "gate.margin", self.margin, -1 <= self.margin <= 1, "in [-1, 1]"
        lowest = self.lowest_gain
        yield "gate.lowest_gain", lowest, lowest is None or -1 <= lowest <= 1, "in [-1, 1], or null"
        for name in ("accuracy", "recall", "recall_loss"):
            value = getattr(self, name)
            yield f"gate.{name}", value, 0 <= value <= 1, "in [0, 1]"
        yield "gate.recall_of", self.recall_of, all(0 <= v <= 1 for v in self.recall_of.values()), "floors in [0, 1]"
        for name in ("calibration_error", "robustness_loss"):
            value = getattr(self, name)
            yield f"gate.{name}", value, value is None or 0 <= value <= 1, "in [0, 1], or null"
        for name in ("latency_ms", "latency_ratio", "size_mb"):
            value = getattr(self, name)
            yield f"gate.{name}", value, value is None or value > 0, "positive, or null"


@dataclass
class RetrainConfig:
    """The nightly run.

    Args:
        folder: below it lies, by the model's name, what a night leaves: hold-out, snapshots, records.
        largest_loss: share of its images that a class, or the whole, may have lost since the last accepted night.
        drift: of what is new, from the champion's reference: tell it, let it stop the night as well, or do not look.
        drift_thresholds: check → {warn: number, stop: number}, null for never; see `refract drift`.
        relabelled_warn: logs a warning from this fraction of known samples on whose label changed since the last accepted run; null never.
        relabelled_stop: stops the run from this fraction on; null never.
        disagreement_warn: logs a warning from this fraction of new labels on that the champion contradicts beyond its errors; null never.
        disagreement_stop: stops the run from this fraction on; null never.
        notify: a command that gets the night's result as JSON on its standard input, and has a minute; null tells nobody.
    """

    folder: str = "retrain"
    largest_loss: float = 0.2
    drift: Literal["tell", "stop", "none"] = "tell"
    drift_thresholds: dict[str, dict[str, float | None]] = field(default_factory=dict)
    relabelled_warn: float | None = 0.01
    relabelled_stop: float | None = 0.1
    disagreement_warn: float | None = 0.05
    disagreement_stop: float | None = 0.25
    notify: str | None = None

    def rules(self) -> Iterator[tuple[str, object, bool, str]]:
        """As GateConfig.rules."""
        yield "retrain.largest_loss", self.largest_loss, 0 <= self.largest_loss <= 1, "in [0, 1]"
        for name in ("relabelled_warn", "relabelled_stop", "disagreement_warn", "disagreement_stop"):
            value = getattr(self, name)
            yield f"retrain.{name}", value, value is None or 0 < value <= 1, "in (0, 1], or null"
