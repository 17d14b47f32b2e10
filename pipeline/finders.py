"""A learning rate and a batch size for a config, by trying: Lightning's tuner on what training would begin with."""

import tempfile
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.training import Assembly, assemble

LOWEST_LR, HIGHEST_LR = 1e-6, 10.0


@dataclass(frozen=True)
class LrRange:
    """suggestion: where the smoothed loss falls fastest; lrs, losses: what was tried, up to where the loss rose to four times its best."""

    suggestion: float
    lrs: list[float]
    losses: list[float]


def find_lr(config: Config, *, steps: int = 100) -> LrRange:
    """The range test: one step each with rising learning rates (Smith 2017, arXiv:1506.01186, section 3.3). Trains nothing for good.

    ConfigError where the loss never falls, and as `assemble`.
    """
    made = assemble(config)
    with tempfile.TemporaryDirectory() as folder:
        tuner = _tuner(made, config, folder)
        # A range of 10 million passes the loss's explosion: the test ends there by itself.
        found: Any = tuner.lr_find(
            made.module,
            datamodule=made.data,
            min_lr=LOWEST_LR,
            max_lr=HIGHEST_LR,
            num_training=steps,
            update_attr=False,
        )
    suggestion = found.suggestion(skip_begin=5, skip_end=1)
    if suggestion is None:
        raise ConfigError(
            f"no learning rate between {LOWEST_LR:g} and {HIGHEST_LR:g} lets the loss fall within {steps} steps"
        )
    return LrRange(float(suggestion), list(found.results["lr"]), list(found.results["loss"]))


def find_batch_size(config: Config) -> int:
    """The largest power of two, at most the training set, whose steps fit the device's memory. ConfigError as `assemble`."""
    made = assemble(config)
    with tempfile.TemporaryDirectory() as folder:
        tuner = _tuner(made, config, folder)
        found = tuner.scale_batch_size(
            made.module,
            datamodule=made.data,
            init_val=8,
            steps_per_trial=2,
            max_val=max(8, len(made.data.train_set) // 2),
        )
    return int(found or made.data.batch_size)


def _tuner(made: Assembly, config: Config, folder: str) -> Any:
    import lightning
    from lightning.pytorch.tuner import Tuner

    from pipeline.progress import quiet_lightning

    quiet_lightning()
    trainer = lightning.Trainer(
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
        accumulate_grad_batches=config.trainer.accumulate,
    )
    return Tuner(trainer)
