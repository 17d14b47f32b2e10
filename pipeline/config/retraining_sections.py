"""The requirements for new data and for a challenger: the config sections `gate` and `retrain`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from refract.models.credentials import masked
from refract.models.fields import Checked, number
from refract.pipeline.webhooks.delivery import problem_of


@dataclass(frozen=True)
class GateConfig(Checked):
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
    margin: float = number(0.0, ge=-1, le=1)
    lowest_gain: float | None = number(None, ge=-1, le=1)
    accuracy: float = number(0.0, ge=0, le=1)
    recall: float = number(0.0, ge=0, le=1)
    recall_of: dict[str, float] = field(default_factory=dict)
    recall_loss: float = number(0.05, ge=0, le=1)
    calibration_error: float | None = number(0.15, ge=0, le=1, nullable=True)
    robustness_loss: float | None = number(0.1, ge=0, le=1, nullable=True)
    latency_ms: float | None = number(None, gt=0, finite=False)
    latency_ratio: float | None = number(2.0, gt=0, nullable=True, finite=False)
    size_mb: float | None = number(None, gt=0, finite=False)

    def rules(self) -> Iterator[tuple[str, object, bool, str]]:
        """Yield (key, value, whether it is valid, the accepted values) for the key whose field cannot declare them."""
        floors = self.recall_of
        yield "gate.recall_of", floors, all(0 <= floor <= 1 for floor in floors.values()), "floors in [0, 1]"


@dataclass(frozen=True)
class RetrainConfig(Checked):
    """Retraining, as `refract retrain` runs it.

    Args:
        folder: folder of the workspaces, one for each registered model, with holdout, snapshots and run records.
        largest_loss: largest fraction of samples that a class, or the whole data, may have lost since the last accepted run; samples that
            decisions moved are not lost.
        drift: on drift of the new data from the champion's reference: warn, stop the run, or none to skip the check.
        drift_thresholds: check → {warn: number, stop: number}, null for never; see `refract drift`.
        relabelled_warn: logs a warning from this fraction of known samples on whose label changed since the last accepted run; null never.
        relabelled_stop: stops the run from this fraction of known samples with a changed label on; null never.
        disagreement_warn: logs a warning from this fraction of new labels on that the champion contradicts beyond its errors; null never.
        disagreement_stop: stops the run from this fraction of contradicted new labels on; null never.
        start_from: initial weights: scratch (those of model.weights), champion, or auto, which trains from both and registers the one with
            the higher accuracy on the validation set.
        keep_snapshots: number of snapshots that stay in the workspace, the newest; those of the versions with an alias stay as well. null
            keeps all.
        effect_of_labels: also train without the corrections of labels since the champion, and compare both on the holdout; doubles the
            training time.
        notify: shell command that receives the run's record as JSON on its standard input, for 60 s at most; null disables it.
        webhook: address that receives a POST with the run's result as JSON; a failed delivery is repeated for a week. The environment
            variable REFRACT_WEBHOOK_URL replaces it, for addresses with a token.
        webhook_on: results that are sent, of promoted, not_promoted, refused, failed and unchanged.
    """

    folder: str = "retrain"
    largest_loss: float = number(0.2, ge=0, le=1)
    drift: Literal["warn", "stop", "none"] = "warn"
    drift_thresholds: dict[str, dict[str, float | None]] = field(default_factory=dict)
    relabelled_warn: float | None = number(0.01, gt=0, le=1, nullable=True)
    relabelled_stop: float | None = number(0.1, gt=0, le=1, nullable=True)
    disagreement_warn: float | None = number(0.05, gt=0, le=1, nullable=True)
    disagreement_stop: float | None = number(0.25, gt=0, le=1, nullable=True)
    start_from: Literal["scratch", "champion", "auto"] = "scratch"
    keep_snapshots: int | None = number(30, ge=1, nullable=True)
    effect_of_labels: bool = False
    notify: str | None = None
    webhook: str | None = None
    webhook_on: tuple[Literal["promoted", "not_promoted", "refused", "failed", "unchanged"], ...] = (
        "promoted", "not_promoted", "refused", "failed",
    )  # fmt: skip

    def rules(self) -> Iterator[tuple[str, object, bool, str]]:
        """Yield the rule of the key whose field cannot declare it, as `GateConfig.rules`."""
        expected = None if self.webhook is None else problem_of(self.webhook, stored=True)
        yield "retrain.webhook", masked(self.webhook or ""), expected is None, expected or ""
