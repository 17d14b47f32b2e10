"""Checkpoints that a kill at any moment leaves whole, and from which a training goes on as if it had not stopped."""

import io
import logging
import random
import re
import signal
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from refract.pipeline.files import write_atomically
from refract.pipeline.training.callbacks.stopping import Stop, Stopped

log = logging.getLogger(__name__)

KEPT = 2
TOGETHER = 20
"""Batches after which several processes ask each other whether to write a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written; the message says which, why, and what to do."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints are written aside, brought to the disk, and renamed: a file of the name is always whole, and the one before stays until
    then. CheckpointError where that fails."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_atomically(Path(path), buffer.getvalue())
        except OSError as error:
            run = Path(path).parent.parent
            raise CheckpointError(
                f"the checkpoint {path} cannot be written ({error.strerror}); those before it are whole. "
                f"Make room or mend the folder, then `refract train --resume {run}` goes on"
            ) from error


class ResumeCheckpoint(Checkpoint):
    """A checkpoint every `seconds`, between two steps or at the end of an epoch, and when the training is asked to stop.

    Beside what Lightning keeps it holds the states of the random generators, and whether the training had come to its end. The KEPT newest
    stay. whole_from: the epoch from which on none is written within an epoch, as SWA then looks at its images at its end.
    """

    def __init__(self, folder: Path, *, seconds: float, stop: Stop, whole_from: int | None = None) -> None:
        self.folder, self.seconds, self.stop, self.whole_from = folder, seconds, stop, whole_from
        self._ended = False
        self._last = time.monotonic()
        self._random: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        state = np.random.get_state(legacy=False)
        version, inner, gauss = random.getstate()
        return {  # tensors, as of lists each number is pickled for itself
            "ended": self._ended,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": (version, torch.tensor(inner), gauss),
            "numpy": (
                torch.from_numpy(state["state"]["key"]),
                state["state"]["pos"],
                state["has_gauss"],
                state["gauss"],
            ),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random, self._ended = state_dict, state_dict["ended"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the generators where they were; what sets a training up draws from them."""
        trainer.should_stop = trainer.should_stop or self._ended
        self.stop.listen()  # Lightning has put a handler of its own in the place of ours
        if not self._random or trainer.global_rank:
            return
        torch.set_rng_state(self._random["torch"])
        for device, state in enumerate(self._random["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        version, inner, gauss = self._random["python"]
        random.setstate((version, tuple(map(int, inner)), gauss))
        key, place, has_gauss, number = self._random["numpy"]
        np.random.set_state(("MT19937", np.asarray(key, np.uint32), place, has_gauss, number))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between two steps, as gradients are not kept; not at the last batch, whose epoch is not over before it is validated.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.whole_from is not None and trainer.current_epoch >= self.whole_from:
            self._leave(trainer)
        elif trainer.world_size == 1 or (batch_idx + 1) % TOGETHER == 0:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._leave(trainer)

    def _leave(self, trainer: lightning.Trainer) -> None:
        """Where no checkpoint can be made now: end at once if there is an older one, else go on to the epoch's end, which makes one."""
        if self.stop.signal is not None and trainer.world_size == 1 and _by_age(self.folder):
            raise Stopped(self.stop.signal)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._ended = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        self._save(trainer, last=self._ended)

    def _save(self, trainer: lightning.Trainer, last: bool = False) -> None:
        due = last or self.stop.signal is not None or time.monotonic() - self._last >= self.seconds
        asked = self.stop.signal
        if trainer.world_size > 1:  # what one process wants, all do
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
            stopped = trainer.strategy.reduce_boolean_decision(asked is not None, all=False)
            asked = (asked or signal.SIGTERM) if stopped else None
        if not due:
            return
        trainer.save_checkpoint(self.folder / f"resume-{trainer.global_step:08}.ckpt")
        self._last = time.monotonic()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "clock_again"):
                callback.clock_again()
        if trainer.is_global_zero:
            for old in _by_age(self.folder)[KEPT:]:
                old.unlink(missing_ok=True)
        if asked is not None:
            raise Stopped(asked)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a warning for each that is not. None where there is none."""
    for path in _by_age(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # what torch.save writes, with a check sum for each part
                if archive.testzip() is None:
                    return path
        except (OSError, zipfile.BadZipFile):
            pass
        log.warning("the checkpoint %s is damaged; an older one is taken", path)
    return None


def remove_resume_checkpoints(folder: Path) -> None:
    """When a run is finished."""
    for path in _by_age(folder):
        path.unlink(missing_ok=True)
    remove_fragments(folder)


def remove_fragments(folder: Path) -> None:
    """What a kill left of a checkpoint that was being written."""
    for path in folder.glob(".*.ckpt.*"):
        path.unlink(missing_ok=True)


def _by_age(folder: Path) -> list[Path]:
    """The checkpoints to go on from, the newest first."""
    found = (path for path in folder.glob("resume-*.ckpt") if re.fullmatch(r"resume-\d+\.ckpt", path.name))
    return sorted(found, key=lambda path: int(path.stem.partition("-")[2]), reverse=True)


def moved(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The state of a ModelCheckpoint as if it had always been in `folder`: a run may lie elsewhere than where it began."""

    def here(value: Any) -> Any:
        return str(folder / Path(value).name) if isinstance(value, str) and value.endswith(".ckpt") else value

    paths = {key: here(value) for key, value in state.items()}
    models = {here(path): score for path, score in state["best_k_models"].items()}
    return {**paths, "best_k_models": models, "dirpath": str(folder)}
