"""From a config to trained weights: data, module and batches put together, and Lightning's Trainer over them."""

import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.defaults import fill_defaults
from refract.pipeline.training.callbacks.stopping import heard
from refract.pipeline.training.ranks import Ranks, processes

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Assembly:
    """What a config comes to before the first step. identity: see `prepare_data`; precision: Lightning's name; text: what a bundle says of
    the network that reads texts, None where there is none."""

    manifest: Any
    identity: dict[str, str]
    module: Any
    data: Any
    device: str
    precision: str
    processes: Ranks
    text: dict[str, Any] | None = None


def assemble(config: Config, prepared: tuple[Any, dict[str, str]] | None = None) -> Assembly:
    """Check the data, split it, and make the classifier, its module and its batches. prepared: what `prepare_data` gave for the same data
    and seed before. The config gets the values that it leaves open. Raises as `train`."""
    import lightning

    from refract.augment import Augmenter
    from refract.pipeline.data.datamodule import ImageDataModule
    from refract.pipeline.data.prepare import prepare_data
    from refract.pipeline.training.build import check_recipe, check_task, make_module, make_preprocess, measured
    from refract.pipeline.training.device import choose_device, choose_precision

    fill_defaults(config)
    device = choose_device(config.trainer.device)
    precision = choose_precision(config.trainer, device)
    group = processes(config.trainer.devices, device)
    if not group.first:
        logging.getLogger("refract.pipeline").setLevel(logging.ERROR)
    augmenter = Augmenter(
        config.augment.policy,
        config.trainer.seed,
        size=config.data.sides(),
        color_profile=config.data.color_profile,
    )
    check_recipe(config, augmenter, precision)
    preprocess = make_preprocess(config)
    manifest, identity = prepare_data(config) if prepared is None else prepared
    check_task(config, manifest.task)
    lightning.seed_everything(config.trainer.seed, workers=True, verbose=False)
    preprocess, arrays = measured(config, preprocess, manifest)
    module, text = make_module(config, manifest, augmenter, preprocess, arrays)
    data = ImageDataModule(
        manifest,
        augmenter=augmenter,
        preprocess=preprocess,
        batch_size=config.data.batch_size,
        workers=config.data.workers,
        repeats=config.data.repeats,
        views=config.loss.consistency > 0,
        balanced=config.data.sampler == "balanced",
        memory=config.data.memory,
        on_device=device == "cuda",
        tokens=module.classifier.tokens,
        reads_images="images" in module.classifier.reads,
    )
    return Assembly(manifest, identity, module, data, device, precision, group, text)


def fit(
    made: Assembly,
    config: Config,
    run_dir: Path,
    tracker: Any,
    checkpoint: Path | None = None,
    watchers: Sequence[Any] = (),
) -> list[dict[str, float]]:
    """Train, leave the weights of the epoch that `BestCheckpoint` keeps in the module, and return the metrics of each epoch.

    checkpoint: to resume from; watchers: further callbacks.

    Stopped where SIGTERM or Ctrl-C asked for it."""
    import torch
    from lightning.pytorch.callbacks import EarlyStopping

    from refract.pipeline.training.callbacks.averaging import WeightAverage, best_weights
    from refract.pipeline.training.callbacks.checkpoints import ResumeCheckpoint
    from refract.pipeline.training.callbacks.progress import BestCheckpoint, EpochReport, progress_bars, quiet_lightning
    from refract.pipeline.training.failing_batch import Reproducer

    quiet_lightning()
    module, device, group = made.module, made.device, made.processes
    swa = config.trainer.swa_start
    folder = run_dir.resolve() / CHECKPOINTS
    # Before it there is no average to keep.
    first = 0 if swa is None else int(swa * config.trainer.max_epochs)
    best = BestCheckpoint(folder, module.monitor, samples=len(made.manifest.of("val")), first_epoch=first)
    report = EpochReport(module.monitor, tracker)
    bars = progress_bars() if group.first else []
    more: list[Any] = list(watchers)
    if config.trainer.ema or swa is not None:
        more.append(WeightAverage(decay=config.trainer.ema, swa_start=swa))
    if config.trainer.patience is not None:
        more.append(EarlyStopping(module.monitor, mode="max", patience=config.trainer.patience, check_finite=False))
    if config.trainer.compile:
        module.classifier.network.compile()  # in place: the keys of the weights stay as they are
    with heard() as stop:
        whole_from = None if swa is None else first
        seconds = config.trainer.checkpoint_seconds
        resumable = ResumeCheckpoint(folder, seconds=seconds, stop=stop, whole_from=whole_from)
        bad_batch = Reproducer(run_dir, _network_facts(made, config), made.data.train_set)
        _run_trainer(made, config, run_dir, [*more, best, report, *bars, resumable, bad_batch], checkpoint)
    if not group.first:
        return report.history
    kept = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(best_weights(kept))
    _report_kept(kept["epoch"], report.history, module.monitor, first)
    module.to("cuda" if device == "cuda" else "cpu").eval()
    return report.history


def _report_kept(epoch: int, history: Sequence[Mapping[str, float]], monitor: str, first: int) -> None:
    """first: the epoch before which none is kept."""
    scores = [row[monitor] for row in history]
    highest = max(scores[first:])
    shown = f"{monitor} {scores[epoch]:.4f}"
    if scores[epoch] < highest:
        shown += f", within one standard error of {highest:.4f} in epoch {scores.index(highest, first) + 1}"
    log.info("keeping the weights of epoch %d/%d: %s", epoch + 1, len(history), shown)


def _network_facts(made: Assembly, config: Config) -> dict[str, Any]:
    """What builds the classifier again."""
    preprocess = made.data.preprocess
    tokens = made.module.classifier.tokens
    return {
        **network_record(config),
        "text": made.text,
        "files": {} if tokens is None else dict(tokens.files),
        "classes": len(made.manifest.labels),
        "task": made.manifest.task,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "normalize": preprocess.normalize,
        "seed": config.trainer.seed,
    }


def network_record(config: Config) -> dict[str, Any]:
    """What a bundle says of the network that images go through."""
    head = {} if config.model.head == "linear" else {"head": config.model.head}
    size = list(config.data.sides())
    return {"network": {"name": config.model.name, "image_size": size, "args": config.model.args | head}}


def _run_trainer(made: Assembly, config: Config, run_dir: Path, callbacks: list[Any], checkpoint: Path | None) -> None:
    import lightning
    from lightning.pytorch.callbacks import ProgressBar

    from refract.models.allocator import release_freed_memory
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.training.callbacks.checkpoints import WholeFiles
    from refract.pipeline.training.failing_batch import Reproducer

    group, device = made.processes, made.device
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=group.devices,
        num_nodes=group.nodes,
        strategy=_strategy(group.count, config.model.mode),
        sync_batchnorm=group.count > 1 and device == "cuda",
        use_distributed_sampler=False,  # the data's own orders know their process
        precision=made.precision,  # type: ignore[arg-type]
        max_epochs=config.trainer.max_epochs,
        callbacks=callbacks,
        plugins=[WholeFiles()],
        accumulate_grad_batches=config.trainer.accumulate,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=run_dir,
    )
    try:
        trainer.fit(made.module, datamodule=made.data, ckpt_path=checkpoint, weights_only=True)
    except FloatingPointError as error:
        told = next(callback.told for callback in callbacks if isinstance(callback, Reproducer))
        raise ConfigError(
            f"training stopped: {error}. A lower learning rate (--optim.lr) is the usual cure. {told}".rstrip()
        ) from error
    except SystemExit as error:  # what Lightning makes of Ctrl-C, after switching it off
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error
    except DataError as error:  # from a worker process it comes wrapped in that process's traceback
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error
    finally:
        release_freed_memory()  # evaluation needs less


def _strategy(processes: int, mode: str) -> str:
    """Where layers are frozen, now or later, some parameters have no gradient that the processes could exchange."""
    if processes == 1:
        return "auto"
    return "ddp" if mode == "fine-tune" else "ddp_find_unused_parameters_true"
