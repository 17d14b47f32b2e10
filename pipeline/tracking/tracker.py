"""The tracker of one training: it writes the journal, and a thread of its own delivers it. A server that stalls costs training nothing."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refract.pipeline.config.sections import TrackingConfig
from refract.pipeline.tracking.address import DEFAULT_URI, absolute, is_local
from refract.pipeline.tracking.journal import Entry, Journal
from refract.pipeline.tracking.store import Refused, Store, first_line, now

log = logging.getLogger(__name__)

FIRST_ANSWER = 15.0
"""Seconds that a training waits for the server to take its run, before it goes on without."""
SILENT = 30.0
"""Seconds without an answer after which the end of a training waits no longer; for files, UPLOAD."""
UPLOAD = 600.0
LOCAL = 300.0
"""The same for a store on this machine: a busy one takes long for the tables of a new database, and for a locked one."""
LONGEST_PAUSE = 30.0
POLL = 0.02


class TrackingError(RuntimeError):
    """The tracking server cannot be used; the message says which and what to do."""


class Tracker:
    """One run, in MLflow and in `run_dir`. What was tracked before a restart is not tracked again.

    journal.delivered has, once the server answered, its `run_id`, and the `version` of the registered model.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """Open the run, or go on with it. TrackingError where the server refuses it; a warning where it does not answer."""
        self.run_dir, self.journal = run_dir, Journal(run_dir)
        # A run that goes on, perhaps from another folder, stays with its server, unless another one is named.
        named = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._store = Store(absolute(named or self.journal.delivered.get("uri") or DEFAULT_URI), run_dir)
        self.address = self._store.address
        self.journal.for_server(self._store.uri)
        self._wake = threading.Event()
        self._asked = 0.0  # since when the server has not answered the entry in hand; 0 where none is
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
            why = first_line(self._failure) if self._failure else f"no answer in {self._patience(FIRST_ANSWER):.0f} s"
            log.warning(
                "MLflow at %s does not answer (%s); training continues, and what is to be tracked is kept",
                self.address,
                why,
            )

    def _wait_for_first_answer(self) -> None:
        """Wait until the server has the run or refused it. A local store that has not failed is slow, not away: it creates its tables."""
        began, reported = time.monotonic(), False
        while self.journal.waiting() and not self._refused:
            waited = time.monotonic() - began
            if waited > (self._patience(FIRST_ANSWER) if self._may_answer() else FIRST_ANSWER):
                return
            if waited > FIRST_ANSWER and not reported:
                log.info("waiting for MLflow at %s, which is slow", self.address)
                reported = True
            time.sleep(POLL)

    def _may_answer(self) -> bool:
        """Whether the last attempt is under way, or found a local database that another process holds for now."""
        failure = self._failure
        return failure is None or (is_local(self._store.uri) and "database is locked" in str(failure))

    def _patience(self, seconds: float) -> float:
        return max(seconds, LOCAL) if is_local(self._store.uri) else seconds

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Metrics of a step, those that it has not had yet."""
        known = {name for entry in self.journal.of("metrics") if entry["step"] == step for name in entry["values"]}
        fresh = {name: float(value) for name, value in values.items() if name not in known}
        if fresh:
            self._add({"do": "metrics", "step": step, "time": now(), "values": fresh})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Tags of the run."""
        if tags:
            self._add({"do": "tags", "tags": dict(tags)})

    def log_files(self, files: Sequence[Path], bundle: Path) -> None:
        """Files of the run's folder, and the bundle's folder as `bundle`, as artifacts."""
        if not any(self.journal.of("files")):
            self._add({"do": "files", "files": [path.name for path in files], "bundle": bundle.name})

    def register(self, model: str, alias: str) -> None:
        """Make the run's bundle a version of the registered model. alias: of the model's first version; later ones are `challenger`."""
        if not any(self.journal.of("register")):
            self._add({"do": "register", "model": model, "alias": alias})

    def finish(self, status: str) -> int:
        """status: FINISHED, FAILED or KILLED. Waits for the server as long as it answers; returns the entries that it does not have."""
        self._failure = None  # the last attempt may be long ago: there is one more
        self._add({"do": "status", "status": status, "time": now()})
        began = time.monotonic()
        while self.journal.waiting() and not self._refused:
            time.sleep(POLL)
            locked = time.monotonic() - began if self._failure is not None else 0.0
            silent = time.monotonic() - self._asked if self._asked else 0.0
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
                self._asked = time.monotonic()
                try:
                    deliver_one(self.journal, self._store, entry)
                except Refused as error:
                    self._refused = str(error)
                    return
                except (
                    Exception
                ) as error:  # whatever MLflow and what lies below it raise for a server or a database that is not there
                    self._failure = error
                    break
                self._failure, pause = None, 1.0
            self._asked = 0.0
            if self._failure is not None:
                self._wake.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            elif not self.journal.waiting():
                self._wake.wait()


def deliver_one(journal: Journal, store: Store, entry: Entry) -> None:
    """Send the first waiting entry of a journal and mark it. What the server will not have is left out with a warning; Refused where that
    is the run itself."""
    try:
        answers = store.deliver(entry, journal.delivered)
    except Refused as error:
        if entry["do"] == "start":
            raise
        log.warning("MLflow at %s refused %s: %s", store.address, _told(entry), error)
        answers = {"refused": str(error)} if entry["do"] == "register" else {}
    journal.mark(**answers)


def _told(entry: Entry) -> str:
    return f"the metrics of step {entry['step']}" if entry["do"] == "metrics" else f"the entry {entry['do']!r}"
