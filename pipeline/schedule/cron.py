"""A cron expression as a trigger of APScheduler, with cron's semantics where those of APScheduler differ."""

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
    """Fires as cron does, by five fields: minute, hour, day of month, month, day of week. ConfigError for any other text.

    Differs from APScheduler 3 as cron does: Sunday is 0 and 7. If both day of month and day of week are given, either one suffices.
    Where daylight saving time repeats an hour, fixed hours fire once; where it skips the hour, they fire an hour later by the clock.
    """

    def __init__(self, text: str, zone: ZoneInfo) -> None:
        self.text, self.zone = " ".join(text.split()), zone
        try:
            self._triggers = _triggers(self.text.split(), zone)
        except ValueError as error:
            raise ConfigError(
                f'--cron: {text!r} is not a cron expression: {error}. Expected minute hour day month weekday, such as "0 2 * * *"'
            ) from error
        # An expression such as "*" or "*/2" counts the hours that pass, also in an hour that daylight saving time repeats.
        self._fixed_hours = not self.text.split()[1].startswith("*")
        if self.get_next_fire_time(None, datetime.now(UTC)) is None:
            raise ConfigError(f"--cron: {text!r} never fires; its date does not exist")

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """Return the first time after the previous one, else from now on. It is in UTC, as Python compares times of one zone without its
        shifts.
        """
        # APScheduler compares times of two zones, which are never equal in a repeated hour.
        start = previous_fire_time + INSTANT if previous_fire_time else now
        while True:
            times = [trigger.get_next_fire_time(None, start.astimezone(self.zone)) for trigger in self._triggers]
            first = min((time.astimezone(UTC) for time in times if time), default=None)
            if first is None or not (self._fixed_hours and first.astimezone(self.zone).fold):
                return first
            start = first + INSTANT

    def __str__(self) -> str:
        return f"{self.text} ({self.zone})"


def zone_named(name: str | None) -> ZoneInfo:
    """Return a time zone by its name, or this machine's. ConfigError for an unknown name."""
    try:
        return ZoneInfo(name) if name and name != LOCAL else get_localzone()
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(f"--timezone: {name!r} is unknown; use a name such as Europe/Berlin or UTC") from error


def _triggers(fields: list[str], zone: ZoneInfo) -> list[CronTrigger]:
    """Build the triggers of the five fields. ValueError for fields that cron does not accept."""
    if len(fields) != len(FIELDS):
        raise ValueError(f"{len(fields)} fields")
    for name, field in zip(FIELDS[:3], fields, strict=False):
        if not re.fullmatch(r"[\d*,/-]+", field):
            raise ValueError(f"{field!r} is not a valid {name}")
    values = dict(zip(FIELDS, fields, strict=True)) | {"day_of_week": _weekdays(fields[4])}
    if fields[2].startswith("*") or fields[4].startswith("*"):
        return [CronTrigger(**values, timezone=zone)]
    return [CronTrigger(**{**values, either: "*"}, timezone=zone) for either in ("day", "day_of_week")]


def _weekdays(field: str) -> str:
    """Return the days of the week by name, as APScheduler's numbers start with Monday."""
    if field == "*":
        return field
    days = set()
    for part in field.lower().split(","):
        span, slash, step = part.partition("/")
        start, dash, end = span.partition("-")
        low, high = (0, 6) if span == "*" else (_weekday(start), _weekday(end or start))
        if dash and end in ("sun", "0") and low:
            high = 7
        if high < low or (slash and not (step.isdigit() and int(step))):
            raise ValueError(f"{part!r} is not a range of days of the week")
        days |= {day % 7 for day in range(low, (6 if slash and not dash else high) + 1, int(step or 1))}
    return ",".join(WEEKDAYS[day] for day in sorted(days))


def _weekday(text: str) -> int:
    if text in WEEKDAYS:
        return WEEKDAYS.index(text)
    if re.fullmatch("[0-7]", text):
        return int(text)
    raise ValueError(f"{text!r} is not a day of the week, 0 to 7 or sun to sat")
