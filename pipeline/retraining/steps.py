"""The steps of a retraining run. The run's state is its record: a finished step has added its result, and is then skipped.

A step that was killed is repeated, and finds what it did before.
"""

import logging
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from refract.errors import ServiceError
from refract.models.credentials import masked
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.retraining.run import run_config
from refract.pipeline.retraining.trainings import train_one, training_run
from refract.pipeline.retraining.workspace import Check, Record, read_run, workspace_of, write, write_run
from refract.pipeline.tracking.model_registry import add_gate, client_of, download
from refract.plugins import load
from refract.progress import staged

log = logging.getLogger(__name__)

NOTIFY_SECONDS = 60
"""The time limit of the command `retrain.notify`, so that it cannot block a run."""


class Outcome(IntEnum):
    """The outcome of a retraining run, which is the exit code of `refract retrain`."""

    PROMOTED = 0
    NOT_PROMOTED = 10
    REFUSED = 20
    FAILED = 30


class RetrainingError(ServiceError):
    """A step cannot finish. The message says why, and what to do before `refract retrain --resume`."""


def run_steps(folder: Path) -> None:
    """Run the steps of a run that are not finished. Raises what a step raises.

    The attempt is counted first, so that one that crashes this process counts, too.
    """
    record = read_run(folder)
    write_run(folder, {**record, "attempts": record.get("attempts", 0) + 1})
    for number, step in enumerate(STEPS, 1):
        if not step.is_finished(read_run(folder)):
            title = f"step {number} of {len(STEPS)}: {step.name}"
            log.info("%s", title)
            with staged(title):
                step(folder)


class Step(NamedTuple):
    """A step of a retraining run.

    work: takes the run's folder, its config and its record, and returns what the record gains; result: the key that a finished step has
    added; always: the step also runs in a run that ended early.
    """

    name: str
    work: Callable[[Path, Config, Record], Record]
    result: str
    always: bool = False

    def is_finished(self, record: Record) -> bool:
        """Whether the step has nothing to do: its result is there, or the run has ended."""
        return self.result in record or ("ends" in record and not self.always)

    def __call__(self, folder: Path) -> None:
        """Do the step's work in the run's folder, unless it is finished, and add the result to the record.

        Raises what the work raises, and RetrainingError for an error of MLflow.
        """
        record = read_run(folder)
        if self.is_finished(record):
            return
        from mlflow.exceptions import MlflowException

        from refract.pipeline.tracking.address import tracking_uri
        from refract.pipeline.tracking.store import first_line

        config = run_config(folder)
        load(config.plugins)
        try:
            result = self.work(folder, config, record)
        except MlflowException as error:
            address = masked(tracking_uri(config.tracking))
            raise RetrainingError(f"step {self.name}: MLflow at {address} failed: {first_line(error)}") from error
        write_run(folder, {**record, **result})


def snapshot(folder: Path, config: Config, record: Record) -> Record:
    """Take a snapshot of the data. The run ends here if they cannot be used, or if nothing has changed."""
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.labels.address import pinned, split_address
    from refract.pipeline.retraining.champion_data import data_of_first_champion
    from refract.pipeline.retraining.label_corrections import decision_of_champion
    from refract.pipeline.retraining.snapshot import inputs_digest, take
    from refract.pipeline.retraining.start_from import checked, plan
    from refract.pipeline.training.provenance import code_state, versions

    workspace = workspace_of(config)
    config = config.changed({"data.labels": pinned(config.data.labels)})
    try:
        start, splits = plan(config)
        since = None if config.data.labels is None else decision_of_champion(config.tracking)
        taken = take(config, workspace, data_of_first_champion(config, workspace), splits, since)
    except DataError as error:
        return _ends(Outcome.REFUSED, str(error))
    code, diff = code_state()
    inputs = inputs_digest(config, taken, code | versions(), diff)
    result: Record = {"snapshot": taken.record(), "snapshot_folder": str(taken.folder), "inputs": inputs}
    if start:
        result["start"] = checked(start, splits, taken)
    if (decision := split_address(config.data.labels)[1]) is not None:
        result["label_decision"] = decision
    if taken.corrections is not None:
        result["corrections"] = dict(taken.corrections)
        log.info("labels: %s", taken.corrections["summary"])
    last = workspace.last()
    if last is not None and last["inputs"] == inputs and not record["force"]:
        why = f"data, config and code are those of run {last['run']}; train anyway with --force"
        return {**result, "unchanged": True, **_ends(Outcome.PROMOTED, why)}
    return result


def validate(folder: Path, config: Config, record: Record) -> Record:
    """Refuse data that changed too much since the last accepted run, that drifted too far, or whose labels cannot be trusted.

    Data that pass are accepted: later runs use the snapshot's holdout.
    """
    from refract.pipeline.retraining.data_checks import changed_labels, compared_with_champion, problems
    from refract.pipeline.retraining.snapshot import accept, read_snapshot

    workspace = workspace_of(config)
    last = workspace.last()
    before = read_snapshot(Path(last["snapshot_folder"]), last["snapshot"]) if last else None
    now = read_snapshot(Path(record["snapshot_folder"]), record["snapshot"])
    result: Record = {"labels": {}}
    failures = problems(now, before, config.retrain.largest_loss, config.reads)
    remedies = ["raise retrain.largest_loss"] if failures else []
    if before is not None:
        changes = result["labels"]["changed"] = changed_labels(config.retrain, config.reads, now, before, folder)
        _log("labels", changes)
        if changes["level"] == "stop":
            failures.append(f"{changes['summary']}; {changes['file']} lists all of them")
            remedies.append("accept the new labels with --retrain.relabelled_stop null")
    if failures:
        why = "\n".join(f"  {line}" for line in failures)
        return result | _ends(
            Outcome.REFUSED,
            f"the data changed too much since the last accepted run:\n{why}\nFix them, or {', and '.join(remedies)}.",
        )
    drift, labels = compared_with_champion(config, now, workspace, folder)
    if drift is not None:
        result["drift"] = drift
        log.info("drift: %s", drift["summary"])
        if drift["level"] == "stop" and config.retrain.drift == "stop":
            why = f"the new data drifted: {drift['summary']}. See {folder / 'drift'}; accept them with --retrain.drift warn"
            return result | _ends(Outcome.REFUSED, why)
    if labels is not None:
        result["labels"]["disagreement"] = labels
        _log("labels", labels)
        if labels["level"] == "stop":
            remedy = "Fix the labels, or accept them with --retrain.disagreement_stop null"
            return result | _ends(Outcome.REFUSED, f"the new labels cannot be trusted: {labels['summary']}. {remedy}.")
    accept(workspace, now)
    return result


def train(folder: Path, config: Config, record: Record) -> Record:
    """Train on the snapshot, evaluate on the holdout, and write the bundle; from two starts, choose the better on the validation set.

    With `retrain.effect_of_labels`, also train without the corrections of labels.
    """
    from refract.pipeline.retraining.label_effect import train_without
    from refract.pipeline.retraining.snapshot import changed, read_snapshot
    from refract.pipeline.retraining.start_from import candidates, choose

    taken = read_snapshot(Path(record["snapshot_folder"]), record["snapshot"])
    if others := changed(taken):
        why = f"{len(others)} images changed since the run started, such as {others[0]}; the next run uses them"
        return _ends(Outcome.REFUSED, why)
    start = record.get("start", {})
    # The alias is challenger also for a first version: the gate decides.
    data = {
        "data.source": str(taken.manifest), "data.task": taken.task, "data.labels": None, "tracking.alias": "challenger"
    }  # fmt: skip
    configs = candidates(config.changed(data), start)
    tags = {f"data.{key}": value for key, value in taken.labels.items()}
    runs: dict[str, Path] = {}
    for name, candidate in configs.items():
        suffix = name if len(configs) > 1 else ""
        run = training_run(folder, config.trainer.runs_dir, config.tracking.model_name, suffix)
        try:
            train_one(run, candidate, tags)
            runs[name] = run
        except ConfigError as error:
            if name == "scratch" or run.exists():
                raise
            if not runs:
                raise ConfigError(
                    f"retrain.start_from: champion: version {start['champion']}: {error}; set retrain.start_from: scratch"
                ) from error
            log.warning("start: from scratch: the champion's weights do not fit: %s", error)
            start = {**start, "why": str(error)}
    result: Record = {}
    if start:
        start = result["start"] = choose(start, runs, taken)
    won = start.get("won", "scratch")
    result["training_run"] = str(runs[won])
    effect = train_without(folder, configs[won], record, taken)
    if effect is not None:
        result["label_effect"] = effect
    return result


def register(folder: Path, config: Config, record: Record) -> Record:
    """Register the bundle as `challenger`, deliver the run to MLflow and tag its version.

    RetrainingError while the server does not accept it.
    """
    from refract.pipeline.retraining.label_corrections import TAG
    from refract.pipeline.retraining.start_from import described
    from refract.pipeline.tracking.address import absolute, tracking_uri
    from refract.pipeline.tracking.journal import Journal
    from refract.pipeline.tracking.model_card import read_facts
    from refract.pipeline.tracking.store import LONGEST_TAG, Store, first_line
    from refract.pipeline.tracking.tracker import deliver_one, registration

    run = Path(record["training_run"])
    journal = Journal(run)
    store = Store(absolute(journal.delivered.get("uri") or tracking_uri(config.tracking)), run)
    journal.for_server(store.uri)
    if not any(journal.of("register")):
        facts = read_facts(run, record["snapshot"].get("labels", {}))
        journal.append(registration(str(config.tracking.model_name), "challenger", facts))
    try:
        for entry in journal.waiting():
            deliver_one(journal, store, entry)
        version = journal.delivered["version"]
        tags = {
            "snapshot": record["snapshot"]["digest"],
            "holdout": record["snapshot"]["holdout"],
            "retraining_run": folder.name,
        }
        tags |= {f"data.{key}": value for key, value in record["snapshot"].get("labels", {}).items()}
        if "label_decision" in record:
            tags[TAG] = str(record["label_decision"])
        if "corrections" in record:
            tags["labels.corrections"] = record["corrections"]["summary"][:LONGEST_TAG]
        if "start" in record:
            tags["start"] = described(record["start"])
        tags |= {f"labels.{kind}": check["summary"][:LONGEST_TAG] for kind, check in record.get("labels", {}).items()}
        for key, value in tags.items():
            client_of(store.uri).set_model_version_tag(config.tracking.model_name, version, key, value)
    except Exception as error:  # MLflow and the libraries below it raise many types for an unreachable server
        raise RetrainingError(f"MLflow at {store.address} did not accept the run: {first_line(error)}") from error
    return {"version": str(version), "mlflow": store.address, "mlflow_run": journal.delivered["run_id"]}


def compare(folder: Path, config: Config, record: Record) -> Record:
    """Run the promotion gate: compare challenger and champion on the frozen holdout, and store the verdict in MLflow."""
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.data.manifest import load_manifest
    from refract.pipeline.retraining.both_versions import on_both_versions
    from refract.pipeline.retraining.gate import OnVersion, gate
    from refract.pipeline.retraining.label_effect import measured as effect_on
    from refract.pipeline.retraining.overlap import holdout_line
    from refract.pipeline.retraining.verdict_tags import store_verdict
    from refract.pipeline.tracking.aliases import CHAMPION, aliases
    from refract.pipeline.tracking.model_card import Gate, read_facts, write_card
    from refract.pipeline.training.run_copy import complete

    name, client, workspace = str(config.tracking.model_name), client_of(record["mlflow"]), workspace_of(config)
    champion = aliases(client, name).get(CHAMPION)
    table = load_manifest(Path(record["snapshot_folder"]) / "manifest.csv", record["snapshot"]["task"])
    held = table.with_samples(table.of("test"))
    with tempfile.TemporaryDirectory() as downloads:
        old = None if champion is None else load_bundle(download(client, name, champion, Path(downloads)))
        new = load_bundle(Path(record["training_run"]) / "bundle")
        measured = gate(config.gate, new, old, held, record["snapshot"]["holdout"])
        both: tuple[OnVersion, ...] = ()
        if old is not None and champion is not None:
            before = client.get_model_version(name, champion).tags.get("holdout")
            both = on_both_versions(workspace, measured, held, new, old, before)
        effect = effect_on(record["label_effect"], record, held) if "label_effect" in record else None
    overlap = holdout_line(config, workspace, record["snapshot"]["digest"], held.samples, client, champion)
    verdict = replace(measured, lines=(overlap, *measured.lines), versions=both)
    effects: Record = {} if effect is None else {"label_effect": effect}
    write(folder / "gate.json", {**verdict.to_dict(), **effects})
    print(f"gate: version {record['version']} against {champion or 'no champion'}, {verdict.images:,} samples")
    text = verdict.text()
    if effect is not None:
        text += f"\neffect of the corrections: {effect['summary']}"
    print(text)
    summary = "" if effect is None else effect["summary"]
    store_verdict(client, name, record["version"], verdict, champion, summary)
    client.log_text(record["mlflow_run"], text + "\n", "gate.txt")
    facts = read_facts(
        Path(record["training_run"]), record["snapshot"].get("labels", {}), Gate(verdict.to_dict(), champion)
    )
    client.log_artifact(record["mlflow_run"], str(write_card(Path(record["training_run"]), facts)))
    add_gate(client, name, record["version"], facts)
    complete(Path(record["training_run"]), config.trainer.copy_to)  # with the model card and the journal
    return {"champion": champion, "gate": verdict.to_dict(), **effects}


def promote(folder: Path, config: Config, record: Record) -> Record:
    """Move the alias `champion` to a version that passed the gate. RetrainingError while another process moves it.

    The result has `undecided` if another champion was found: the next run must train and compare again.
    """
    from refract.pipeline.tracking.aliases import Busy, PromotionError, RolledBack
    from refract.pipeline.tracking.aliases import promote as move

    if not record["gate"]["passed"]:
        return _ends(Outcome.NOT_PROMOTED, f"version {record['version']} {_failed(record['gate'])}")
    client = client_of(record["mlflow"])
    try:
        move(client, str(config.tracking.model_name), record["version"], instead_of=record["champion"])
    except Busy as error:
        raise RetrainingError(str(error)) from error
    except RolledBack as error:
        return _ends(Outcome.NOT_PROMOTED, str(error))
    except PromotionError as error:
        return {"undecided": True, **_ends(Outcome.NOT_PROMOTED, f"{error}; the next run trains again")}
    return _ends(Outcome.PROMOTED, f"version {record['version']} is champion")


def announce(folder: Path, config: Config, record: Record) -> Record:
    """Report the outcome to the command `retrain.notify` and to the webhook, and record it for the next runs."""
    from refract.pipeline.retraining.notification import name_of, notify
    from refract.pipeline.retraining.report import write_report
    from refract.pipeline.retraining.stored_snapshots import remove_unused

    outcome = record["ends"]
    workspace = workspace_of(config)
    if outcome in (Outcome.PROMOTED, Outcome.NOT_PROMOTED) and not (record.get("unchanged") or record.get("undecided")):
        keys = ("run", "snapshot", "snapshot_folder", "inputs", "version", "label_decision")
        last_run = {key: record.get(key) for key in keys}
        write(workspace.root / "last.json", last_run | {"outcome": outcome})
        remove_unused(workspace, config.retrain.keep_snapshots, str(config.tracking.model_name), record["mlflow"])
    if config.retrain.notify:
        import json

        message = json.dumps(record, ensure_ascii=False)
        try:
            done = subprocess.run(config.retrain.notify, shell=True, input=message, text=True, timeout=NOTIFY_SECONDS)
            if done.returncode:
                log.warning("retrain.notify: the command exited with %d", done.returncode)
        except subprocess.TimeoutExpired:
            log.warning("retrain.notify: the command was killed after %d s", NOTIFY_SECONDS)
    write_report(folder, str(config.tracking.model_name), record, name_of(outcome, record), record["why"])
    notify(folder, config, record, outcome, record["why"])
    return {"outcome": outcome, "ended": datetime.now(UTC).isoformat(timespec="seconds")}


STEPS = (
    Step("snapshot", snapshot, "snapshot"),
    Step("validate", validate, "labels"),
    Step("train", train, "training_run"),
    Step("register", register, "version"),
    Step("gate", compare, "gate"),
    Step("promote", promote, "ends"),
    Step("announce", announce, "outcome", always=True),
)
"""The steps of each run, in their order. `flow.py` runs the same list on a cluster."""


def _log(about: str, check: Check) -> None:
    reference = f"; see {check['file']}" if "file" in check else ""
    log.log(
        logging.INFO if check["level"] == "none" else logging.WARNING, "%s: %s%s", about, check["summary"], reference
    )


def _ends(outcome: Outcome, why: str) -> Record:
    return {"ends": int(outcome), "why": why}


def _failed(verdict: Mapping[str, Any]) -> str:
    """Name the checks that the version failed, and the holdout size that would decide those that this holdout cannot."""
    from refract.pipeline.retraining.holdout_size import rounded

    failed = [line for line in verdict["lines"] if line["passed"] is False]
    needed = [line["needed"] for line in failed if line.get("needed")]
    size = (
        f"; {verdict['samples']:,} samples cannot decide that, about {rounded(max(needed)):,} would" if needed else ""
    )
    return f"failed at {', '.join(line['name'] for line in failed)}{size}"
