"""Run a whole training from a config: train, evaluate on the test set, write the bundle, register it."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.files import write_atomically, written_atomically
from refract.pipeline.tracking.address import check_address, tracking_uri
from refract.pipeline.training.fit import CHECKPOINTS, Assembly, assemble, fit
from refract.pipeline.training.further_ranks import start_of_ranks, train_further_rank
from refract.pipeline.training.provenance import code_state, flat_tags, inputs, machine, origin, peak_memory, versions
from refract.pipeline.training.ranks import from_rank_0
from refract.plugins import provider
from refract.progress import staged

if TYPE_CHECKING:
    from refract.pipeline.data.manifest import Manifest
    from refract.pipeline.doctor.watch import Doctor
    from refract.pipeline.evaluation.assess import Assessment
    from refract.pipeline.features.training import EmbeddedFit
    from refract.pipeline.tracking import Tracker
    from refract.pipeline.training.cost import Cost
    from refract.pipeline.training.run_directory import Run

log = logging.getLogger(__name__)

History = list[dict[str, float]]
"""The metrics of each epoch."""


@dataclass(frozen=True)
class Result:
    """The result of a training.

    run_dir: folder of the run; bundle: path of its bundle; metrics: on the test set; version: the version of the registered model, None
    without registration; alias: the alias of that version; champion: version of the model's champion at the registration; waiting: number
    of entries that MLflow has not received; refused: MLflow's reason for refusing the registration; not_copied: why the copy at
    trainer.copy_to is not complete, None if it is.
    """

    run_dir: Path
    bundle: Path
    metrics: dict[str, float]
    version: str | None
    alias: str | None = None
    champion: str | None = None
    waiting: int = 0
    refused: str | None = None
    not_copied: str | None = None


def train(
    config: Config,
    *,
    name: str = "run",
    resume: Path | None = None,
    prepared: "tuple[Manifest, dict[str, str]] | None" = None,
    tags: Mapping[str, str] = MappingProxyType({}),
    registers: bool = True,
) -> Result | None:
    """Train from a config. Returns None in all ranks but rank 0.

    name: the name of the run if the config names none; resume: the folder of the run to resume, which has this config; prepared: see
    `assemble`; tags: further tags of the run in MLflow; registers: False leaves the registration of tracking.model_name to the caller.

    Raises ConfigError, PolicyError, DataError, TrackingError, CheckpointError, LoaderError or BundleError for causes that the user can
    fix, and Stopped after SIGTERM or Ctrl-C, when the run can resume.
    """
    from refract.cores import limit_threads
    from refract.models.allocator import keep_freed_memory
    from refract.pipeline.doctor.run import make_doctor
    from refract.pipeline.tracking.model_card import label_state, read_facts, write_card
    from refract.pipeline.training.callbacks.checkpoints import newest, remove_resume_checkpoints
    from refract.pipeline.training.cost import Cost
    from refract.pipeline.training.input_path import choose_input_path
    from refract.pipeline.training.run_copy import copied
    from refract.pipeline.training.run_directory import check_name_is_free, ranks_before, run_lock, source_digest

    limit_threads(config.trainer.devices)
    keep_freed_memory()
    if config.tracking.enabled:
        check_address(tracking_uri(config.tracking))
    digest, before = (None, None) if resume is None else (source_digest(resume), ranks_before(resume))
    assembly = assemble(config, prepared, source_digest=digest, ranks_before=before)
    if not assembly.ranks.first:
        train_further_rank(assembly)
        return None
    if resume is None:
        check_name_is_free(config.trainer)  # before the time that the choice takes
        assembly = choose_input_path(assembly)
    checkpoint = None if resume is None else newest(resume / CHECKPOINTS)
    run, assembly = _open_run(assembly, name, resume, inputs(config))
    with run_lock(run.path), copied(run, config.trainer.copy_to) as copy:
        _announce(assembly, run, checkpoint)
        from_rank_0("start", lambda: start_of_ranks(assembly, run.path, checkpoint))
        cost = Cost(assembly.device)
        tracker = _open_tracker(assembly, run, tags)
        with closing(cost), status_reported(run, tracker), _resume_named(run):
            if (run.path / "bundle").exists():
                metrics = _finished_metrics(run, checkpoint, cost)
            else:
                doctor = make_doctor(assembly)
                with staged("training"):
                    history, embedded = _fit(assembly, run, tracker, checkpoint, [doctor, cost])
                with staged("evaluating on the test set"):
                    assessment = evaluate(assembly, run.path, doctor, history, embedded)
                metrics = assessment.evaluation.metrics | assessment.more
                log.info("writing the report and the bundle")
                with staged("writing the report and the bundle"):
                    _write_report(assembly, run.path, assessment, doctor, history)
                    if tracker is not None:
                        _track_metrics(assembly, tracker, assessment, epochs=len(history))
                    package(assembly, run.path, assessment, embedded)
            facts = read_facts(run.path, label_state(tags))
            write_card(run.path, facts)
            if tracker is not None:
                log.info("sending the report and the bundle to MLflow")
                with staged("sending the report and the bundle to MLflow"):
                    _upload(assembly, run, tracker, cost)
                    if registers and config.tracking.model_name:
                        tracker.register(config.tracking.model_name, config.tracking.alias, facts)
        run.finish()
        remove_resume_checkpoints(run.path / CHECKPOINTS)
    return _result(run, tracker, metrics, copy.error)


def new_record(
    config: Config,
    name: str,
    fingerprint: str,
    input_digests: dict[str, str],
    code: dict[str, str],
    hardware: dict[str, str],
    ranks: int = 1,
) -> dict[str, Any]:
    """Return the record of a run that starts now.

    fingerprint: the identity of its data; ranks: number of ranks; for the others see `train` and `provenance`.
    """
    return {
        "name": name,
        "runs_dir": config.trainer.runs_dir,
        "fingerprint": fingerprint,
        "inputs": input_digests,
        "versions": versions(),
        "code": code,
        "machine": hardware,
        "ranks": ranks,
        "created": _now(),
    }


def _open_run(
    assembly: Assembly, name: str, resume: Path | None, input_digests: dict[str, str]
) -> "tuple[Run, Assembly]":
    """Create the run's folder, or open it to resume. The second value has the policy in place of its file, which may change later."""
    from refract.pipeline.training.run_directory import new_run, resume_run

    code, diff = code_state()
    fingerprint, hardware = assembly.identity["fingerprint"], machine(assembly.device, assembly.precision)
    record = new_record(assembly.config, name, fingerprint, input_digests, code, hardware, assembly.ranks.count)
    if assembly.start:
        record["start"] = assembly.start
    if assembly.timed_input:
        record["timed_input"] = True
    policy = assembly.config.augment.policy
    if isinstance(policy, str) and Path(policy).is_file():
        written_out = {"augment.policy": assembly.data.train_set.augmenter.policy.to_spec()}
        assembly = replace(assembly, config=assembly.config.changed(written_out))
    run = new_run(assembly.config, name, record) if resume is None else resume_run(resume, record)
    if diff and resume is None:
        write_atomically(run.path / "code.diff", diff.encode())
    for package, version in run.record["versions"].items():
        if version != record["versions"].get(package):
            log.warning("%s was %s when the run started: the weights may differ in the last bits", package, version)
    return run, assembly


def _announce(assembly: Assembly, run: "Run", checkpoint: Path | None) -> None:
    """Log the start. Remove the unfinished files of a resumed run."""
    from refract.pipeline.training.callbacks.checkpoints import remove_fragments

    log.info("run %s on %s, %s: %s", run.path, assembly.device, assembly.precision, _described(assembly.manifest))
    if run.resumed:
        remove_fragments(run.path / CHECKPOINTS)
        for fragment in (*run.path.glob(".bundle.*"), *run.path.glob(".errors.*")):
            shutil.rmtree(fragment, ignore_errors=True)
        log.info("resuming from %s", checkpoint or "the start, as the run has no checkpoint")


def _open_tracker(assembly: Assembly, run: "Run", more_tags: Mapping[str, str]) -> "Tracker | None":
    """Open the run in MLflow, if tracking is enabled."""
    config = assembly.config
    if not config.tracking.enabled:
        return None
    data = {key: value for key, value in assembly.identity.items() if key != "content"}
    data["source"] = assembly.manifest.source
    counts = {split: len(assembly.manifest.of(split)) for split in assembly.manifest.splits()}
    sections = {"code": run.record["code"], "machine": run.record["machine"], "start": run.record.get("start", {})}
    tags = flat_tags(data=data | counts, **sections)
    tags |= origin(f"refract train {run.record['name']}") | dict(more_tags)
    if "commit" in run.record["code"]:
        tags["mlflow.source.git.commit"] = run.record["code"]["commit"]  # shown on MLflow's pages
    return open_tracker(config, run, tags)


def open_tracker(config: Config, run: "Run", tags: Mapping[str, str]) -> "Tracker":
    """Open the run in MLflow. An error removes a new run's folder, so that its name becomes free again."""
    from refract.pipeline.tracking import Tracker, TrackingError

    try:
        return Tracker(config.tracking, run.path, config.to_dict(), dict(tags))
    except (TrackingError, ConfigError):
        if not run.resumed:
            shutil.rmtree(run.path)
        raise


@contextmanager
def status_reported(run: "Run", tracker: "Tracker | None") -> Iterator[None]:
    """Report to MLflow at the end whether the block finished, was stopped or failed. The exception of a stop gets the run's path."""
    from refract.pipeline.stopping import Stopped

    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped) as error:
        status = "KILLED"
        if isinstance(error, Stopped):
            error.run = run.path
        raise
    finally:
        if tracker is not None and (waiting := tracker.finish(status)):
            log.warning(
                "MLflow at %s has not received %d entries of the run; `refract sync %s` delivers them",
                tracker.address,
                waiting,
                run.path,
            )


@contextmanager
def _resume_named(run: "Run") -> Iterator[None]:
    """Add the command that resumes the run to the error of a loader worker."""
    from refract.pipeline.data.loader import LoaderError

    try:
        yield
    except LoaderError as error:
        raise LoaderError(f"{error}; then `refract train --resume {run.path}` resumes the run") from error


def _finished_metrics(run: "Run", checkpoint: Path | None, cost: "Cost") -> dict[str, float]:
    """Return the metrics of the bundle that a resumed run has written already."""
    from refract.models.bundle.bundle import load_bundle

    if checkpoint is not None:
        cost.resume_from(checkpoint)
    return dict(load_bundle(run.path / "bundle").info.metrics)


def _fit(
    assembly: Assembly, run: "Run", tracker: "Tracker | None", checkpoint: Path | None, watchers: Sequence[Any]
) -> "tuple[History, EmbeddedFit | None]":
    """Return what `fit` returns and, for a head that is fitted on embeddings, the fit."""
    if not assembly.config.model.on_embeddings:
        return fit(assembly, run.path, tracker, checkpoint, watchers), None
    from refract.pipeline.features.training import fit_on_embeddings

    embedded = fit_on_embeddings(assembly, run.path, tracker)
    return embedded.history, embedded


def evaluate(
    assembly: Assembly,
    run_dir: Path,
    doctor: "Doctor | None",
    history: History,
    embedded: "EmbeddedFit | None" = None,
) -> "Assessment":
    """Calibrate the classifier and measure it on the test set. doctor, history, embedded: see `assess`."""
    from refract.pipeline.evaluation.assess import assess

    log.info("evaluating on the test set of %s samples", f"{len(assembly.manifest.of('test')):,}")
    parts = assembly.module.classifier, assembly.data.preprocess, assembly.manifest, assembly.config
    return assess(*parts, name=run_dir.name, doctor=doctor, history=history, embedded=embedded)


def _write_report(
    assembly: Assembly, run_dir: Path, assessment: "Assessment", doctor: "Doctor", history: History
) -> None:
    """Write the splits, the report, its charts and predictions, the doctor's findings, the gallery of errors and the preview."""
    from refract.pipeline.data.splits import write_splits
    from refract.pipeline.doctor.stored import write_findings
    from refract.pipeline.evaluation.assess import write_predictions
    from refract.pipeline.evaluation.error_images import write_error_images
    from refract.pipeline.evaluation.plots import curves_plot
    from refract.pipeline.evaluation.report.build import CONFUSION
    from refract.pipeline.preview import preview_grid, shown_samples

    manifest = assembly.manifest
    write_splits(manifest, run_dir / "splits.csv")
    curves_plot(history, run_dir / "curves.png")
    if CONFUSION in assessment.report.charts:
        write_atomically(run_dir / "confusion.png", assessment.report.png(CONFUSION))
    assessment.report.write(run_dir)
    write_predictions(run_dir, assessment.evaluation, history)
    write_findings(run_dir, assessment.findings, doctor.record)
    doctor.report(assessment.findings)
    if assembly.config.evaluation.images:
        write_error_images(assessment.report, assessment.evaluation.samples, run_dir)
        grid = preview_grid(shown_samples(manifest, 6), assembly.data.train_set.augmenter)
        with written_atomically(run_dir / "preview.png") as file:
            grid.save(file, "PNG")


def _track_metrics(assembly: Assembly, tracker: "Tracker", assessment: "Assessment", *, epochs: int) -> None:
    """Log the metrics on the test set, the doctor's findings and the run's description to MLflow."""
    metrics = assessment.evaluation.metrics | assessment.more
    tracker.tag({f"doctor.{finding.name}": finding.evidence for finding in assessment.findings})
    tracker.tag({"mlflow.note.content": _note(assembly, assessment)})
    tracker.log_metrics({f"test_{name}": value for name, value in metrics.items()}, step=epochs)


def package(assembly: Assembly, run_dir: Path, assessment: "Assessment", embedded: "EmbeddedFit | None" = None) -> None:
    """Write the bundle with the golden samples, the profile for drift and the training features.

    embedded: the fit of a head on embeddings, whose store has most embeddings for the profile and the training features; None for other
    modes.
    """
    from refract.models.bundle.bundle import BundleInfo, save_bundle
    from refract.pipeline.drift.measure import reference_of
    from refract.pipeline.evaluation.golden_samples import make_golden_samples
    from refract.pipeline.training.training_features import training_features_of

    manifest, config, decision = assembly.manifest, assembly.config, assessment.decision
    classifier, preprocess = assembly.module.classifier, assembly.data.preprocess
    decision_options: dict[str, Any] = {
        "task": manifest.task, "temperature": decision.temperature, "thresholds": decision.thresholds
    }  # fmt: skip
    stored = None if embedded is None else embedded.stored
    reference = reference_of(classifier, preprocess, manifest, stored=stored, **decision_options).to_bytes()
    training = training_features_of(
        classifier, preprocess, manifest, task=manifest.task, thumbnails=config.evaluation.images, stored=stored
    )
    classifier.to("cpu")
    info = BundleInfo(
        name=config.tracking.model_name or run_dir.name,
        task=manifest.task,
        labels=manifest.labels,
        network=assembly.network_record,
        plugins=_network_plugins(config.model.name),
        text=assembly.text,
        preprocess=preprocess.to_dict(),
        temperature=decision.temperature,
        thresholds=decision.thresholds,
        abstain_below=decision.abstain_below,
        hierarchy=_hierarchy(manifest, decision.back_off),
        metrics=assessment.evaluation.metrics | assessment.more,
        data={
            **assembly.identity,
            "source": manifest.source,
            "counts": {s: manifest.counts(s) for s in manifest.splits()},
        },
        config=config.to_dict(),
        versions=versions(),
        created=_now(),
    )
    golden_samples = make_golden_samples(
        classifier, preprocess, manifest.of("test"), task=manifest.task, temperature=decision.temperature
    )
    save_bundle(run_dir / "bundle", info, classifier, golden_samples, reference=reference, training=training)


def _hierarchy(manifest: "Manifest", threshold: float | None) -> dict[str, Any] | None:
    """Return the bundle's record of the class hierarchy. threshold: the threshold of its inner nodes."""
    return None if manifest.hierarchy is None else {"parents": dict(manifest.hierarchy.parents), "threshold": threshold}


def _network_plugins(name: str) -> tuple[dict[str, str], ...]:
    """Return the bundle's record of the plugin that the network needs, empty for a network of Refract or a catalogue."""
    plugin = provider("network", name)
    return () if plugin is None else ({"name": plugin.name, "sha256": plugin.sha256},)


def _upload(assembly: Assembly, run: "Run", tracker: "Tracker", cost: "Cost") -> None:
    """Upload the run's files to MLflow, with the bundle and the costs."""
    from refract.pipeline.evaluation.error_images import FOLDER

    costs = {f"cost_{name}": value for name, value in cost.totals().items()}
    tracker.log_metrics({**costs, "cost_peak_memory_mib": peak_memory()}, step=0)
    tracker.tag({"rerun": f"refract rerun {tracker.journal.delivered.get('run_id', run.path)}"})
    files = [
        file for file in sorted(run.path.iterdir()) if file.is_file() and not file.name.startswith((".", "journal"))
    ]
    errors = run.path / FOLDER
    tracker.log_files(files, run.path / "bundle", [errors] if errors.is_dir() else [])


def _result(run: "Run", tracker: "Tracker | None", metrics: dict[str, float], not_copied: str | None) -> Result:
    """Return the result, with what MLflow reported about the registration. not_copied: see `Result`."""
    if tracker is None:
        return Result(run.path, run.path / "bundle", metrics, version=None, not_copied=not_copied)
    delivered, waiting = tracker.journal.delivered, sum(1 for _ in tracker.journal.waiting())
    registered = {key: delivered.get(key) for key in ("version", "alias", "champion", "refused")}
    return Result(run.path, run.path / "bundle", metrics, waiting=waiting, not_copied=not_copied, **registered)


def _note(assembly: Assembly, assessment: "Assessment") -> str:
    """Return the Markdown that MLflow shows as the run's description."""
    name, value = next(iter(assessment.evaluation.metrics.items()))
    bounds = assessment.evaluation.intervals.get(name)
    interval = "" if bounds is None else f" (95 % interval {bounds[0]:.4f} – {bounds[1]:.4f})"
    lines = [
        f"**{name} {value:.4f}**{interval} on {len(assessment.evaluation.samples):,} test images.",
        f"`{assembly.config.model.name}`; {_described(assembly.manifest)}.",
        *assessment.report.numbers["notes"],
        *(f"- doctor: {finding}" for finding in assessment.findings),
        "The report is the artifact `report.html`; the tag `rerun` has the command that repeats the training.",
    ]
    return "\n\n".join(lines)


def _described(manifest: "Manifest") -> str:
    counts = ", ".join(f"{len(manifest.of(split)):,} {split}" for split in manifest.splits())
    return f"{manifest.task}, {len(manifest.labels)} labels, {counts}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
