"""Averages of the weights over the steps (EMA) or the last epochs (SWA), which are then what is validated and kept."""

from collections import deque
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from refract.models.classifier import Inputs, inputs_of

RENEWED = 2048
"""Images from which batch norms get the statistics of averaged weights."""

KEY = "averaged_weights"
"""Where a checkpoint holds the averaged state dict of the module."""


class WeightAverage(Callback):
    """Keep an average of all weights and statistics, measure with it, and store it in every checkpoint beside the weights.

    decay: of the exponential moving average w̄ ← d w̄ + (1 − d) w after each step, d = min(decay, (1 + n) / (10 + n)) at the n-th, so that
    the first steps do not linger (Polyak & Juditsky 1992; the ramp as TensorFlow's); the statistics of batch norms are averaged alike.
    swa_start: in place of that, the even mean of the weights at the end of each epoch from this share of the epochs on (Izmailov et al.
    2018, arXiv:1803.05407); the statistics of batch norms are then computed anew, on up to RENEWED images of the epoch's last batches.
    Before the first update the weights themselves are measured.
    """

    def __init__(self, *, decay: float = 0.0, swa_start: float | None = None) -> None:
        self.decay, self.swa_start = decay, swa_start
        self._average: dict[str, Tensor] = {}
        self._count, self._last_step = 0, 0
        self._own: dict[str, Tensor] = {}
        self._seen: deque[Inputs] = deque()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """EMA, once for each step of the optimiser."""
        if self.swa_start is None and trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self._update(pl_module, 1 - min(self.decay, (1 + self._count) / (10 + self._count)))
        if self.swa_start is not None and trainer.current_epoch >= int(self.swa_start * (trainer.max_epochs or 1)):
            self._seen.append(inputs_of(batch))
            while sum(map(_count, self._seen)) - _count(self._seen[0]) >= RENEWED:
                self._seen.popleft()
            if trainer.is_last_batch:
                self._update(pl_module, 1 / (self._count + 1))
                self._renew(pl_module)
                self._seen.clear()

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average in, if there is one."""
        if self._average and not trainer.sanity_checking:
            self._own = {name: value.clone() for name, value in pl_module.state_dict().items() if name in self._average}
            pl_module.load_state_dict(self._average, strict=False)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the weights back."""
        if self._own:
            pl_module.load_state_dict(self._own, strict=False)
            self._own = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average under KEY."""
        if self._average:
            checkpoint[KEY] = {"weights": self._average, "count": self._count, "last_step": self._last_step}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with a checkpoint's average."""
        if KEY in checkpoint:
            stored = checkpoint[KEY]
            self._average, self._count, self._last_step = stored["weights"], stored["count"], stored["last_step"]

    @torch.no_grad()
    def _renew(self, pl_module: lightning.LightningModule) -> None:
        """Put into the average the statistics of batch norms that its own weights give."""
        classifier: torch.nn.Module = pl_module.classifier  # type: ignore[assignment]
        norms = [m for m in classifier.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
        if not norms:
            return
        own = {name: value.clone() for name, value in pl_module.state_dict().items() if name in self._average}
        momenta = [norm.momentum for norm in norms]
        pl_module.load_state_dict(self._average, strict=False)
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the even mean over the batches
            with torch.random.fork_rng(devices=[pl_module.device] if pl_module.device.type == "cuda" else []):
                for inputs in self._seen:
                    classifier(*inputs)
            found = pl_module.state_dict()
            self._average = {name: found[name].clone() for name in self._average}
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            pl_module.load_state_dict(own, strict=False)

    @torch.no_grad()
    def _update(self, pl_module: lightning.LightningModule, share: float) -> None:
        weights = {name: value for name, value in pl_module.state_dict().items() if name.startswith("classifier.")}
        if not self._average:
            self._average = {name: value.detach().clone() for name, value in weights.items()}
        else:
            for name, value in weights.items():
                kept = self._average[name] = self._average[name].to(value.device)  # of a checkpoint it lies on the CPU
                if kept.is_floating_point():
                    kept.lerp_(value.to(kept.dtype), share)
                else:
                    kept.copy_(value)
        self._count += 1


def best_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The module's state dict of a checkpoint, with the average in place of the weights where there is one."""
    average = checkpoint[KEY]["weights"] if KEY in checkpoint else {}
    return {**checkpoint["state_dict"], **average}


def _count(inputs: Inputs) -> int:
    return next(len(own) for own in inputs if own is not None)
