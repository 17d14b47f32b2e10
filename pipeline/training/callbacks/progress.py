"""Show the progress of a training: one log line per epoch, and the batches. Keep the best epoch's checkpoint."""

import contextlib
import logging
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refract.models.training.lightning_imports import Callback, ModelCheckpoint, lightning
from refract.pipeline.training.callbacks.checkpoints import relocated_state
from refract.progress import Progress

if TYPE_CHECKING:
    from refract.pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the latest epoch whose score lies within one standard error of the highest score.

    With few validation images chance decides which epoch has the highest score, and the falling learning rate favours the later one.
    Source: the one-standard-error rule of Breiman et al. 1984, "Classification and regression trees", section 3.4.3, for sizes of a tree.
    """

    def __init__(self, folder: Path, monitor: str, *, samples: int, first_epoch: int = 0) -> None:
        """samples: number of validation images, for the standard error; first_epoch: earlier epochs are not kept."""
        super().__init__(folder, "best", monitor=monitor, mode="max", enable_version_counter=False)
        self.samples, self.first_epoch, self.highest = samples, first_epoch, -math.inf

    # A private method of Lightning. If a release renames it, trainings only start more slowly.
    def _ModelCheckpoint__warn_if_dir_not_empty(self, dirpath: str) -> None:
        """Omit the warning that the folder has files.

        Before it warns, Lightning imports the installed clients of object stores (gcsfs, adlfs, s3fs): half a second of a core.
        """

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), HIGHEST: self.highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = relocated_state(state_dict, Path(str(self.dirpath)))
        score = state["best_model_score"]  # checkpoints of earlier versions lack HIGHEST
        self.highest = state.pop(HIGHEST, -math.inf if score is None else float(score))
        super().load_state_dict(state)

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: torch.Tensor | None = None) -> bool:
        if current is None or trainer.current_epoch < self.first_epoch:
            return False
        self.highest = max(self.highest, float(current))
        return float(current) >= self.highest - standard_error(self.highest, self.samples)


HIGHEST = "refract_highest"


def standard_error(score: float, samples: int) -> float:
    """Return the standard error of a fraction of `samples`. One added success and failure make it positive at 0 and 1 too."""
    smoothed = (score * samples + 1) / (samples + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (samples + 2))


class EpochReport(Callback):
    """Records, logs and tracks the metrics of each epoch. history: one mapping per epoch."""

    def __init__(self, monitor: str, tracker: "Tracker | None") -> None:
        self.monitor, self.tracker = monitor, tracker
        self.history: list[dict[str, float]] = []
        self._started, self._before = time.perf_counter(), 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the seconds that the current epoch has taken so far."""
        return {"history": self.history, "seconds": self._before + time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._before = state_dict["history"], state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started, self._before = time.perf_counter(), 0.0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics["epoch_seconds"] = self._before + time.perf_counter() - self._started
        self.history.append(metrics)
        shown = [
            f"{name} {metrics[name]:.4f}"
            for name in ("train_loss", "train_accuracy", "val_loss", self.monitor)
            if name in metrics
        ]
        log.info(
            "epoch %d/%s  %s  %.1f s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            "  ".join(shown),
            metrics["epoch_seconds"],
        )
        if self.tracker is not None:
            self.tracker.log_metrics(metrics, step=trainer.current_epoch + 1)


class StepProgress(Callback):
    """Shows the progress through the batches of each epoch and of its validation."""

    def __init__(self) -> None:
        self._shown = contextlib.ExitStack()
        self._progress: Progress | None = None

    def _show(self, title: str, batches: float, count: int = 0) -> None:
        self._close()
        total = int(batches) if math.isfinite(batches) else None
        self._progress = self._shown.enter_context(Progress(title, total, unit="batches", count=count))

    def _close(self) -> None:
        self._shown.close()
        self._progress = None

    def _show_epoch(self, trainer: lightning.Trainer, count: int) -> None:
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", trainer.num_training_batches, count)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._show_epoch(trainer, 0)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:  # Lightning reports no start of an epoch that is resumed
            self._show_epoch(trainer, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.update()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._show("validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.on_train_batch_end()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._close()  # Lightning calls no `teardown` then

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._close()


def quiet_lightning() -> None:
    """Suppress Lightning's notices that do not help a Refract user: available hardware, tips, loader advice."""
    for package in ("lightning.pytorch", "lightning.fabric"):  # both announce each rank
        logging.getLogger(package).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*your dataloader is not resumable.*",  # the next batch depends only on the epoch and the position in it
        ".*Checkpoint directory.*exists.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*overridden `on_before_batch_transfer`.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen modules are
    ):
        warnings.filterwarnings("ignore", text)
