"""Find a learning rate and a batch size for a config by short trial trainings."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.training.fit import Assembly, assemble
from refract.progress import Progress

LOWEST_LR, HIGHEST_LR = 1e-6, 10.0


@dataclass(frozen=True)
class LrRange:
    """The result of a learning rate range test.

    suggestion: the rate at which the smoothed loss falls fastest; lrs, losses: the tried rates and their smoothed losses, up to where the
    loss rose to four times its minimum.
    """

    suggestion: float
    lrs: list[float]
    losses: list[float]


def find_lr(config: Config, *, steps: int = 100) -> LrRange:
    """Run a learning rate range test: one step at each of `steps` rates, spaced evenly in the logarithm.

    Parameter groups keep the ratios of their rates. The trained weights are discarded. Raises ConfigError if the loss never falls, and the
    errors of `assemble`. Source: Smith 2017, arXiv:1506.01186, section 3.3.
    """
    from refract.models.training.lightning_imports import Callback

    assembly = assemble(config)
    rates = np.geomspace(LOWEST_LR, HIGHEST_LR, steps)
    losses: list[float] = []

    class Rise(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # Runs after the scheduler's step. The groups' rates differ by layer_decay and norm_lr.
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = group["initial_lr"] / assembly.module.optim.peak_lr * rates[len(losses)]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))
            progress.update()
            smooth = _smoothed(losses)
            trainer.should_stop = len(losses) == steps or (len(losses) > 10 and smooth[-1] > 4 * smooth.min())

    # A non-finite loss ends the range.
    with (
        tempfile.TemporaryDirectory() as folder,
        suppress(FloatingPointError),
        Progress("trying learning rates", steps, unit="steps") as progress,
    ):
        trial_trainer(assembly, folder, callbacks=[Rise()]).fit(assembly.module, datamodule=assembly.data)
    # Smoothing in both directions avoids the lag of a one-sided mean.
    smooth = (_smoothed(losses) + _smoothed(losses[::-1])[::-1]) / 2
    # Falls after the minimum are the noise of a training that already diverges.
    falling = smooth[5 : int(smooth.argmin()) + 1]
    slopes = np.gradient(falling) if len(falling) > 1 else np.zeros(1)
    if slopes.min() >= 0:
        raise ConfigError(
            f"the loss does not fall within {steps} steps at any learning rate from {LOWEST_LR:g} to {HIGHEST_LR:g}; check the labels"
        )
    return LrRange(float(rates[5 + int(slopes.argmin())]), rates[: len(losses)].tolist(), smooth.tolist())


def _smoothed(losses: list[float]) -> np.ndarray:
    """Return the bias-corrected exponential moving average, with weight 0.2 for the newest loss."""
    mean, means = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = 0.8 * mean + 0.2 * loss
        means.append(mean / (1 - 0.8**count))
    return np.array(means)


def find_batch_size(config: Config) -> int:
    """Find the largest power of two, at most the size of the training set, that fits the device's memory.

    Raises the errors of `assemble`.
    """
    from refract.models.training.lightning_imports import Tuner

    assembly = assemble(config)
    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(trial_trainer(assembly, folder, config.trainer.accumulate))
        batch_size = tuner.scale_batch_size(
            assembly.module,
            datamodule=assembly.data,
            init_val=8,
            steps_per_trial=2,
            max_val=max(8, len(assembly.data.train_set) // 2),
        )
    return int(batch_size or assembly.data.batch_size)


def trial_trainer(assembly: Assembly, folder: str, accumulate: int = 1, **more: Any) -> Any:
    from refract.models.training.lightning_imports import lightning
    from refract.pipeline.training.callbacks.progress import quiet_lightning

    quiet_lightning()
    return lightning.Trainer(
        accelerator="gpu" if assembly.device == "cuda" else "cpu",
        devices=1,
        precision=assembly.precision,  # type: ignore[arg-type]
        max_epochs=1000,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        **more,
    )
