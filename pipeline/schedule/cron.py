"""A line of cron as a trigger of APScheduler, with cron's meaning where APScheduler's own differs."""

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from tzlocal import get_localzone

from refract.pipeline.config.config import ConfigError
from refract.pipeline.schedule.store import LOCAL

FIELDS = ("minute", "hour", "day", "month", "day_of_week")
INSTANT = timedelta(microseconds=1)
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


class Cron(BaseTrigger):
    """Fires as cron would by five fields: minute, hour, day of the month, month, day of the week. ConfigError for any other text.

    As in cron, and other than in APScheduler 3: Sunday is 0 and 7; where the day of the month and that of the week are both given, either
    does; fixed hours fire once in the night whose hour comes twice. In the night that skips an hour they fire an hour later by the clock.
    """

    def __init__(self, text: str, zone: ZoneInfo) -> None:
        self.text, self.zone = " ".join(text.split()), zone
        try:
            self._triggers = _triggers(self.text.split(), zone)
        except ValueError as error:
            raise ConfigError(
                f'--cron: {text!r} is no line of cron: {error}. It has five fields, minute hour day month weekday, as "0 2 * * *"'
            ) from error
        # Every hour, or every other one, is meant to come by the hours that pass, not by their names.
        self._fixed_hours = not self.text.split()[1].startswith("*")
        if self.get_next_fire_time(None, datetime.now(UTC)) is None:
            raise ConfigError(f"--cron: {text!r} is a day that never comes")

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """The first time after the previous one, or else from now on; in UTC, as times of one zone are compared without its shifts."""
        # APScheduler itself compares times of two zones, which in an hour that comes twice are never equal.
        begin = previous_fire_time + INSTANT if previous_fire_time else now
        while True:
            times = [trigger.get_next_fire_time(None, begin.astimezone(self.zone)) for trigger in self._triggers]
            found = min((time.astimezone(UTC) for time in times if time), default=None)
            if found is None or not (self._fixed_hours and found.astimezone(self.zone).fold):
                return found
            begin = found + INSTANT

    def __str__(self) -> str:
        return f"{self.text} ({self.zone})"


def zone_named(name: str | None) -> ZoneInfo:
    """A time zone by its name, or this machine's. ConfigError for one that is not known."""
    try:
        return ZoneInfo(name) if name and name != LOCAL else get_localzone()
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(f"--timezone: {name!r} is not known here; names are as Europe/Berlin or UTC") from error


def _triggers(fields: list[str], zone: ZoneInfo) -> list[CronTrigger]:
    """ValueError for fields that are not cron's."""
    if len(fields) != len(FIELDS):
        raise ValueError(f"it has {len(fields)} fields")
    for name, field in zip(FIELDS[:3], fields, strict=False):
        if not re.fullmatch(r"[\d*,/-]+", field):
            raise ValueError(f"{field!r} is no {name}")
    values = dict(zip(FIELDS, fields, strict=True)) | {"day_of_week": _weekdays(fields[4])}
    if fields[2].startswith("*") or fields[4].startswith("*"):
        return [CronTrigger(**values, timezone=zone)]
    return [CronTrigger(**{**values, either: "*"}, timezone=zone) for either in ("day", "day_of_week")]


def _weekdays(field: str) -> str:
    """Days of the week by their names: APScheduler's numbers begin with Monday."""
    if field == "*":
        return field
    days = set()
    for part in field.lower().split(","):
        span, slash, step = part.partition("/")
        begin, dash, end = span.partition("-")
        low, high = (0, 6) if span == "*" else (_weekday(begin), _weekday(end or begin))
        if dash and end in ("sun", "0") and low:
            high = 7
        if high < low or (slash and not (step.isdigit() and int(step))):
            raise ValueError(f"{part!r} is no span of days of the week")
        days |= {day % 7 for day in range(low, (6 if slash and not dash else high) + 1, int(step or 1))}
    return ",".join(WEEKDAYS[day] for day in sorted(days))


def _weekday(text: str) -> int:
    if text in WEEKDAYS:
        return WEEKDAYS.index(text)
    if re.fullmatch("[0-7]", text):
        return int(text)
    raise ValueError(f"{text!r} is no day of the week, 0 to 7 or sun to sat")
