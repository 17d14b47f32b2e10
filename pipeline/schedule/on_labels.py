"""The trigger `--on-labels N`: a run is due when decisions in the label history have changed N images since the last run."""

from dataclasses import dataclass
from pathlib import Path

from refract.pipeline.config.config import ConfigError
from refract.pipeline.labels.address import opened, split_address
from refract.pipeline.labels.decisions import LabelError
from refract.pipeline.labels.difference import changed_by_decisions
from refract.pipeline.retraining.workspace import read
from refract.pipeline.schedule.store import Reading


@dataclass(frozen=True)
class OnLabels:
    """address: the address of the label history; least: number of changed images; last: file of the last run's record, `last.json`."""

    address: str
    least: int
    last: Path
    name: str = "labels"

    @property
    def argument(self) -> str:
        return str(self.least)

    def read(self, handled: str, before: Reading | None) -> Reading:
        """Count the images that decisions changed since the last run. LabelError or LabelDatabaseError for the database.

        Decisions count from the last one that a run took in: a run of this schedule, or one that was started by hand. LabelError if the
        history ends before it, as an older copy of the database does: its next decisions would get numbers that count as taken in.
        """
        history = opened(self.address)
        taken_in = sorted({int(handled or 0), self._of_last_run()} - {0}, reverse=True)
        base = next((number for number in taken_in if history.decisions(since=number - 1)), 0)
        if taken_in and not base:
            newest = history.state().last
            raise LabelError(
                f"{history.address} ends with decision {newest}, before decision {taken_in[0]} of the last run; restore the newer "
                "database, or start `refract retrain` by hand, which takes this one in"
            )
        new = history.decisions(since=base)
        last = new[-1].id if new else base
        count = 0
        if new:
            count = len(changed_by_decisions(history.state(until=base), history.state(until=last)))
        since = f"since decision {base}" if base else "in the label history"
        summary = f"{count:,} of {self.least:,} images changed by decisions {since}"
        return Reading(
            summary, value=count, threshold=self.least, due=count >= self.least, handled=str(base), mark=str(last)
        )

    def stop(self) -> None:
        """A count takes a moment; there is nothing to end."""

    def _of_last_run(self) -> int:
        """Return the last decision that the last accepted run took in, 0 for none."""
        return int(read(self.last).get("label_decision") or 0) if self.last.exists() else 0


def label_trigger(labels: str | None, least: int, last: Path) -> OnLabels:
    """Build the trigger for the config key `data.labels`. ConfigError if it names no label history that can grow."""
    address, number = split_address(labels)
    if address is None:
        raise ConfigError("--on-labels: the config has no data.labels; set it to a label history, such as labels.db")
    if number is not None:
        raise ConfigError(
            f"--on-labels: data.labels: {labels!r} ignores decisions after {number}; remove @{number} from it"
        )
    opened(address)
    return OnLabels(address, least, last)
