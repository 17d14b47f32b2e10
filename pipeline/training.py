"""From a config to a bundle: check and split the data, train, evaluate on the hold-out, write the bundle, register it."""

import logging
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.files import write_atomically
from pipeline.processes import Processes, processes
from pipeline.provenance import code_state, flat_tags, inputs, machine, origin, peak_memory, versions
from pipeline.stopping import heard

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Result:
    """run_dir: everything of the run; bundle: its bundle; metrics: on the hold-out; version: of the registered model, if any, and before:
    that which had its alias until then."""

    run_dir: Path
    bundle: Path
    metrics: dict[str, float]
    version: str | None
    before: str | None = None


def train(config: Config, *, name: str = "run", resume: Path | None = None) -> Result | None:
    """Train as the config says. name: of the run, where the config gives none; resume: the folder of a run to go on with, whose config this
    is. None in all but the first of several processes.

    Raises ConfigError, PolicyError, DataError, TrackingError, CheckpointError or BundleError for what a user can mend; Stopped where it was
    asked to stop, and can go on.
    """
    from pipeline.checkpoints import newest, remove_fragments, remove_resume_checkpoints
    from pipeline.runs import held, new_run, old_run

    made = assemble(config)
    checkpoint = None if resume is None else newest(resume / CHECKPOINTS)
    if not made.processes.first:
        fit(made, config, resume or Path(config.trainer.runs_dir), None, checkpoint)
        return None
    code, diff = code_state()
    record = {
        "name": name,
        "runs_dir": config.trainer.runs_dir,
        "fingerprint": made.identity["fingerprint"],
        "inputs": inputs(config),
        "versions": versions(),
        "code": code,
        "machine": machine(made.device, made.precision),
        "created": _now(),
    }
    if isinstance(config.augment.policy, str) and Path(config.augment.policy).is_file():
        config.augment.policy = made.data.train_set.augmenter.policy.to_spec()  # the file may change
    run = new_run(config, name, record) if resume is None else old_run(resume, record)
    if diff and resume is None:
        write_atomically(run.path / "code.diff", diff.encode())
    for package, version in run.record["versions"].items():
        if version != record["versions"].get(package):  # type: ignore[attr-defined]
            log.warning("%s was %s when the run began: the weights may not come out equal to the bit", package, version)
    with held(run.path):
        log.info("run %s on %s, %s: %s", run.path, made.device, made.precision, _described(made.manifest))
        if resume is not None:
            remove_fragments(resume / CHECKPOINTS)
            for fragment in resume.glob(".bundle.*"):
                shutil.rmtree(fragment, ignore_errors=True)
            log.info("going on from %s", checkpoint or "its beginning, as there is no checkpoint")
        result = _tracked(made, config, run, checkpoint)
        run.finish()
        remove_resume_checkpoints(run.path / CHECKPOINTS)
    return result


def _tracked(made: "Assembly", config: Config, run: Any, checkpoint: Path | None) -> Result:
    """Train, write the bundle and register it, and tell MLflow, if it is wanted, how that ended."""
    from pipeline.cost import Cost
    from pipeline.stopping import Stopped
    from pipeline.tracking import Tracker, TrackingError

    cost = Cost(made.device)
    data = {"fingerprint": made.identity["fingerprint"], "source": made.manifest.source}
    counts = {split: len(made.manifest.of(split)) for split in made.manifest.splits()}
    tags = flat_tags(data=data | counts, code=run.record["code"], machine=run.record["machine"])
    tags |= origin(f"refract train {run.record['name']}")
    if "commit" in run.record["code"]:
        tags["mlflow.source.git.commit"] = run.record["code"]["commit"]  # which MLflow's own pages show
    try:
        tracker = Tracker(config.tracking, run.path, config.to_dict(), tags) if config.tracking.enabled else None
    except TrackingError:
        if not run.resumed:  # nothing was done: the name is free again
            shutil.rmtree(run.path)
        raise
    status = "FAILED"
    try:
        metrics = _make_bundle(made, config, run.path, tracker, checkpoint, cost)
        if tracker is not None:
            figures = {f"cost_{name}": value for name, value in cost.figures().items()}
            tracker.log_metrics({**figures, "cost_peak_memory_mib": peak_memory()}, step=0)
            tracker.tag({"rerun": f"refract rerun {tracker.journal.delivered.get('run_id', run.path)}"})
            files = [
                file
                for file in sorted(run.path.iterdir())
                if file.is_file() and not file.name.startswith((".", "journal"))
            ]
            tracker.log_files(files, run.path / "bundle")
            if config.tracking.model_name:
                tracker.register(config.tracking.model_name, config.tracking.alias)
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped) as error:
        status = "KILLED"
        if isinstance(error, Stopped):
            error.run = run.path
        raise
    finally:
        cost.close()
        if tracker is not None and (waiting := tracker.finish(status)):
            log.warning(
                "MLflow at %s does not have all of the run yet (%d entries); `refract sync %s` delivers them",
                tracker.uri,
                waiting,
                run.path,
            )
    answers = {} if tracker is None else tracker.journal.delivered
    return Result(run.path, run.path / "bundle", metrics, answers.get("version"), answers.get("version_before"))


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
    processes: Processes
    text: dict[str, Any] | None = None


def assemble(config: Config, prepared: tuple[Any, dict[str, str]] | None = None) -> Assembly:
    """Check the data, split it, and make the classifier, its module and its batches. prepared: what `prepare_data` gave for the same data
    and seed before. Raises as `train`."""
    import lightning

    from augment import Augmenter
    from pipeline.data.module import PictureData
    from pipeline.device import choose_device, choose_precision
    from pipeline.preparation import prepare_data
    from pipeline.recipe import check_recipe, check_task, make_module, make_preprocess, measured

    device = choose_device(config.trainer.device)
    precision = choose_precision(config.trainer, device)
    group = processes(config.trainer.devices, device)
    if not group.first:
        logging.getLogger("pipeline").setLevel(logging.ERROR)
    augmenter = Augmenter(config.augment.policy, config.trainer.seed, size=config.data.sides())
    check_recipe(config, augmenter, precision)
    preprocess = make_preprocess(config)
    manifest, identity = prepare_data(config) if prepared is None else prepared
    check_task(config, manifest.task)
    lightning.seed_everything(config.trainer.seed, workers=True, verbose=False)
    preprocess, arrays = measured(config, preprocess, manifest)
    module, text = make_module(config, manifest, augmenter, preprocess, arrays)
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
        tokens=module.classifier.tokens,
        pictures="pictures" in module.classifier.reads,
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
    """Train, leave the best epoch's weights in the module, and return the metrics of each epoch. checkpoint: to go on from; watchers:
    further callbacks.

    Stopped where SIGTERM or Ctrl-C asked for it."""
    import torch
    from lightning.pytorch.callbacks import EarlyStopping

    from pipeline.averaging import WeightAverage, best_weights
    from pipeline.checkpoints import ResumeCheckpoint
    from pipeline.progress import BestCheckpoint, EpochReport, progress_bars, quiet_lightning
    from pipeline.reproducer import Reproducer

    quiet_lightning()
    module, device, group = made.module, made.device, made.processes
    swa = config.trainer.swa_start
    folder = run_dir.resolve() / CHECKPOINTS
    best = BestCheckpoint(folder, "best", monitor=module.monitor, mode="max", enable_version_counter=False)
    # Before it there is no average to keep.
    best.first_epoch = 0 if swa is None else int(swa * config.trainer.max_epochs)
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
        whole_from = None if swa is None else best.first_epoch
        seconds = config.trainer.checkpoint_seconds
        resumable = ResumeCheckpoint(folder, seconds=seconds, stop=stop, whole_from=whole_from)
        bad_batch = Reproducer(run_dir, _network_facts(made, config), made.data.train_set)
        _run_trainer(made, config, run_dir, [*more, best, report, *bars, resumable, bad_batch], checkpoint)
    if not group.first:
        return report.history
    kept = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(best_weights(kept))
    module.to("cuda" if device == "cuda" else "cpu").eval()
    return report.history


def _network_facts(made: Assembly, config: Config) -> dict[str, Any]:
    """What builds the classifier again."""
    preprocess = made.data.preprocess
    tokens = made.module.classifier.tokens
    return {
        **_network_record(config),
        "text": made.text,
        "files": {} if tokens is None else dict(tokens.files),
        "classes": len(made.manifest.labels),
        "task": made.manifest.task,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "normalize": preprocess.normalize,
        "seed": config.trainer.seed,
    }


def _network_record(config: Config) -> dict[str, Any]:
    head = {} if config.model.head == "linear" else {"head": config.model.head}
    size = list(config.data.sides())
    return {"network": {"name": config.model.name, "image_size": size, "args": config.model.args | head}}


def _run_trainer(made: Assembly, config: Config, run_dir: Path, callbacks: list[Any], checkpoint: Path | None) -> None:
    import lightning
    from lightning.pytorch.callbacks import ProgressBar

    from pipeline.checkpoints import WholeFiles
    from pipeline.data.manifest import DataError
    from pipeline.reproducer import Reproducer

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


def _strategy(processes: int, mode: str) -> str:
    """Where layers are frozen, now or later, some parameters have no gradient that the processes could exchange."""
    if processes == 1:
        return "auto"
    return "ddp" if mode == "fine-tune" else "ddp_find_unused_parameters_true"


def _make_bundle(
    made: Assembly, config: Config, run_dir: Path, tracker: Any, checkpoint: Path | None, cost: Any
) -> dict[str, float]:
    """Train, evaluate and write all that a run leaves, its bundle last; the metrics on the hold-out. A bundle that is there is taken.
    cost: the callback that counts it."""
    from models.bundle import BundleInfo, load_bundle, save_bundle
    from pipeline.assessment import assess, write_answers
    from pipeline.data.splits import write_splits
    from pipeline.doctor.run import make_doctor, write_findings
    from pipeline.drift.measure import reference_of
    from pipeline.golden import make_goldens
    from pipeline.plots import confusion_plot, curves_plot
    from pipeline.preview import Shown, preview_grid

    if (run_dir / "bundle").exists():
        if checkpoint is not None:
            cost.go_on_from(checkpoint)
        return dict(load_bundle(run_dir / "bundle").info.metrics)
    manifest, module, data = made.manifest, made.module, made.data
    doctor = make_doctor(made, config)
    history = fit(made, config, run_dir, tracker, checkpoint, [doctor, cost])
    test = manifest.of("test")
    log.info("measuring on the hold-out of %s samples", f"{len(test):,}")
    classifier, preprocess = module.classifier, data.preprocess
    found = assess(classifier, preprocess, manifest, config, name=run_dir.name, doctor=doctor, history=history)
    metrics = found.evaluation.metrics | found.more
    thresholds = tuple([0.5] * len(manifest.labels)) if manifest.task == "multilabel" else ()
    kinds: dict[str, Any] = {"task": manifest.task, "temperature": found.temperature, "thresholds": thresholds}
    reference = reference_of(classifier, preprocess, manifest, **kinds).to_bytes()
    classifier.to("cpu")
    info = BundleInfo(
        name=config.tracking.model_name or run_dir.name,
        task=manifest.task,
        labels=manifest.labels,
        **_network_record(config),
        text=made.text,
        preprocess=preprocess.to_dict(),
        temperature=found.temperature,
        thresholds=thresholds,
        abstain_below=found.abstain_below,
        metrics=metrics,
        data={
            **made.identity,
            "source": manifest.source,
            "counts": {s: manifest.counts(s) for s in manifest.splits()},
        },
        config=config.to_dict(),
        versions=versions(),
        created=_now(),
    )
    write_splits(manifest, run_dir / "splits.csv")
    curves_plot(history, run_dir / "curves.png")
    if found.evaluation.confusion is not None:
        confusion_plot(found.evaluation.confusion, manifest.labels, run_dir / "confusion.png")
    found.report.write(run_dir)
    write_answers(run_dir, found.evaluation, history)
    write_findings(run_dir, found.findings, doctor.record)
    for finding in found.findings:
        log.warning("doctor: %s", finding)
    shown = data.train_set.samples[:: max(1, len(data.train_set) // 6)][:6]
    indices = range(0, len(data.train_set), max(1, len(data.train_set) // 6))
    pictures = [
        Shown(manifest.labels[s.labels[0]] if s.labels else "-", s.read(), i, s.text)
        for s, i in zip(shown, indices, strict=False)
    ]
    preview_grid(pictures, data.train_set.augmenter).save(run_dir / "preview.png")
    if tracker is not None:
        tracker.tag({f"doctor.{finding.name}": finding.evidence for finding in found.findings})
        tracker.tag({"mlflow.note.content": _note(made, config, found)})
        tracker.log_metrics({f"test_{name}": value for name, value in metrics.items()}, step=len(history))
    goldens = make_goldens(classifier, preprocess, test, task=manifest.task, temperature=found.temperature)
    save_bundle(run_dir / "bundle", info, classifier, goldens, reference=reference)
    return metrics


def _note(made: Assembly, config: Config, found: Any) -> str:
    """What MLflow shows as the run's description, Markdown."""
    name, value = next(iter(found.evaluation.metrics.items()))
    bounds = found.evaluation.intervals.get(name)
    between = "" if bounds is None else f" (95 % interval {bounds[0]:.4f} – {bounds[1]:.4f})"
    lines = [
        f"**{name} {value:.4f}**{between} on {len(found.evaluation.samples):,} pictures of the hold-out.",
        f"`{config.model.name}`; {_described(made.manifest)}.",
        *(f"- doctor: {finding}" for finding in found.findings),
        "The report is `report.html` among the artifacts; the tag `rerun` has the command that trains it again.",
    ]
    return "\n\n".join(lines)


def _described(manifest: Any) -> str:
    counts = ", ".join(f"{len(manifest.of(split)):,} {split}" for split in manifest.splits())
    return f"{manifest.task}, {len(manifest.labels)} labels, {counts}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
