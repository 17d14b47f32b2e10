"""What training shows: one line an epoch, and a bar where a person watches."""

import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar

from refract.pipeline.training.callbacks.checkpoints import moved

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Keep the latest epoch whose score lies within one standard error of the highest score.

    On few validation images chance decides which epoch has the highest score, and the falling learning rate favours the later one.
    Source of the rule: Breiman et al. 1984, "Classification and regression trees", section 3.4.3, for sizes of a tree.
    """

    def __init__(self, folder: Path, monitor: str, *, samples: int, first_epoch: int = 0) -> None:
        """samples: validation images, from which the standard error follows; first_epoch: epochs before it are not kept."""
        super().__init__(folder, "best", monitor=monitor, mode="max", enable_version_counter=False)
        self.samples, self.first_epoch, self.highest = samples, first_epoch, -math.inf

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), HIGHEST: self.highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = moved(state_dict, Path(str(self.dirpath)))
        score = state["best_model_score"]  # all that checkpoints of earlier versions have
        self.highest = state.pop(HIGHEST, -math.inf if score is None else float(score))
        super().load_state_dict(state)

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: torch.Tensor | None = None) -> bool:
        if current is None or trainer.current_epoch < self.first_epoch:
            return False
        self.highest = max(self.highest, float(current))
        return float(current) >= self.highest - standard_error(self.highest, self.samples)


HIGHEST = "refract_highest"


def standard_error(score: float, samples: int) -> float:
    """The standard error of a fraction of `samples`, with one success and one failure added, so that 0 and 1 have one too."""
    smoothed = (score * samples + 1) / (samples + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (samples + 2))


class EpochReport(Callback):
    """Keep, show and track the metrics of each epoch. history: one mapping an epoch."""

    def __init__(self, monitor: str, tracker: Any) -> None:
        self.monitor, self.tracker = monitor, tracker
        self.history: list[dict[str, float]] = []
        self._started, self._before = time.perf_counter(), 0.0

    def state_dict(self) -> dict[str, Any]:
        """With the seconds that the epoch has taken so far."""
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


def progress_bars() -> list[Callback]:
    """A bar on a terminal, none in a log."""
    return [TQDMProgressBar(refresh_rate=5, leave=False)] if sys.stderr.isatty() else []


def quiet_lightning() -> None:
    """Leave out Lightning's notices that tell a Refract user nothing: hardware found, tips, loader advice."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*your dataloader is not resumable.*",  # what comes next is a function of the epoch and the place in it
        ".*Checkpoint directory.*exists.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*overridden `on_before_batch_transfer`.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # what is frozen is
    ):
        warnings.filterwarnings("ignore", text)
