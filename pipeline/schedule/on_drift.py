"""The trigger `--on-drift DATA`: a run is due when new data, or a server's sampled inputs, drift from the champion's reference.

A separate process measures, as the scheduler stays small without PyTorch, and a crash or a leak cannot end the schedule.
"""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refract.errors import ServiceError
from refract.models.credentials import masked
from refract.pipeline.data.storage import scheme_of
from refract.pipeline.schedule.store import Reading

MEASURE = (sys.executable, "-m", "refract.pipeline.retraining.champion_drift")
LIMIT_S = 3600
"""The time limit of a measurement, in seconds."""

LEVELS = ("none", "warn", "stop")


class DriftError(ServiceError):
    """The drift cannot be measured. The message says why."""


@dataclass
class OnDrift:
    """config: file of the champion's config; data: a folder, a table or a server's sampled inputs; level: `warn` or `stop`, from which on
    drift starts a run.

    One drift starts one run. The next run by this trigger needs a reading without drift in between, or another champion.
    """

    config: Path
    data: str
    level: str = "warn"
    name: str = "drift"
    _child: "subprocess.Popen[str] | None" = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _stopped: bool = False

    @property
    def argument(self) -> str:
        return json.dumps([self.data, self.level], ensure_ascii=False)

    def read(self, handled: str, before: Reading | None) -> Reading:
        """Measure the drift, unless data and champion are those of the last reading. DriftError if that fails.

        handled: the champion's version at the start of the run that the present drift started, empty without such a run.
        """
        known = before.state if before is not None else {}
        measured = self._measured(known)
        level, champion = measured["level"], measured["champion"]
        if level is None:  # no champion yet, or too few samples, such as after a promotion
            return Reading(measured["summary"], handled=handled, mark=handled, state=measured)
        drifted = LEVELS.index(level) >= LEVELS.index(self.level)
        if level == "none":
            handled = ""
        is_handled = handled == champion
        summary = measured["summary"] + ("; a run has taken this drift in" if drifted and is_handled else "")
        return Reading(
            summary,
            value=LEVELS.index(level),
            threshold=LEVELS.index(self.level),
            due=drifted and not is_handled,
            handled=handled,
            mark=champion if drifted else handled,
            state=measured,
        )

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()

    def _measured(self, known: Any) -> dict[str, Any]:
        """Run the measurement. known: the result of the last one, which is returned if data and champion have not changed."""
        with self._lock:
            if self._stopped:
                raise DriftError("the scheduler stops")
            self._child = child = subprocess.Popen(
                [*MEASURE, str(self.config), self.data, json.dumps(known)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C reaches it through `stop`
            )
        try:
            output, errors = child.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise DriftError(f"the measurement took longer than {LIMIT_S:,} s") from None
        finally:
            self._child = None
        if child.returncode:
            last = next(reversed(errors.strip().splitlines()), f"exit code {child.returncode}")
            raise DriftError(masked(last))
        try:
            result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
            return {key: result[key] for key in ("level", "champion", "data", "summary")}
        except (ValueError, LookupError, TypeError) as error:
            raise DriftError(f"the measurement printed no result ({error})") from error


def drift_trigger(config: Path, data: str, level: str) -> OnDrift:
    """Build the trigger. Relative paths become absolute, so that the list of schedules names the folder."""
    named = scheme_of(data) or data == "digits"
    return OnDrift(config, data if named else str(Path(data).absolute()), level)
