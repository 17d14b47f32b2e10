"""A learning rate and a batch size for a config, by trying them on what training would begin with."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.training.fit import Assembly, assemble

LOWEST_LR, HIGHEST_LR = 1e-6, 10.0


@dataclass(frozen=True)
class LrRange:
    """suggestion: where the smoothed loss falls fastest; lrs, losses: what was tried, smoothed, up to where the loss rose to four
    times its best."""

    suggestion: float
    lrs: list[float]
    losses: list[float]


def find_lr(config: Config, *, steps: int = 100) -> LrRange:
    """The range test: one step each with learning rates that rise evenly in the logarithm, every group keeping its share of the rate (Smith
    2017, arXiv:1506.01186, section 3.3). Trains nothing for good. ConfigError where the loss never falls, and as `assemble`.
    """
    from lightning.pytorch.callbacks import Callback

    made = assemble(config)
    rates = np.geomspace(LOWEST_LR, HIGHEST_LR, steps)
    losses: list[float] = []

    class Rise(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # After the schedule's own step. Groups differ by layer_decay and norm_lr.
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = group["initial_lr"] / made.module.optim.lr * rates[len(losses)]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))
            smooth = _smoothed(losses)
            trainer.should_stop = len(losses) == steps or (len(losses) > 10 and smooth[-1] > 4 * smooth.min())

    with (
        tempfile.TemporaryDirectory() as folder,
        suppress(FloatingPointError),
    ):  # a loss that is no number is the range's end
        _trainer(made, folder, callbacks=[Rise()]).fit(made.module, datamodule=made.data)
    # Seen from both sides, so that the fall is not found later than it was.
    smooth = (_smoothed(losses) + _smoothed(losses[::-1])[::-1]) / 2
    # What falls after the lowest loss is the noise of a training that is lost already.
    falling = smooth[5 : int(smooth.argmin()) + 1]
    slopes = np.gradient(falling) if len(falling) > 1 else np.zeros(1)
    if slopes.min() >= 0:
        raise ConfigError(
            f"no learning rate between {LOWEST_LR:g} and {HIGHEST_LR:g} lets the loss fall within {steps} steps"
        )
    return LrRange(float(rates[5 + int(slopes.argmin())]), rates[: len(losses)].tolist(), smooth.tolist())


def _smoothed(losses: list[float]) -> np.ndarray:
    """Exponential mean with weight 0.2 for the newest, corrected for its start."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = 0.8 * mean + 0.2 * loss
        found.append(mean / (1 - 0.8**count))
    return np.array(found)


def find_batch_size(config: Config) -> int:
    """The largest power of two, at most the training set, whose steps fit the device's memory. ConfigError as `assemble`."""
    from lightning.pytorch.tuner import Tuner

    made = assemble(config)
    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(_trainer(made, folder, config.trainer.accumulate))
        found = tuner.scale_batch_size(
            made.module,
            datamodule=made.data,
            init_val=8,
            steps_per_trial=2,
            max_val=max(8, len(made.data.train_set) // 2),
        )
    return int(found or made.data.batch_size)


def _trainer(made: Assembly, folder: str, accumulate: int = 1, **more: Any) -> Any:
    import lightning

    from refract.pipeline.training.callbacks.progress import quiet_lightning

    quiet_lightning()
    return lightning.Trainer(
        accelerator="gpu" if made.device == "cuda" else "cpu",
        devices=1,
        precision=made.precision,  # type: ignore[arg-type]
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
