"""The steps of a night. Each may be repeated after a kill, and then finds what it did already; what a night knows is in its record."""

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from enum import IntEnum
from functools import wraps
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.retraining.registry import client_of, download
from refract.pipeline.retraining.workspace import Workspace, read, workspace_of, write

log = logging.getLogger(__name__)

Record = dict[str, Any]

TELL_SECONDS = 60
"""What `retrain.notify` may take: a night must not hang on the telling."""

FAILURES = 3
"""How often a night may fail of which nobody is looking: what fails again and again is not mended by trying."""


class Outcome(IntEnum):
    """How a night ended; the exit codes of `refract retrain`."""

    PROMOTED = 0
    NOT_PROMOTED = 10
    REFUSED = 20
    FAILED = 30


class RetrainingError(RuntimeError):
    """A step cannot go on; the message says why, and what to do before `refract retrain --resume`."""


def begin(config: Config, *, force: bool) -> Path:
    """The folder of a new night, with its config and record. force: goes on where nothing has changed."""
    from refract.pipeline.training.run_directory import write_config

    place, now = workspace_of(config), datetime.now(UTC)
    for attempt in range(100):
        folder = place.night(f"{now:%Y%m%d-%H%M%S}-{attempt:02}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    write_config(config, folder)
    write(folder / "night.json", {"night": folder.name, "force": force, "began": now.isoformat(timespec="seconds")})
    return folder


def unfinished(place: Workspace) -> Path | None:
    """The newest night, if it has no outcome."""
    runs = place.runs()
    return runs[-1] if runs and "outcome" not in read(runs[-1] / "night.json") else None


def worth_resuming(night: Path, config: Config) -> bool:
    """Whether a night that is unfinished may come to an end by being gone on with: its config is still this one, and it has not failed
    FAILURES times."""
    return read(night / "night.json").get("failures", 0) < FAILURES and _config(night).to_dict() == config.to_dict()


def note_failure(night: Path) -> None:
    record = read(night / "night.json")
    write(night / "night.json", record | {"failures": record.get("failures", 0) + 1})


Step = Callable[[Path, Config, Record], Record]


def _step(work: Step) -> Callable[[Path], None]:
    """A step knows the night's folder alone; it adds to the record what it returns. A night that has ended does nothing more."""

    @wraps(work)
    def run(folder: Path) -> None:
        record = read(folder / "night.json")
        if "ends" not in record or work.__name__ == "announce":
            write(folder / "night.json", record | work(folder, _config(folder), record))

    return run


def _config(folder: Path) -> Config:
    import yaml

    path = folder / "config.yaml"
    return config_from_dict(yaml.safe_load(path.read_text("utf-8")), where=str(path))


@_step
def snapshot(folder: Path, config: Config, record: Record) -> Record:
    """Write the data down; end the night where they cannot be used, or where nothing has changed."""
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.retraining.champion_data import data_of_first_champion
    from refract.pipeline.retraining.snapshot import inputs_digest, take
    from refract.pipeline.training.provenance import code_state, versions

    place = workspace_of(config)
    try:
        taken = take(config, place, data_of_first_champion(config, place))
    except DataError as error:
        return _ends(Outcome.REFUSED, str(error))
    code, diff = code_state()
    inputs = inputs_digest(config, taken, code | versions(), diff)
    found = {"snapshot": taken.record(), "snapshot_folder": str(taken.folder), "inputs": inputs}
    last = place.last()
    if last is not None and last["inputs"] == inputs and not record["force"]:
        why = f"data, config and code are those of {last['night']}; --force trains all the same"
        return found | {"unchanged": True} | _ends(Outcome.PROMOTED, why)
    return found


@_step
def validate(folder: Path, config: Config, record: Record) -> Record:
    """End the night where the data changed more than they may since the last accepted one, where what is new has drifted too far, or where
    the labels cannot be trusted. Else the snapshot's hold-out is that of the runs to come."""
    from refract.pipeline.retraining.data_checks import changed_labels, compared_with_champion, problems
    from refract.pipeline.retraining.snapshot import accept, read_snapshot

    place = workspace_of(config)
    last = place.last()
    before = read_snapshot(Path(last["snapshot_folder"]), last["snapshot"]) if last else None
    now = read_snapshot(Path(record["snapshot_folder"]), record["snapshot"])
    told: Record = {"labels": {}}
    found = problems(now, before, config.retrain.largest_loss)
    remedies = ["raise retrain.largest_loss"] if found else []
    if before is not None:
        changes = told["labels"]["changed"] = changed_labels(config, now, before, folder)
        _log("labels", changes)
        if changes["level"] == "stop":
            found.append(f"{changes['told']}. {changes['file']} lists them all")
            remedies.append("accept the new labels by --retrain.relabelled_stop null")
    if found:
        why = "\n".join(f"  {line}" for line in found)
        return told | _ends(
            Outcome.REFUSED,
            f"the data changed more than they may since the last accepted night:\n{why}\nMend them, or {', and '.join(remedies)}.",
        )
    drift, labels = compared_with_champion(config, now, place, folder)
    if drift is not None:
        told["drift"] = drift
        log.info("drift: %s", drift["told"])
        if drift["level"] == "stop" and config.retrain.drift == "stop":
            why = f"what is new has drifted: {drift['told']}. See {folder / 'drift'}, and retrain.drift"
            return told | _ends(Outcome.REFUSED, why)
    if labels is not None:
        told["labels"]["disagreement"] = labels
        _log("labels", labels)
        if labels["level"] == "stop":
            remedy = "Mend the labels, or accept them by --retrain.disagreement_stop null"
            return told | _ends(Outcome.REFUSED, f"the new labels cannot be trusted: {labels['told']}. {remedy}.")
    accept(place, now)
    return told


@_step
def train(folder: Path, config: Config, record: Record) -> Record:
    """Train on the snapshot, measure on the hold-out, write the bundle, and hand it to MLflow as `challenger`."""
    from refract.pipeline.retraining.snapshot import changed, read_snapshot
    from refract.pipeline.training.run import train as train_run
    from refract.pipeline.training.run_directory import RECORD, read_record, stored_config

    taken = read_snapshot(Path(record["snapshot_folder"]), record["snapshot"])
    if others := changed(taken):
        why = f"{len(others)} images have changed since the night began, as {others[0]}; the next night takes them as they are"
        return _ends(Outcome.REFUSED, why)
    config.data.source, config.data.task = str(taken.manifest), taken.task  # type: ignore[assignment]
    config.tracking.alias = "challenger"  # a first version as well: the gate decides
    config.trainer.run_name = f"{config.tracking.model_name}-{folder.name}"
    run = Path(config.trainer.runs_dir) / config.trainer.run_name
    if run.exists() and not (run / RECORD).exists():
        shutil.rmtree(run)  # a kill came before its first record
    if not run.exists():
        train_run(config)
    elif not read_record(run).get("finished"):
        train_run(stored_config(run), resume=run)
    return {"run": str(run)}


@_step
def register(folder: Path, config: Config, record: Record) -> Record:
    """The version in MLflow; RetrainingError while its server does not have it."""
    from refract.pipeline.tracking.address import absolute, tracking_uri
    from refract.pipeline.tracking.journal import Journal
    from refract.pipeline.tracking.store import LONGEST_TAG, Store, first_line
    from refract.pipeline.tracking.tracker import deliver_one

    run = Path(record["run"])
    journal = Journal(run)
    store = Store(absolute(journal.delivered.get("uri") or tracking_uri(config.tracking)), run)
    journal.for_server(store.uri)
    try:
        for entry in journal.waiting():
            deliver_one(journal, store, entry)
        version = journal.delivered["version"]
        tags = {
            "snapshot": record["snapshot"]["digest"],
            "holdout": record["snapshot"]["holdout"],
            "night": folder.name,
        }
        tags |= {f"labels.{kind}": found["told"][:LONGEST_TAG] for kind, found in record.get("labels", {}).items()}
        for key, value in tags.items():
            client_of(store.uri).set_model_version_tag(config.tracking.model_name, version, key, value)
    except Exception as error:  # whatever MLflow and what lies below it raise for a server that is not there
        raise RetrainingError(f"MLflow at {store.address} does not have the run: {first_line(error)}") from error
    return {"version": str(version), "mlflow": store.address, "mlflow_run": journal.delivered["run_id"]}


@_step
def compare(folder: Path, config: Config, record: Record) -> Record:
    """The gate: challenger and champion on the frozen hold-out."""
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.data.manifest import load_manifest
    from refract.pipeline.retraining.aliases import CHAMPION, aliases
    from refract.pipeline.retraining.gate import Verdict, gate
    from refract.pipeline.retraining.overlap import holdout_line

    name, client, place = str(config.tracking.model_name), client_of(record["mlflow"]), workspace_of(config)
    champion = aliases(client, name).get(CHAMPION)
    table = load_manifest(Path(record["snapshot_folder"]) / "manifest.csv", record["snapshot"]["task"])
    held = table.with_samples(table.of("test"))
    with tempfile.TemporaryDirectory() as beside:
        old = None if champion is None else load_bundle(download(client, name, champion, Path(beside)))
        found = gate(config.gate, load_bundle(Path(record["run"]) / "bundle"), old, held, record["snapshot"]["holdout"])
    apart = holdout_line(config, place, record["snapshot"]["digest"], held.samples, client, champion)
    verdict = Verdict((apart, *found.lines), found.holdout, found.images)
    write(folder / "gate.json", verdict.to_dict())
    print(f"gate: version {record['version']} against {champion or 'no champion'}, {verdict.images:,} samples")
    print(verdict.text())
    for line in verdict.lines:
        client.set_model_version_tag(
            name,
            record["version"],
            f"gate.{_key(line.name)}",
            f"{'unknown' if line.passed is None else line.passed}: {line.told}"[:4000],
        )
    client.set_model_version_tag(name, record["version"], "gate.against", champion or "none")
    client.set_model_version_tag(name, record["version"], "gate", "passed" if verdict.passed else "failed")
    client.log_text(record["mlflow_run"], verdict.text() + "\n", "gate.txt")
    return {"champion": champion, "gate": verdict.to_dict()}


@_step
def promote(folder: Path, config: Config, record: Record) -> Record:
    """Move the alias, if the gate let it pass. undecided: it did, and the next night has to try again. RetrainingError while others do."""
    from refract.pipeline.retraining.aliases import Busy, PromotionError, RolledBack
    from refract.pipeline.retraining.aliases import promote as move

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
        return {"undecided": True} | _ends(Outcome.NOT_PROMOTED, f"{error}; the next night trains again")
    return _ends(Outcome.PROMOTED, f"version {record['version']} is champion")


@_step
def announce(folder: Path, config: Config, record: Record) -> Record:
    """Say how the night ended: to `retrain.notify`, and to the runs that come."""
    outcome = record["ends"]
    place = workspace_of(config)
    if outcome in (Outcome.PROMOTED, Outcome.NOT_PROMOTED) and not (record.get("unchanged") or record.get("undecided")):
        kept = ("night", "snapshot", "snapshot_folder", "inputs", "version")
        write(place.root / "last.json", {key: record[key] for key in kept} | {"outcome": outcome})
    if config.retrain.notify:
        import json

        told = json.dumps(record, ensure_ascii=False)
        try:
            done = subprocess.run(config.retrain.notify, shell=True, input=told, text=True, timeout=TELL_SECONDS)
            if done.returncode:
                log.warning("retrain.notify: ended with %d", done.returncode)
        except subprocess.TimeoutExpired:
            log.warning("retrain.notify: was ended after %d s", TELL_SECONDS)
    return {"outcome": outcome, "ended": datetime.now(UTC).isoformat(timespec="seconds")}


STEPS = (snapshot, validate, train, register, compare, promote, announce)


def _log(about: str, found: Record) -> None:
    listed = f"; see {found['file']}" if "file" in found else ""
    log.log(logging.INFO if found["level"] == "none" else logging.WARNING, "%s: %s%s", about, found["told"], listed)


def _ends(outcome: Outcome, why: str) -> Record:
    return {"ends": int(outcome), "why": why}


def _failed(verdict: Record) -> str:
    """What the version failed at, and the holdout size that would decide all lines that this one cannot."""
    from refract.pipeline.retraining.holdout_size import rounded

    failed = [line for line in verdict["lines"] if line["passed"] is False]
    needed = [line["needed"] for line in failed if line.get("needed")]
    size = (
        f"; {verdict['samples']:,} samples cannot decide that, about {rounded(max(needed)):,} would" if needed else ""
    )
    return f"failed at {', '.join(line['name'] for line in failed)}{size}"


def _key(name: str) -> str:
    """A tag's name as MLflow takes it: as a path that is in its shortest form, so without slashes. Others stand there by their code, so
    that two labels have two tags."""
    return "".join(c if c.isalnum() or c in "_-. " else f"_x{ord(c):x}_" for c in name)[:200]


__all__ = ["STEPS", "ConfigError", "Outcome", "RetrainingError", "begin", "unfinished"]
