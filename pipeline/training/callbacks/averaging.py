"""Average the weights over the steps (EMA) or the last epochs (SWA). Validation and the final bundle use the average."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from refract.models.classifier import Inputs, inputs_of
from refract.models.multimodal.former_names import present_name
from refract.models.training.lightning_imports import Callback, lightning
from refract.models.training.sharding import sharded_as, whole

NORM_IMAGES = 2048
"""Number of images that recompute the batch norm statistics of averaged weights."""

KEY = "averaged_weights"
"""Checkpoint key of the averaged state dict of the module."""


class WeightAverage(Callback):
    """Averages all weights and batch norm statistics, validates with the average, and adds it to every checkpoint.

    decay: the decay of the exponential moving average w̄ ← d w̄ + (1 − d) w after each step, d = min(decay, (1 + n) / (10 + n)) at the n-th
    step, so that the first steps lose their weight soon (Polyak & Juditsky 1992; the ramp is TensorFlow's). Batch norm statistics are
    averaged too.
    swa_start: fraction of the epochs from which the average is instead the plain mean of the weights at the end of each epoch (Izmailov et
    al. 2018, arXiv:1803.05407). Batch norm statistics are then recomputed on up to NORM_IMAGES images of the epoch's last batches.
    Before the first update, validation uses the weights themselves.
    """

    def __init__(self, *, decay: float = 0.0, swa_start: float | None = None) -> None:
        self.decay, self.swa_start = decay, swa_start
        self._average: dict[str, Tensor] = {}
        self._count, self._last_step = 0, 0
        self._weights: dict[str, Tensor] = {}
        self._recent: deque[Inputs] = deque()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the EMA once per optimiser step, SWA at the end of the epoch."""
        if self.swa_start is None and trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self._update(pl_module, 1 - min(self.decay, (1 + self._count) / (10 + self._count)))
        if self.swa_start is not None and trainer.current_epoch >= int(self.swa_start * (trainer.max_epochs or 1)):
            self._recent.append(inputs_of(batch))
            while sum(map(_count, self._recent)) - _count(self._recent[0]) >= NORM_IMAGES:
                self._recent.popleft()
            if trainer.is_last_batch:
                self._update(pl_module, 1 / (self._count + 1))
                self._recompute_statistics(pl_module)
                self._recent.clear()

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Load the average into the module, if there is one."""
        if self._average and not trainer.sanity_checking:
            state = pl_module.state_dict()
            self._weights = {name: value.clone() for name, value in state.items() if name in self._average}
            pl_module.load_state_dict(self._average, strict=False)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restore the weights."""
        if self._weights:
            pl_module.load_state_dict(self._weights, strict=False)
            self._weights = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average under KEY."""
        if self._average:
            average = {name: whole(value) for name, value in self._average.items()}
            checkpoint[KEY] = {"weights": average, "count": self._count, "last_step": self._last_step}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the average of a checkpoint."""
        if KEY in checkpoint:
            stored = checkpoint[KEY]
            present = pl_module.state_dict()
            average = {present_name(name, present.keys()): value for name, value in stored["weights"].items()}
            self._average = {name: sharded_as(value, present.get(name)) for name, value in average.items()}
            self._count, self._last_step = stored["count"], stored["last_step"]

    @torch.no_grad()
    def _recompute_statistics(self, pl_module: lightning.LightningModule) -> None:
        """Recompute the average's batch norm statistics with its own weights, on the recent batches."""
        classifier: torch.nn.Module = pl_module.classifier  # type: ignore[assignment]
        norms = [m for m in classifier.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
        if not norms:
            return
        weights = {name: value.clone() for name, value in pl_module.state_dict().items() if name in self._average}
        pl_module.load_state_dict(self._average, strict=False)
        try:
            with torch.random.fork_rng(devices=[pl_module.device] if pl_module.device.type == "cuda" else []):
                recompute_statistics(classifier, norms, self._recent)
            state = pl_module.state_dict()
            self._average = {name: state[name].clone() for name in self._average}
        finally:
            pl_module.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def _update(self, pl_module: lightning.LightningModule, fraction: float) -> None:
        """Move the average by `fraction` towards the current weights."""
        weights = {name: value for name, value in pl_module.state_dict().items() if name.startswith("classifier.")}
        if not self._average:
            self._average = {name: value.detach().clone() for name, value in weights.items()}
        else:
            for name, value in weights.items():
                # The average of a loaded checkpoint is on the CPU.
                average = self._average[name] = self._average[name].to(value.device)
                if average.is_floating_point():
                    average.lerp_(value.to(average.dtype), fraction)
                else:
                    average.copy_(value)
        self._count += 1


@torch.no_grad()
def recompute_statistics(classifier: torch.nn.Module, norms: Sequence[_NormBase], batches: Iterable[Inputs]) -> None:
    """Recompute the running statistics of batch norms in training mode: the plain means over the batches. batches: on the device."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch then takes the plain mean over the batches
        for inputs in batches:
            classifier(*inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def best_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the module's state dict of a checkpoint, with the average in place of the weights if there is one."""
    average = checkpoint[KEY]["weights"] if KEY in checkpoint else {}
    return {**checkpoint["state_dict"], **average}


def _count(inputs: Inputs) -> int:
    return next(len(values) for values in inputs if values is not None)
