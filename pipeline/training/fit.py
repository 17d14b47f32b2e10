"""Train from a config: assemble data and module, and run Lightning's Trainer on them."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.config import Config, ConfigError, check_loss
from refract.pipeline.config.defaults import filled
from refract.pipeline.stopping import stop_requests
from refract.pipeline.training.ranks import Ranks, batches_of_step, current_ranks, from_rank_0
from refract.pipeline.training.source_model import SourceModel, source_model
from refract.plugins import load

if TYPE_CHECKING:
    from refract.models.training.lightning_imports import Callback
    from refract.models.training.lightning_module import ClassifierModule
    from refract.pipeline.data.datamodule import ImageDataModule
    from refract.pipeline.data.manifest import Manifest
    from refract.pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"

LARGEST_FIT, FEW_LABELS = 10_000_000, 50
"""The most training samples × labels, at least FEW_LABELS, for which a head is fitted on embeddings by default: the processor fits it, and
holds all embeddings in memory."""


@dataclass(frozen=True)
class Assembly:
    """The data, the module and the device of a training before its first step.

    config: without unset values, with a version in place of an alias and a commit in place of a branch in model.weights, and with the last
    decision in data.labels; identity: see `prepare_data`; precision: Lightning's name; accumulate: batches of a step; text: the bundle's
    record of the text network, None without one; source: the model that training starts from; pinned_from: model.weights before the branch
    was replaced, None for other weights; timed_input: whether data.decode_on is the faster path in place of `auto`.
    """

    config: Config
    manifest: "Manifest"
    identity: dict[str, str]
    module: "ClassifierModule"
    data: "ImageDataModule"
    device: str
    precision: str
    ranks: Ranks
    text: dict[str, Any] | None = None
    source: SourceModel | None = None
    accumulate: int = 1
    pinned_from: str | None = None
    timed_input: bool = False

    @property
    def weights(self) -> str:
        """`model.weights`, with the folder on this machine in place of a model's name."""
        return self.config.model.weights if self.source is None else str(self.source.bundle.path)

    @property
    def network_record(self) -> dict[str, Any]:
        """The bundle's record of the image network."""
        return self.config.model.record(self.config.data.sides())

    @property
    def start(self) -> dict[str, str]:
        """The record of the model or of the Hub's weights that training starts from: `source` is model.weights as configured; else {}."""
        if self.source is not None:
            return self.source.record
        return {} if self.pinned_from is None else {"source": self.pinned_from, "weights": self.config.model.weights}


def assemble(
    config: Config,
    prepared: "tuple[Manifest, dict[str, str]] | None" = None,
    *,
    source_digest: str | None = None,
    ranks_before: int | None = None,
) -> Assembly:
    """Check and split the data, and build the classifier, its module and its batches.

    prepared: an earlier result of `prepare_data` for the config, which names the last decision in data.labels; source_digest: see
    `source_model`, for a resumed run; ranks_before: number of ranks with which that run started. Raises the errors of `train`.
    """
    from refract.augment import Augmenter
    from refract.models.pretrained.weights_files import is_on_hub, pinned
    from refract.models.training.lightning_imports import lightning
    from refract.pipeline.data.datamodule import ImageDataModule
    from refract.pipeline.data.prepare import prepare_data
    from refract.pipeline.data.preprocessing import make_preprocess, with_normalisation
    from refract.pipeline.training.build import make_module
    from refract.pipeline.training.device import choose_device, choose_precision
    from refract.pipeline.training.recipe import check_ranks, check_recipe, check_task

    if config.trainer.folds and config.trainer.fold is None:
        raise ConfigError(
            f"trainer.folds: {config.trainer.folds} trains several models, which only `refract train` does; "
            "set trainer.folds: 0, or trainer.fold: 1 for one of them"
        )
    load(config.plugins)
    check_loss(config, "the config")
    asked = config.model.unfreeze_epochs
    config = filled(config if prepared is not None else with_decisions_of_rank_0(config))
    device = choose_device(config.trainer.device)
    precision = choose_precision(config.trainer, device)
    ranks = current_ranks(config.trainer.devices, device)
    batch_size, accumulate = batches_of_step(
        config.data.batch_size, config.trainer.accumulate, before=ranks_before or ranks.count, count=ranks.count
    )
    if not ranks.first:
        for package in ("pipeline", "progress"):
            logging.getLogger(f"refract.{package}").setLevel(logging.ERROR)
    augmenter = Augmenter(
        config.augment.policy,
        config.trainer.seed,
        size=config.data.sides(),
        color_profile=config.data.color_profile,
        interpolation=config.data.interpolation,
    )
    check_recipe(config, augmenter, precision)
    pinned_from = config.model.weights if is_on_hub(config.model.weights) else None
    if pinned_from is not None:
        config = config.changed({"model.weights": from_rank_0("weights", lambda: pinned(pinned_from))})
    source = source_model(config.model.weights, Path(config.trainer.runs_dir), config.tracking, source_digest)
    local = config
    if source is not None:
        config = config.changed({"model.weights": source.weights})
        local = config.changed({"model.weights": str(source.bundle.path)})
    preprocess = make_preprocess(local.data, local.model)
    manifest, identity = prepare_data(config) if prepared is None else prepared
    check_task(config.loss, manifest.task)
    check_ranks(config, len(manifest.of("val")), ranks.count)
    lightning.seed_everything(config.trainer.seed, workers=True, verbose=False)
    preprocess, arrays = with_normalisation(preprocess, manifest, local.data.normalize, local.model.weights)
    module, text = make_module(local, manifest, augmenter, preprocess, arrays, source)
    if config.model.starts_from_probe:
        config = _with_fitted_head(config, module, manifest, asked)
    data = ImageDataModule(
        manifest,
        augmenter=augmenter,
        preprocess=preprocess,
        batch_size=batch_size,
        workers=config.data.workers,
        repeats=config.data.repeats,
        views=config.loss.consistency > 0,
        balanced=config.data.sampler == "balanced",
        memory=config.data.memory,
        on_device=device == "cuda",
        decode_on=config.data.decode_on,
        tokens=module.classifier.tokens,
        reads_images="images" in module.classifier.reads,
    )
    return Assembly(
        config, manifest, identity, module, data, device, precision, ranks, text, source, accumulate, pinned_from
    )


def _with_fitted_head(config: Config, module: "ClassifierModule", manifest: "Manifest", asked: int | None) -> Config:
    """Return the config of a training that fits its head on embeddings, with an epoch of the head alone where that is impossible or slow.

    module: gets the same epoch; asked: `model.unfreeze_epochs` of the user. ConfigError if the user asked for a head that cannot be fitted.
    """
    from refract.pipeline.features.training import why_not_fitted

    name, train = config.model.name, len(manifest.of("train"))
    reason = why_not_fitted(module.classifier, config.data.sides())
    if asked is not None:
        if reason is not None:
            raise ConfigError(
                f"model.unfreeze_epochs: 0 fits the head on embeddings, but {name} {reason}; set model.unfreeze_epochs: 1"
            )
        return config
    if reason is not None:
        reason = f"{name} {reason}"
    elif train * max(len(manifest.labels), FEW_LABELS) > LARGEST_FIT:
        reason = f"fitting it on the embeddings of {train:,} images would take long (model.unfreeze_epochs: 0 does so)"
    else:
        return config
    log.info("the head is trained alone for one epoch: %s", reason)
    module.unfreeze_epochs = 1
    return config.changed({"model.unfreeze_epochs": 1})


def fit(
    assembly: Assembly,
    run_dir: Path,
    tracker: "Tracker | None",
    checkpoint: Path | None = None,
    watchers: "Sequence[Callback]" = (),
) -> list[dict[str, float]]:
    """Train, load the weights of the epoch that `BestCheckpoint` keeps into the module, and return the metrics of each epoch.

    tracker: None sends no metrics; checkpoint: to resume from; watchers: further callbacks. Raises Stopped after SIGTERM or Ctrl-C. A mode
    that only fits a head on embeddings has no epochs, checkpoints or watched steps.
    """
    if assembly.config.model.on_embeddings:
        from refract.pipeline.features.training import fit_on_embeddings

        return fit_on_embeddings(assembly, run_dir, tracker).history
    import torch

    from refract.models.training.lightning_imports import EarlyStopping
    from refract.models.training.lora import merge_adapters
    from refract.models.training.quantization_aware import rounded_forward
    from refract.pipeline.training.callbacks.averaging import WeightAverage, best_weights
    from refract.pipeline.training.callbacks.checkpoints import ResumeCheckpoint
    from refract.pipeline.training.callbacks.progress import BestCheckpoint, EpochReport, StepProgress, quiet_lightning
    from refract.pipeline.training.failing_batch import Reproducer
    from refract.pipeline.training.rank_failure import rank_lost, wait_for_torchrun

    quiet_lightning()
    module, device, ranks, config = assembly.module, assembly.device, assembly.ranks, assembly.config
    if config.model.starts_from_probe and checkpoint is None:
        from refract.pipeline.features.training import fitted_head

        fitted_head(assembly, "probe", run_dir)
        module.train()
    swa = config.trainer.swa_start
    folder = run_dir.resolve() / CHECKPOINTS
    # SWA has no average before this epoch.
    first = 0 if swa is None else int(swa * config.trainer.max_epochs)
    best = BestCheckpoint(folder, module.monitor, samples=len(assembly.manifest.of("val")), first_epoch=first)
    report = EpochReport(module.monitor, tracker)
    bars = [StepProgress()] if ranks.first else []
    optional: list[Callback] = list(watchers)
    if config.trainer.ema or swa is not None:
        optional.append(WeightAverage(decay=config.trainer.ema, swa_start=swa))
    if config.trainer.patience is not None:
        optional.append(EarlyStopping(module.monitor, mode="max", patience=config.trainer.patience, check_finite=False))
    if config.trainer.compile:
        module.classifier.network.compile()  # in place, so the state_dict keys stay the same
    sharded = config.trainer.strategy == "fsdp" and ranks.count > 1
    classifier = deepcopy(module.classifier) if sharded and ranks.first else module.classifier
    with stop_requests() as stop:
        whole_from = None if swa is None else first
        seconds = config.trainer.checkpoint_seconds
        resumable = ResumeCheckpoint(folder, seconds=seconds, stop=stop, whole_from=whole_from)
        bad_batch = Reproducer(run_dir, _network_facts(assembly), assembly.data.train_set)
        rounded = rounded_forward(module.classifier.network) if config.trainer.quantization_aware else nullcontext(0)
        try:
            with rounded as layers:
                if layers:
                    log.info("training for 8 bits: the weights and inputs of %d layers are rounded", layers)
                _run_trainer(assembly, run_dir, [*optional, best, *bars, report, resumable, bad_batch], checkpoint)
        except RuntimeError as error:
            if (lost := rank_lost(error)) is None:
                raise
            wait_for_torchrun(stop)
            raise lost from error
    if not ranks.first:
        return report.history
    module.classifier = classifier  # whole, for the weights of the checkpoint
    module.classifier.network._compiled_call_impl = (
        None  # a compiled network would not call the hooks of the evaluation
    )
    best_checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(best_weights(best_checkpoint))
    merge_adapters(module)
    _log_best_epoch(best_checkpoint["epoch"], report.history, module.monitor, first)
    module.to("cuda" if device == "cuda" else "cpu").eval()
    return report.history


def _log_best_epoch(epoch: int, history: Sequence[Mapping[str, float]], monitor: str, first: int) -> None:
    """Log which epoch's weights are kept. first: the first epoch that may be kept."""
    scores = [row[monitor] for row in history]
    highest = max(scores[first:])
    shown = f"{monitor} {scores[epoch]:.4f}"
    if scores[epoch] < highest:
        shown += f", within one standard error of {highest:.4f} in epoch {scores.index(highest, first) + 1}"
    log.info("keeping the weights of epoch %d/%d: %s", epoch + 1, len(history), shown)


def _network_facts(assembly: Assembly) -> dict[str, Any]:
    """Return the values that rebuild the classifier."""
    preprocess, config = assembly.data.preprocess, assembly.config
    tokens = assembly.module.classifier.tokens
    return {
        "network": assembly.network_record,
        "text": assembly.text,
        "files": {} if tokens is None else dict(tokens.files),
        "classes": len(assembly.manifest.labels),
        "task": assembly.manifest.task,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "normalize": preprocess.normalize,
        "seed": config.trainer.seed,
    }


def _run_trainer(assembly: Assembly, run_dir: Path, callbacks: "list[Callback]", checkpoint: Path | None) -> None:
    from refract.models.allocator import release_freed_memory
    from refract.models.training.lightning_imports import lightning
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.training.callbacks.checkpoints import AtomicCheckpoints
    from refract.pipeline.training.failing_batch import Reproducer
    from refract.pipeline.training.strategies import strategy_of

    ranks, device, config = assembly.ranks, assembly.device, assembly.config
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=ranks.devices,
        num_nodes=ranks.nodes,
        strategy=strategy_of(ranks.count, config.model.mode, config.trainer.strategy),
        sync_batchnorm=ranks.count > 1 and device == "cuda",
        use_distributed_sampler=False,  # the data module's samplers divide the samples among the ranks
        precision=assembly.precision,  # type: ignore[arg-type]
        max_epochs=config.trainer.max_epochs,
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        accumulate_grad_batches=assembly.accumulate,
        enable_progress_bar=False,
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=run_dir,
    )
    try:
        with interrupts_raised():
            trainer.fit(assembly.module, datamodule=assembly.data, ckpt_path=checkpoint, weights_only=True)
    except FloatingPointError as error:
        diagnosis = next(callback.message for callback in callbacks if isinstance(callback, Reproducer))
        raise ConfigError(
            f"training stopped: {error}. A lower learning rate (--optim.lr) is the usual cure. {diagnosis}".rstrip()
        ) from error
    except DataError as error:  # a worker process wraps the message in its traceback
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error
    finally:
        release_freed_memory()  # evaluation needs less memory


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, for which Lightning raises SystemExit after it has ignored further ones."""
    try:
        yield
    except SystemExit as error:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error


def with_decisions_of_rank_0(config: Config) -> Config:
    """Return the config with the last decision in `data.labels`. Ranks that start some minutes later use the same one."""
    from refract.pipeline.labels.address import pinned

    if (labels := config.data.labels) is None:
        return config
    return config.changed({"data.labels": from_rank_0("labels", lambda: str(pinned(labels)))})
