"""From a config to a bundle: check and split the data, train, evaluate on the hold-out, write the bundle, register it."""

import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, TrainerConfig
from pipeline.processes import Processes, processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """run_dir: everything of the run; bundle: its bundle; metrics: on the hold-out; version: of the registered model, if any."""

    run_dir: Path
    bundle: Path
    metrics: dict[str, float]
    version: str | None


def train(config: Config, *, name: str = "run") -> Result | None:
    """Train as the config says. name: of the run, where the config gives none. None in all but the first of several processes.

    Raises ConfigError, PolicyError, DataError, TrackingError or BundleError for what a user can mend.
    """
    from pipeline.tracking import TrackingError, track

    made = assemble(config)
    manifest, module, data = made.manifest, made.module, made.data
    if not made.processes.first:
        fit(made, config, Path(config.trainer.runs_dir), None)
        return None
    run_dir = new_run_dir(config.trainer, name)
    log.info("run %s on %s, %s: %s", run_dir, made.device, made.precision, _described(manifest))
    try:
        with track(config.tracking, run_dir.name, config.to_dict()) as tracker:
            _write_yaml(run_dir / "config.yaml", config.to_dict())
            history = fit(made, config, run_dir, tracker)
            return _finish(config, manifest, made.identity, data, module, run_dir, history, tracker)
    except TrackingError:
        if not any(run_dir.iterdir()):  # nothing was done: the name is free again
            run_dir.rmdir()
        raise


@dataclass(frozen=True)
class Assembly:
    """What a config comes to before the first step. identity: see `prepare_data`; precision: Lightning's name."""

    manifest: Any
    identity: dict[str, str]
    module: Any
    data: Any
    device: str
    precision: str
    processes: Processes


def assemble(config: Config) -> Assembly:
    """Check the data, split it, and make the classifier, its module and its batches. Raises as `train`."""
    import lightning

    from augment import Augmenter
    from pipeline.data.module import PictureData
    from pipeline.device import choose_device, choose_precision
    from pipeline.recipe import check_recipe, check_task, make_module, make_preprocess, measured

    device = choose_device(config.trainer.device)
    precision = choose_precision(config.trainer, device)
    group = processes(config.trainer.devices, device)
    if not group.first:
        logging.getLogger("pipeline").setLevel(logging.ERROR)
    augmenter = Augmenter(config.augment.policy, config.trainer.seed, size=config.image_size())
    check_recipe(config, augmenter, precision)
    preprocess = make_preprocess(config)
    manifest, identity = prepare_data(config)
    check_task(config, manifest.task)
    lightning.seed_everything(config.trainer.seed, workers=True, verbose=False)
    preprocess, arrays = measured(config, preprocess, manifest)
    module = make_module(config, manifest, augmenter, preprocess, arrays)
    data = PictureData(
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
    )
    return Assembly(manifest, identity, module, data, device, precision, group)


def prepare_data(config: Config) -> tuple[Any, dict[str, str]]:
    """(the checked and split manifest, what it is known by again: its `content` and, with the splits, its `fingerprint`). DataError lists
    what is wrong with the data."""
    from pipeline.data.check import check_classes, drop_bad, drop_contradictory, drop_shared, scan
    from pipeline.data.manifest import load_manifest
    from pipeline.data.splits import draw_splits

    manifest = load_manifest(config.data.source, config.data.task)
    found = scan(manifest.samples)
    manifest = drop_bad(manifest, found, config.data.on_bad_file)
    content = found.content(manifest)
    manifest = drop_contradictory(manifest, found, config.data.on_bad_file)
    manifest = draw_splits(
        manifest,
        found.hashes,
        val_share=config.data.val_share,
        test_share=config.data.test_share,
        seed=config.trainer.seed,
    )
    manifest = drop_shared(manifest, found, config.data.on_bad_file)
    for warning in check_classes(manifest):
        log.warning("data: %s", warning)
    if found.bad:
        log.warning("data: left out %d unreadable pictures", len(found.bad))
    return manifest, {"fingerprint": found.fingerprint(manifest), "content": content}


def new_run_dir(config: TrainerConfig, name: str) -> Path:
    """A new folder below `runs_dir`. ConfigError where the named one exists: a run is never overwritten."""
    root = Path(config.runs_dir)
    wanted = config.run_name or f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 100):
        path = root / (wanted if attempt == 1 else f"{wanted}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError as error:
            if config.run_name or not root.is_dir():
                raise ConfigError(
                    f"trainer.run_name: {path} exists already; choose another name or remove it"
                ) from error
        except OSError as error:
            raise ConfigError(f"trainer.runs_dir: {path} cannot be made: {error.strerror}") from error
    raise ConfigError(f"trainer.runs_dir: no free name like {wanted} in {root}")


def fit(made: Assembly, config: Config, run_dir: Path, tracker: Any) -> list[dict[str, float]]:
    """Train, leave the best epoch's weights in the module, and return the metrics of each epoch."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import EarlyStopping

    from pipeline.averaging import WeightAverage, best_weights
    from pipeline.data.manifest import DataError
    from pipeline.progress import BestCheckpoint, EpochReport, progress_bars, quiet_lightning

    quiet_lightning()
    module, device, group = made.module, made.device, made.processes
    swa = config.trainer.swa_start
    best = BestCheckpoint(run_dir / "checkpoints", "best", monitor=module.monitor, mode="max", save_last=True)
    best.first_epoch = (
        0 if swa is None else int(swa * config.trainer.max_epochs)
    )  # before it there is no average to keep
    report = EpochReport(module.monitor, tracker)
    bars = progress_bars() if group.first else []
    more: list[Any] = []
    if config.trainer.ema or swa is not None:
        more.append(WeightAverage(decay=config.trainer.ema, swa_start=swa))
    if config.trainer.patience is not None:
        more.append(EarlyStopping(module.monitor, mode="max", patience=config.trainer.patience, check_finite=False))
    if config.trainer.compile:
        module.classifier.network.compile()  # in place: the keys of the weights stay as they are
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=group.devices,
        num_nodes=group.nodes,
        strategy="ddp" if group.count > 1 else "auto",
        sync_batchnorm=group.count > 1 and device == "cuda",
        use_distributed_sampler=False,  # the data's own orders know their process
        precision=made.precision,  # type: ignore[arg-type]
        max_epochs=config.trainer.max_epochs,
        callbacks=[*more, best, report, *bars],
        accumulate_grad_batches=config.trainer.accumulate,
        enable_progress_bar=bool(bars),
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=run_dir,
    )
    try:
        trainer.fit(module, datamodule=made.data)
    except FloatingPointError as error:
        raise ConfigError(
            f"training stopped: {error}. A lower learning rate (--optim.lr) is the usual cure."
        ) from error
    except SystemExit as error:  # what Lightning makes of Ctrl-C, after switching it off
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error
    except DataError as error:  # from a worker process it comes wrapped in that process's traceback
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error
    if not group.first:
        return report.history
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(best_weights(checkpoint))
    module.to("cuda" if device == "cuda" else "cpu").eval()
    return report.history


def _finish(
    config: Config,
    manifest: Any,
    identity: dict[str, str],
    data: Any,
    module: Any,
    run_dir: Path,
    history: list,
    tracker: Any,
) -> Result:
    from models.bundle import BundleInfo, save_bundle
    from pipeline.data.splits import write_splits
    from pipeline.evaluation import evaluate
    from pipeline.golden import make_goldens
    from pipeline.plots import confusion_plot, curves_plot
    from pipeline.preview import preview_grid

    test = manifest.of("test")
    classifier, preprocess = module.classifier, data.preprocess
    measure = partial(evaluate, classifier, preprocess, test, task=manifest.task, labels=manifest.labels)
    evaluation = measure()
    metrics = evaluation.metrics
    if config.trainer.tta != "none":  # beside the figures without it, which `refract evaluate` and the server give
        metrics = metrics | {f"tta_{name}": value for name, value in measure(tta=config.trainer.tta).metrics.items()}
    classifier.to("cpu")
    info = BundleInfo(
        name=config.tracking.model_name or run_dir.name,
        task=manifest.task,
        labels=manifest.labels,
        network={
            "name": config.model.name,
            "image_size": list(config.image_size()),
            "args": config.model.args | ({} if config.model.head == "linear" else {"head": config.model.head}),
        },
        preprocess=preprocess.to_dict(),
        thresholds=tuple([0.5] * len(manifest.labels)) if manifest.task == "multilabel" else (),
        metrics=metrics,
        data={
            **identity,
            "source": manifest.source,
            "counts": {s: manifest.counts(s) for s in manifest.splits()},
        },
        config=config.to_dict(),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_splits(manifest, run_dir / "splits.csv")
    goldens = make_goldens(classifier, preprocess, test, task=manifest.task)
    bundle = save_bundle(run_dir / "bundle", info, classifier, goldens)
    curves_plot(history, run_dir / "curves.png")
    if evaluation.confusion is not None:
        confusion_plot(evaluation.confusion, manifest.labels, run_dir / "confusion.png")
    shown = data.train_set.samples[:: max(1, len(data.train_set) // 6)][:6]
    indices = range(0, len(data.train_set), max(1, len(data.train_set) // 6))
    pictures = [
        (manifest.labels[s.labels[0]] if s.labels else "-", s.read(), i) for s, i in zip(shown, indices, strict=False)
    ]
    preview_grid(pictures, data.train_set.augmenter).save(run_dir / "preview.png")
    version = None
    if tracker is not None:
        tracker.log_metrics({f"test_{name}": value for name, value in metrics.items()}, step=len(history))
        tracker.log_files([file for file in sorted(run_dir.iterdir()) if file.is_file()], bundle)
        if config.tracking.model_name:
            version = tracker.register(config.tracking.model_name, config.tracking.alias)
    return Result(run_dir, bundle, metrics, version)


def _described(manifest: Any) -> str:
    counts = ", ".join(f"{len(manifest.of(split)):,} {split}" for split in manifest.splits())
    return f"{manifest.task}, {len(manifest.labels)} labels, {counts}"


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    import yaml

    path.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), "utf-8")


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    names = (
        "refract",
        "torch",
        "torchvision",
        "timm",
        "lightning",
        "numpy",
        "opencv-python-headless",
        "simplejpeg",
        "pillow",
    )
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
