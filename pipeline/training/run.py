"""Run a whole training from a config: train, evaluate on the test set, write the bundle, register it."""

import logging
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.files import write_atomically
from refract.pipeline.tracking.address import check_address, tracking_uri
from refract.pipeline.training.fit import CHECKPOINTS, Assembly, assemble, fit, network_record
from refract.pipeline.training.provenance import code_state, flat_tags, inputs, machine, origin, peak_memory, versions
from refract.plugins import provider

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The result of a training.

    run_dir: folder of the run; bundle: path of its bundle; metrics: on the test set; version: of the registered model, None without
    registration; alias: of that version; champion: version of the model's champion at the registration; waiting: number of entries that
    MLflow has not received; refused: MLflow's reason for refusing the registration.
    """

    run_dir: Path
    bundle: Path
    metrics: dict[str, float]
    version: str | None
    alias: str | None = None
    champion: str | None = None
    waiting: int = 0
    refused: str | None = None


def train(config: Config, *, name: str = "run", resume: Path | None = None) -> Result | None:
    """Train from a config. Returns None in all ranks but rank 0.

    name: of the run if the config names none; resume: the folder of the run to resume, which has this config.

    Raises ConfigError, PolicyError, DataError, TrackingError, CheckpointError, LoaderError or BundleError for causes that the user can
    fix, and Stopped after SIGTERM or Ctrl-C, when the run can resume.
    """
    from refract.models.allocator import keep_freed_memory
    from refract.pipeline.data.loader import LoaderError
    from refract.pipeline.training.callbacks.checkpoints import newest, remove_fragments, remove_resume_checkpoints
    from refract.pipeline.training.run_directory import new_run, resume_run, run_lock

    keep_freed_memory()
    if config.tracking.enabled:
        check_address(tracking_uri(config.tracking))
    assembly = assemble(config)
    checkpoint = None if resume is None else newest(resume / CHECKPOINTS)
    if not assembly.ranks.first:
        fit(assembly, config, resume or Path(config.trainer.runs_dir), None, checkpoint)
        return None
    code, diff = code_state()
    record = {
        "name": name,
        "runs_dir": config.trainer.runs_dir,
        "fingerprint": assembly.identity["fingerprint"],
        "inputs": inputs(config),
        "versions": versions(),
        "code": code,
        "machine": machine(assembly.device, assembly.precision),
        "created": _now(),
    }
    if isinstance(config.augment.policy, str) and Path(config.augment.policy).is_file():
        config.augment.policy = assembly.data.train_set.augmenter.policy.to_spec()  # the file may change later
    run = new_run(config, name, record) if resume is None else resume_run(resume, record)
    if diff and resume is None:
        write_atomically(run.path / "code.diff", diff.encode())
    for package, version in run.record["versions"].items():
        if version != record["versions"].get(package):  # type: ignore[attr-defined]
            log.warning("%s was %s when the run started: the weights may differ in the last bits", package, version)
    with run_lock(run.path):
        log.info("run %s on %s, %s: %s", run.path, assembly.device, assembly.precision, _described(assembly.manifest))
        if resume is not None:
            remove_fragments(resume / CHECKPOINTS)
            for fragment in resume.glob(".bundle.*"):
                shutil.rmtree(fragment, ignore_errors=True)
            log.info("resuming from %s", checkpoint or "the start, as the run has no checkpoint")
        try:
            result = _tracked(assembly, config, run, checkpoint)
        except LoaderError as error:
            raise LoaderError(f"{error}; then `refract train --resume {run.path}` resumes the run") from error
        run.finish()
        remove_resume_checkpoints(run.path / CHECKPOINTS)
    return result


def _tracked(assembly: Assembly, config: Config, run: Any, checkpoint: Path | None) -> Result:
    """Train, write the bundle, register it, and report the status to MLflow if tracking is enabled."""
    from refract.pipeline.tracking import Tracker, TrackingError
    from refract.pipeline.training.callbacks.stopping import Stopped
    from refract.pipeline.training.cost import Cost

    cost = Cost(assembly.device)
    data = {"fingerprint": assembly.identity["fingerprint"], "source": assembly.manifest.source}
    counts = {split: len(assembly.manifest.of(split)) for split in assembly.manifest.splits()}
    tags = flat_tags(data=data | counts, code=run.record["code"], machine=run.record["machine"])
    tags |= origin(f"refract train {run.record['name']}")
    if "commit" in run.record["code"]:
        tags["mlflow.source.git.commit"] = run.record["code"]["commit"]  # shown on MLflow's pages
    try:
        tracker = Tracker(config.tracking, run.path, config.to_dict(), tags) if config.tracking.enabled else None
    except (TrackingError, ConfigError):
        if not run.resumed:  # nothing is trained yet, so the run's name becomes free again
            shutil.rmtree(run.path)
        raise
    status, waiting = "FAILED", 0
    try:
        metrics = _make_bundle(assembly, config, run.path, tracker, checkpoint, cost)
        if tracker is not None:
            costs = {f"cost_{name}": value for name, value in cost.totals().items()}
            tracker.log_metrics({**costs, "cost_peak_memory_mib": peak_memory()}, step=0)
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
                "MLflow at %s has not received %d entries of the run; `refract sync %s` delivers them",
                tracker.address,
                waiting,
                run.path,
            )
    delivered = {} if tracker is None else tracker.journal.delivered
    registered = {key: delivered.get(key) for key in ("version", "alias", "champion", "refused")}
    return Result(run.path, run.path / "bundle", metrics, waiting=waiting, **registered)


def _make_bundle(
    assembly: Assembly, config: Config, run_dir: Path, tracker: Any, checkpoint: Path | None, cost: Any
) -> dict[str, float]:
    """Train, evaluate, write the run's files with the bundle last, and return the metrics on the test set.

    An existing bundle of a resumed run is reused. cost: the `Cost` callback.
    """
    from refract.models.bundle.bundle import BundleInfo, load_bundle, save_bundle
    from refract.pipeline.data.splits import write_splits
    from refract.pipeline.doctor.run import make_doctor
    from refract.pipeline.doctor.stored import write_findings
    from refract.pipeline.drift.measure import reference_of
    from refract.pipeline.evaluation.assess import assess, write_predictions
    from refract.pipeline.evaluation.golden_samples import make_golden_samples
    from refract.pipeline.evaluation.plots import confusion_plot, curves_plot
    from refract.pipeline.preview import Shown, preview_grid

    if (run_dir / "bundle").exists():
        if checkpoint is not None:
            cost.resume_from(checkpoint)
        return dict(load_bundle(run_dir / "bundle").info.metrics)
    manifest, module, data = assembly.manifest, assembly.module, assembly.data
    doctor = make_doctor(assembly, config)
    history = fit(assembly, config, run_dir, tracker, checkpoint, [doctor, cost])
    test = manifest.of("test")
    log.info("evaluating on the test set of %s samples", f"{len(test):,}")
    classifier, preprocess = module.classifier, data.preprocess
    assessment = assess(classifier, preprocess, manifest, config, name=run_dir.name, doctor=doctor, history=history)
    metrics = assessment.evaluation.metrics | assessment.more
    decision = assessment.decision
    decision_options: dict[str, Any] = {
        "task": manifest.task, "temperature": decision.temperature, "thresholds": decision.thresholds
    }  # fmt: skip
    reference = reference_of(classifier, preprocess, manifest, **decision_options).to_bytes()
    classifier.to("cpu")
    info = BundleInfo(
        name=config.tracking.model_name or run_dir.name,
        task=manifest.task,
        labels=manifest.labels,
        **network_record(config),
        plugins=_network_plugins(config),
        text=assembly.text,
        preprocess=preprocess.to_dict(),
        temperature=decision.temperature,
        thresholds=decision.thresholds,
        abstain_below=decision.abstain_below,
        metrics=metrics,
        data={
            **assembly.identity,
            "source": manifest.source,
            "counts": {s: manifest.counts(s) for s in manifest.splits()},
        },
        config=config.to_dict(),
        versions=versions(),
        created=_now(),
    )
    write_splits(manifest, run_dir / "splits.csv")
    curves_plot(history, run_dir / "curves.png")
    if assessment.evaluation.confusion is not None:
        confusion_plot(assessment.evaluation.confusion, manifest.labels, run_dir / "confusion.png")
    assessment.report.write(run_dir)
    write_predictions(run_dir, assessment.evaluation, history)
    write_findings(run_dir, assessment.findings, doctor.record)
    doctor.report(assessment.findings)
    shown = data.train_set.samples[:: max(1, len(data.train_set) // 6)][:6]
    indices = range(0, len(data.train_set), max(1, len(data.train_set) // 6))
    images = [
        Shown(manifest.labels[s.labels[0]] if s.labels else "-", s.read(), i, s.text)
        for s, i in zip(shown, indices, strict=False)
    ]
    preview_grid(images, data.train_set.augmenter).save(run_dir / "preview.png")
    if tracker is not None:
        tracker.tag({f"doctor.{finding.name}": finding.evidence for finding in assessment.findings})
        tracker.tag({"mlflow.note.content": _note(assembly, config, assessment)})
        tracker.log_metrics({f"test_{name}": value for name, value in metrics.items()}, step=len(history))
    golden_samples = make_golden_samples(
        classifier, preprocess, test, task=manifest.task, temperature=decision.temperature
    )
    save_bundle(run_dir / "bundle", info, classifier, golden_samples, reference=reference)
    return metrics


def _network_plugins(config: Config) -> tuple[dict[str, str], ...]:
    """Return the bundle's record of the plugin that the network needs, empty for a network of Refract or a catalogue."""
    plugin = provider("network", config.model.name)
    return () if plugin is None else ({"name": plugin.name, "sha256": plugin.sha256},)


def _note(assembly: Assembly, config: Config, assessment: Any) -> str:
    """Return the Markdown that MLflow shows as the run's description."""
    name, value = next(iter(assessment.evaluation.metrics.items()))
    bounds = assessment.evaluation.intervals.get(name)
    interval = "" if bounds is None else f" (95 % interval {bounds[0]:.4f} – {bounds[1]:.4f})"
    lines = [
        f"**{name} {value:.4f}**{interval} on {len(assessment.evaluation.samples):,} test images.",
        f"`{config.model.name}`; {_described(assembly.manifest)}.",
        *assessment.report.numbers["notes"],
        *(f"- doctor: {finding}" for finding in assessment.findings),
        "The report is the artifact `report.html`; the tag `rerun` has the command that repeats the training.",
    ]
    return "\n\n".join(lines)


def _described(manifest: Any) -> str:
    counts = ", ".join(f"{len(manifest.of(split)):,} {split}" for split in manifest.splits())
    return f"{manifest.task}, {len(manifest.labels)} labels, {counts}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
