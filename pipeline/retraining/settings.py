"""The requirements for new data and for a challenger: the config sections `gate` and `retrain`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class GateConfig:
    """The checks that a challenger must pass to become champion; both are measured on one frozen holdout.

    Args:
        holdout: folder or manifest that is never trained on; null keeps the first run's test split. Later classes are added.
        margin: smallest gain in accuracy over the champion. With 0 the champion's accuracy on the holdout never falls.
        lowest_gain: smallest lower end of that gain's 95 % interval (paired bootstrap); null: what the holdout's size resolves,
            -0.05 to -0.01; -1 disables the check.
        accuracy: smallest accuracy.
        recall: smallest recall of each class.
        recall_of: class → its own smallest recall.
        recall_loss: largest loss of a class's recall. A larger loss fails if chance does not explain it (McNemar, Holm, p < 0.05), or if
            3 or more correct predictions fall to 0.
        calibration_error: largest expected calibration error, checked from 100 samples on; null disables the check.
        robustness_loss: largest increase of the mean error under 19 corruptions over the champion's; null does not measure it.
        latency_ms: largest allowed latency of one sample on this machine, in ms, the shortest of several tries; null disables the check.
        latency_ratio: largest ratio of that latency to the champion's; null disables the check.
        size_mb: largest size of the weights, in MB; null disables the check.
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
        """Yield (key, value, whether it is valid, the accepted range) for each value that has a range."""
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


@dataclass(frozen=True)
class RetrainConfig:
    """Retraining, as `refract retrain` runs it.

    Args:
        folder: folder of the workspaces, one for each registered model, with holdout, snapshots and run records.
        largest_loss: largest fraction of samples that a class, or the whole data, may have lost since the last accepted run.
        drift: on drift of the new data from the champion's reference: warn, stop the run, or none to skip the check.
        drift_thresholds: check → {warn: number, stop: number}, null for never; see `refract drift`.
        relabelled_warn: logs a warning from this fraction of known samples on whose label changed since the last accepted run; null never.
        relabelled_stop: stops the run from this fraction of known samples with a changed label on; null never.
        disagreement_warn: logs a warning from this fraction of new labels on that the champion contradicts beyond its errors; null never.
        disagreement_stop: stops the run from this fraction of contradicted new labels on; null never.
        notify: shell command that receives the run's record as JSON on its standard input, for 60 s at most; null disables it.
    """

    folder: str = "retrain"
    largest_loss: float = 0.2
    drift: Literal["warn", "stop", "none"] = "warn"
    drift_thresholds: dict[str, dict[str, float | None]] = field(default_factory=dict)
    relabelled_warn: float | None = 0.01
    relabelled_stop: float | None = 0.1
    disagreement_warn: float | None = 0.05
    disagreement_stop: float | None = 0.25
    notify: str | None = None

    def rules(self) -> Iterator[tuple[str, object, bool, str]]:
        """Yield the rules in the form of `GateConfig.rules`."""
        yield "retrain.largest_loss", self.largest_loss, 0 <= self.largest_loss <= 1, "in [0, 1]"
        for name in ("relabelled_warn", "relabelled_stop", "disagreement_warn", "disagreement_stop"):
            value = getattr(self, name)
            yield f"retrain.{name}", value, value is None or 0 < value <= 1, "in (0, 1], or null"
