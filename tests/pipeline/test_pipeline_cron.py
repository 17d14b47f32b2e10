"""What five fields of cron mean, in zones whose clocks are put forward and back."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from refract.pipeline.config.config import ConfigError
from refract.pipeline.schedule.cron import Cron, zone_named


def fires(text: str, zone: str, begin: str, count: int) -> list[str]:
    """The next times of a cron, by the clock on the wall there."""
    cron, moment = Cron(text, ZoneInfo(zone)), datetime.fromisoformat(begin).replace(tzinfo=ZoneInfo(zone))
    times, previous = [], None
    for _ in range(count):
        next_one = cron.get_next_fire_time(previous, moment)
        assert next_one is not None
        moment = previous = next_one
        times.append(f"{moment.astimezone(ZoneInfo(zone)):%m-%d %H:%M %a %Z}")
    return times


# 2026-11-21 is a Saturday.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 2 * * *", ["11-22 02:00 Sun UTC", "11-23 02:00 Mon UTC"]),
        ("*/20 23 * * *", ["11-21 23:00 Sat UTC", "11-21 23:20 Sat UTC", "11-21 23:40 Sat UTC", "11-22 23:00 Sun UTC"]),
        ("0 2 * * 0", ["11-22 02:00 Sun UTC", "11-29 02:00 Sun UTC"]),
        ("0 2 * * 7", ["11-22 02:00 Sun UTC"]),
        ("0 2 * * 1-5", ["11-23 02:00 Mon UTC", "11-24 02:00 Tue UTC"]),
        ("0 2 * * 5-7", ["11-22 02:00 Sun UTC", "11-27 02:00 Fri UTC", "11-28 02:00 Sat UTC"]),
        ("0 2 * * FRI-sun", ["11-22 02:00 Sun UTC", "11-27 02:00 Fri UTC", "11-28 02:00 Sat UTC"]),
        ("0 2 * * */3", ["11-22 02:00 Sun UTC", "11-25 02:00 Wed UTC", "11-28 02:00 Sat UTC"]),
        ("0 2 * * mon,4", ["11-23 02:00 Mon UTC", "11-26 02:00 Thu UTC"]),
        ("0 2 1 * 1", ["11-23 02:00 Mon UTC", "11-30 02:00 Mon UTC", "12-01 02:00 Tue UTC", "12-07 02:00 Mon UTC"]),
        ("30 4 1 jan,7 *", ["01-01 04:30 Fri UTC", "07-01 04:30 Thu UTC"]),
    ],
)
def test_five_fields_mean_what_cron_means_by_them(text: str, expected: list[str]) -> None:
    assert fires(text, "UTC", "2026-11-21T22:30", len(expected)) == expected


def test_a_day_with_a_repeated_or_skipped_hour_has_one_run() -> None:
    assert fires("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", 2) == [
        "10-25 02:30 Sun CEST",
        "10-26 02:30 Mon CET",
    ]
    assert fires("30 2 * * *", "Europe/Berlin", "2027-03-27T12:00", 2) == [
        "03-28 03:30 Sun CEST",
        "03-29 02:30 Mon CEST",
    ]
    every = fires("0 * * * *", "Europe/Berlin", "2026-10-25T01:30", 3)
    assert every == ["10-25 02:00 Sun CEST", "10-25 02:00 Sun CET", "10-25 03:00 Sun CET"], "each hour that passes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("61 2 * * *", "(61) is higher than the maximum value (59)"),
        ("0 2 * *", "4 fields"),
        ("@daily", "1 fields"),
        ("", "0 fields"),
        ("0 2 last * *", "'last' is not a valid day"),
        ("0 2 * * 8", "'8' is not a day of the week"),
        ("0 2 * * fri-mon", "'fri-mon' is not a range"),
        ("0 2 * * 1/0", "'1/0' is not a range"),
        ("*/0 2 * * *", "Increment must be higher than 0"),
        ("0 2 * foo *", "foo"),
        ("0 2 31 2 *", "never fires"),
    ],
)
def test_an_invalid_cron_is_reported(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cron(text, ZoneInfo("UTC"))
    assert "--cron" in str(caught.value) and message in str(caught.value)
    with pytest.raises(ConfigError, match="--timezone: 'Europe/Nowhere' is unknown"):
        zone_named("Europe/Nowhere")
