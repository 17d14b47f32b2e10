"""The tracker of one training: it writes the journal, and a thread delivers it, so that a slow server does not slow training."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.errors import ServiceError
from refract.pipeline.config.sections import TrackingConfig
from refract.pipeline.tracking.address import DEFAULT_URI, absolute, is_local
from refract.pipeline.tracking.journal import Entry, Journal
from refract.pipeline.tracking.store import Refused, Store, first_line, now

if TYPE_CHECKING:
    from refract.pipeline.tracking.model_card import ModelFacts

log = logging.getLogger(__name__)

FIRST_ANSWER = 15.0
"""Seconds that a training waits at its start for the server to accept its run."""
SILENT = 30.0
"""Seconds without a response after which a training stops waiting at its end; UPLOAD while files are sent."""
UPLOAD = 600.0
LOCAL = 300.0
"""The same limits for a store on this machine: creating tables, or waiting for a locked database, takes long on a busy machine."""
LONGEST_PAUSE = 30.0
POLL = 0.02


class TrackingError(ServiceError):
    """The tracking server cannot be used. The message names it, and says what to do."""


class Tracker:
    """Tracks one run in MLflow and in `run_dir`. Values tracked before a restart are not tracked again.

    Once the server has responded, journal.delivered has the `run_id`, and the `version` of the registered model.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """Start the run, or resume it. TrackingError if the server refuses it; a warning if the server does not respond."""
        self.run_dir, self.journal = run_dir, Journal(run_dir)
        # A resumed run, perhaps in another folder, stays with its server, unless the config or environment names one.
        configured = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._store = Store(absolute(configured or self.journal.delivered.get("uri") or DEFAULT_URI), run_dir)
        self.address = self._store.address
        self.journal.for_server(self._store.uri)
        self._wake = threading.Event()
        self._sent = 0.0  # when the current entry was sent; 0 while none is
        self._failure: BaseException | None = None
        self._refused: str | None = None
        if self.journal.entries:
            self._add({"do": "status", "status": "RUNNING", "time": now()})
        else:
            start = {
                "experiment": config.experiment,
                "run_name": run_dir.name,
                "params": dict(params),
                "tags": dict(tags),
            }
            self._add({"do": "start", "key": uuid.uuid4().hex, "time": now(), **start})
        threading.Thread(target=self._deliver, name="tracking", daemon=True).start()
        self._wait_for_first_answer()
        if self._refused:
            raise TrackingError(
                f"MLflow at {self.address} cannot be used: {self._refused}. Set tracking.uri or MLFLOW_TRACKING_URI, or train with "
                "--tracking.enabled false."
            )
        if self.journal.waiting():
            why = first_line(self._failure) if self._failure else f"no response in {self._patience(FIRST_ANSWER):.0f} s"
            log.warning(
                "MLflow at %s does not answer (%s); training continues, and the run's journal keeps all entries",
                self.address,
                why,
            )

    def _wait_for_first_answer(self) -> None:
        """Wait until the server accepts or refuses the run. A local store that has not failed is slow, as it creates its tables."""
        start, reported = time.monotonic(), False
        while self.journal.waiting() and not self._refused:
            waited = time.monotonic() - start
            if waited > (self._patience(FIRST_ANSWER) if self._may_answer() else FIRST_ANSWER):
                return
            if waited > FIRST_ANSWER and not reported:
                log.info("waiting for MLflow at %s, which is slow", self.address)
                reported = True
            time.sleep(POLL)

    def _may_answer(self) -> bool:
        """Whether the last attempt is in progress, or failed only as another process locks the local database."""
        failure = self._failure
        return failure is None or (is_local(self._store.uri) and "database is locked" in str(failure))

    def _patience(self, seconds: float) -> float:
        return max(seconds, LOCAL) if is_local(self._store.uri) else seconds

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Track metrics of a step, except those that it already has."""
        present = {name for entry in self.journal.of("metrics") if entry["step"] == step for name in entry["values"]}
        fresh = {name: float(value) for name, value in values.items() if name not in present}
        if fresh:
            self._add({"do": "metrics", "step": step, "time": now(), "values": fresh})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        if tags:
            self._add({"do": "tags", "tags": dict(tags)})

    def log_files(self, files: Sequence[Path], bundle: Path | None = None, folders: Sequence[Path] = ()) -> None:
        """Track files and folders of the run's folder, and the bundle's folder as `bundle` if there is one, as artifacts."""
        if not any(self.journal.of("files")):
            names, folder_names = [path.name for path in files], [path.name for path in folders]
            bundle_name = None if bundle is None else bundle.name
            self._add({"do": "files", "files": names, "bundle": bundle_name, "folders": folder_names})

    def register(self, model: str, alias: str, facts: "ModelFacts | None" = None) -> None:
        """Register the run's bundle as a version of the model. alias: for the model's first version; later ones become `challenger`.

        facts: for the description and the tags of the version.
        """
        if not any(self.journal.of("register")):
            self._add(registration(model, alias, facts))

    def finish(self, status: str) -> int:
        """Finish the run, and wait for the server as long as it responds. status: FINISHED, FAILED or KILLED.

        Returns the number of entries that are not delivered.
        """
        self._failure = None  # the last failure may be long ago, so try once more
        self._add({"do": "status", "status": status, "time": now()})
        start = time.monotonic()
        while self.journal.waiting() and not self._refused:
            time.sleep(POLL)
            locked = time.monotonic() - start if self._failure is not None else 0.0
            silent = time.monotonic() - self._sent if self._sent else 0.0
            uploading = next(iter(self.journal.waiting()), {}).get("do") == "files"
            if not self._may_answer() or locked > LOCAL or silent > (UPLOAD if uploading else self._patience(SILENT)):
                break
        return len(self.journal.waiting())

    def _add(self, entry: Entry) -> None:
        self.journal.append(entry)
        self._wake.set()

    def _deliver(self) -> None:
        pause = 1.0
        while True:
            self._wake.clear()
            for entry in self.journal.waiting():
                self._sent = time.monotonic()
                try:
                    deliver_one(self.journal, self._store, entry)
                except Refused as error:
                    self._refused = str(error)
                    return
                except (
                    Exception
                ) as error:  # MLflow and the libraries below it raise many types for an unreachable server
                    self._failure = error
                    break
                self._failure, pause = None, 1.0
            self._sent = 0.0
            if self._failure is not None:
                self._wake.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            elif not self.journal.waiting():
                self._wake.wait()


def registration(model: str, alias: str, facts: "ModelFacts | None") -> Entry:
    """Return the journal's entry of `Tracker.register`."""
    from refract.pipeline.tracking.model_card import version_description, version_tags

    entry = {"do": "register", "model": model, "alias": alias}
    return entry if facts is None else {**entry, "description": version_description(facts), "tags": version_tags(facts)}


def deliver_one(journal: Journal, store: Store, entry: Entry) -> None:
    """Send the first waiting entry of a journal and mark it as delivered. An entry that the server refuses is skipped with a warning.

    Refused if the entry is the start of the run.
    """
    try:
        results = store.deliver(entry, journal.delivered)
    except Refused as error:
        if entry["do"] == "start":
            raise
        log.warning("MLflow at %s refused %s: %s", store.address, _described(entry), error)
        results = {"refused": str(error)} if entry["do"] == "register" else {}
    journal.mark(**results)


def _described(entry: Entry) -> str:
    return f"the metrics of step {entry['step']}" if entry["do"] == "metrics" else f"the entry {entry['do']!r}"
