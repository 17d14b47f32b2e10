"""Checkpoints that stay intact if the process is killed at any moment, and that resume a training exactly."""

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

import numpy as np
import torch

from refract.errors import ServiceError
from refract.models.training.lightning_imports import Checkpoint, TorchCheckpointIO, lightning
from refract.models.training.rank_values import values_of_ranks
from refract.pipeline.files import write_atomically
from refract.pipeline.stopping import Stop, Stopped

log = logging.getLogger(__name__)

NEWEST_KEPT = 2

SYNC_SECONDS, SYNC_STEPS = 2.0, 20
"""Several ranks agree on whether to write a checkpoint after this time, or after so many steps. Each agreement makes a GPU wait."""

PROGRESS = "epoch_loop.batch_progress"
"""Lightning's key of a checkpoint for the batches of the epoch."""


class CheckpointError(ServiceError):
    """A checkpoint cannot be written. The message names the file, the cause and the next step."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically: to a temporary file, flushed to disk, then renamed.

    A checkpoint file is therefore always complete, and the previous one stays until then. Raises CheckpointError if writing fails.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_atomically(Path(path), buffer.getvalue())
        except OSError as error:
            run = Path(path).parent.parent
            raise CheckpointError(
                f"the checkpoint {path} cannot be written ({error.strerror}); earlier checkpoints are intact. "
                f"Free disk space or repair the folder, then run `refract train --resume {run}`"
            ) from error


class ResumeCheckpoint(Checkpoint):
    """Writes a checkpoint every `seconds`, between two steps or at the end of an epoch, and on a stop request.

    In addition to Lightning's content, a checkpoint holds the states of the random generators of each rank and whether the training has
    finished. Another number of ranks can load it. The NEWEST_KEPT newest checkpoints stay. whole_from: from this epoch on, checkpoints are
    written only at the end of an epoch, because SWA then uses the epoch's images.
    """

    def __init__(self, folder: Path, *, seconds: float, stop: Stop, whole_from: int | None = None) -> None:
        self.folder, self.seconds, self.stop, self.whole_from = folder, seconds, stop, whole_from
        self._finished = False
        self._last = self._agreed = time.monotonic()
        self._steps, self._every = 0, 1  # since the last agreement of the ranks, and between two agreements
        self._random: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        first, *further = values_of_ranks(random_states())
        return {"ended": self._finished, **first, "further_ranks": further}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random, self._finished = state_dict, state_dict["ended"]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the epoch's batches as those of the present number of ranks and batch size."""
        data, batches = trainer.datamodule, checkpoint["loops"]["fit_loop"][PROGRESS]  # type: ignore[attr-defined]
        stored = checkpoint.get(type(data).__qualname__)
        if stored is None or "ranks" not in stored:
            return
        seen = stored["seen"] * stored["ranks"]
        ready = data.batches_per_epoch() if batches["is_last_batch"] else data.batches_after(seen)
        change = ready - batches["current"]["ready"]
        for counts in (batches["current"], batches["total"]):
            for stage in ("ready", "started", "processed", "completed"):
                counts[stage] += change

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restore the random generators here, because the setup of a training draws from them."""
        trainer.should_stop = trainer.should_stop or self._finished
        self.stop.install()  # Lightning has replaced the signal handlers
        if not self._random:
            return
        states = [self._random, *self._random.get("further_ranks", [])]
        if trainer.global_rank < len(states):  # a rank that the checkpoint does not have starts from its seed
            set_random_states(states[trainer.global_rank])

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Only between two steps, as a checkpoint holds no gradients. Not at the last batch: its epoch ends after the validation.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.whole_from is not None and trainer.current_epoch >= self.whole_from:
            self._stop_without_checkpoint(trainer)
        elif trainer.world_size == 1 or self._ranks_agree(trainer):
            self._save(trainer)

    def _ranks_agree(self, trainer: lightning.Trainer) -> bool:
        """Whether the ranks agree after this step on a checkpoint. All ranks return the same."""
        self._steps += 1
        if self._steps < self._every:
            return False
        now = time.monotonic()
        seconds = max(1e-6, (now - self._agreed) / self._steps)
        self._every = trainer.strategy.broadcast(max(1, min(SYNC_STEPS, int(SYNC_SECONDS / seconds))))
        self._steps, self._agreed = 0, now
        return True

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._stop_without_checkpoint(trainer)

    def _stop_without_checkpoint(self, trainer: lightning.Trainer) -> None:
        """On a stop request where no checkpoint is possible, stop at once if an older one exists, else at the end of the epoch."""
        if self.stop.signal is not None and trainer.world_size == 1 and _by_age(self.folder):
            raise Stopped(self.stop.signal)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._finished = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        self._save(trainer, last=self._finished)

    def _save(self, trainer: lightning.Trainer, last: bool = False) -> None:
        due = last or self.stop.signal is not None or time.monotonic() - self._last >= self.seconds
        stop_signal = self.stop.signal
        if trainer.world_size > 1:  # all ranks follow the request of any rank
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
            stopped = trainer.strategy.reduce_boolean_decision(stop_signal is not None, all=False)
            stop_signal = (stop_signal or signal.SIGTERM) if stopped else None
        if not due:
            return
        trainer.save_checkpoint(self.folder / f"resume-{trainer.global_step:08}.ckpt")
        self._last = time.monotonic()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "restart_clock"):
                callback.restart_clock()
        if trainer.is_global_zero:
            for old in _by_age(self.folder)[NEWEST_KEPT:]:
                old.unlink(missing_ok=True)
        if stop_signal is not None:
            raise Stopped(stop_signal)


def random_states() -> dict[str, Any]:
    """Return the states of this process's random generators, with tensors, because a list pickles each number separately."""
    state = np.random.get_state(legacy=False)
    version, inner, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": (version, torch.tensor(inner), gauss),
        "numpy": (torch.from_numpy(state["state"]["key"]), state["state"]["pos"], state["has_gauss"], state["gauss"]),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states of this process's random generators."""
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(map(int, inner)), gauss))
    key, position, has_gauss, cached_gaussian = states["numpy"]
    np.random.set_state(("MT19937", np.asarray(key, np.uint32), position, has_gauss, cached_gaussian))


def newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, or None. Logs a warning for each damaged one."""
    for path in _by_age(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # the format of torch.save, with a checksum for each member
                if archive.testzip() is None:
                    return path
        except (OSError, zipfile.BadZipFile):
            pass
        log.warning("the checkpoint %s is damaged; an older one is used", path)
    return None


def remove_resume_checkpoints(folder: Path) -> None:
    """Delete the resume checkpoints of a finished run."""
    for path in _by_age(folder):
        path.unlink(missing_ok=True)
    remove_fragments(folder)


def remove_fragments(folder: Path) -> None:
    """Delete the temporary files of checkpoints whose writing was killed."""
    for path in folder.glob(".*.ckpt.*"):
        path.unlink(missing_ok=True)


def _by_age(folder: Path) -> list[Path]:
    """Return the resume checkpoints, the newest first."""
    paths = (path for path in folder.glob("resume-*.ckpt") if re.fullmatch(r"resume-\d+\.ckpt", path.name))
    return sorted(paths, key=lambda path: int(path.stem.partition("-")[2]), reverse=True)


def relocated_state(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the state of a ModelCheckpoint with its paths in `folder`, because a run may be moved between two sessions."""

    def relocated(value: Any) -> Any:
        return str(folder / Path(value).name) if isinstance(value, str) and value.endswith(".ckpt") else value

    paths = {key: relocated(value) for key, value in state.items()}
    models = {relocated(path): score for path, score in state["best_k_models"].items()}
    return {**paths, "best_k_models": models, "dirpath": str(folder)}
