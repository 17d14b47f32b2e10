"""Triggers that start a run besides cron: each is read every few minutes, and one reading says whether a run is due.

This module does not know what a trigger reads: `on_labels.py` counts decisions on labels, `on_drift.py` measures drift.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from refract.errors import RefractError
from refract.pipeline.schedule.store import Reading, ScheduleStore

log = logging.getLogger(__name__)

CHECK_S = 300.0
"""The default seconds between two checks of the triggers."""

MIN_INTERVAL_S = 3600.0
"""The default of the smallest time in seconds between the start of a run and the start of the next one by a trigger."""


class Trigger(Protocol):
    """name: `labels` or `drift`; argument: the value of its option, as text."""

    @property
    def name(self) -> str: ...

    @property
    def argument(self) -> str: ...

    def read(self, handled: str, before: Reading | None) -> Reading:
        """Measure now. handled: the mark of the last run that ended with a decision, empty before it; before: the last reading.

        RefractError or OSError if it cannot be measured.
        """

    def stop(self) -> None:
        """End a measurement that is in progress; later ones end at once."""


@dataclass(frozen=True)
class Watch:
    """Checks the triggers of one config, and stores their readings.

    min_interval_s: smallest time in seconds between the start of the last run, for any reason, and the start of a run by a trigger.
    """

    config: str
    triggers: Sequence[Trigger]
    store: ScheduleStore
    min_interval_s: float = MIN_INTERVAL_S

    def check(self, now: datetime) -> str | None:
        """Read all triggers. Returns the reason to start a run, None if none is due. now: with a time zone."""
        due = []
        for trigger in self.triggers:
            reading = self._read(trigger, now)
            if reading.due:
                due.append(f"{trigger.name}: {reading.summary}")
        if not due:
            return None
        reason = "; ".join(due)
        for last in self.store.runs(self.config, 1):
            earliest = last.began + timedelta(seconds=self.min_interval_s)
            if last.began <= now < earliest:  # a start after now means that the clock was set back
                log.info("a run is due (%s), but not before %s", reason, f"{earliest.astimezone(UTC):%H:%M:%S} UTC")
                return None
        return reason

    def _read(self, trigger: Trigger, now: datetime) -> Reading:
        state = self.store.trigger(self.config, trigger.name)
        before, handled = (state.reading, state.handled) if state else (None, "")
        try:
            reading = trigger.read(handled, before)
        except (RefractError, OSError) as error:
            reading = Reading(f"not measured: {error}", handled=None, mark=None)
        if before is None or reading.summary != before.summary:
            log.log(
                logging.WARNING if reading.failed else logging.INFO, "trigger %s: %s", trigger.name, reading.summary
            )
        self.store.record_reading(self.config, trigger.name, reading, now, handled)
        return reading
