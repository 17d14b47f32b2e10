"""What training shows: one line an epoch, and a bar where a person watches."""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar

from pipeline.checkpoints import moved

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """As Lightning's, but a tie goes to the later epoch: small validation sets tie often, and a falling learning rate favours it.

    first_epoch: those before it are not kept."""

    first_epoch = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(moved(state_dict, Path(str(self.dirpath))))

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: torch.Tensor | None = None) -> bool:
        if trainer.current_epoch < self.first_epoch:
            return False
        best = self.best_model_score
        return super().check_monitor_top_k(trainer, current) or bool(
            current is not None and best is not None and current == best
        )


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
