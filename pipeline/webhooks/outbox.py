"""The outbox: a folder in which events wait until the webhook has accepted them. Addresses and credentials are never stored."""

import json
import logging
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from refract.models.credentials import masked_values
from refract.pipeline.files import locked, write_atomically
from refract.pipeline.webhooks.delivery import NotDelivered, send

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = timedelta(minutes=1), timedelta(hours=6)
"""The wait after the first failed attempt, which doubles with each further one, and its bound."""

GIVE_UP = timedelta(days=7)
"""The age of an event from which a failed attempt is the last one."""

LIMIT_S = 10.0
"""Seconds that a run, or a scheduler that stops, waits for the delivery. It continues in the background until the process ends, and later
from the outbox."""

WAITING, UNDELIVERED = "waiting", "undelivered"


class _Taken(Exception):
    """Another process delivers the events."""


@dataclass(frozen=True)
class Outbox:
    """folder: has a file for each event, in `waiting/`, or in `undelivered/` after GIVE_UP; url: the address of the webhook."""

    folder: Path
    url: str

    def add(self, body: Mapping[str, Any], now: datetime | None = None, *, event: str | None = None) -> str:
        """Store an event, and return its ID. event: the ID, by default a new one. OSError if that fails."""
        now, event = now or datetime.now(UTC), event or uuid.uuid4().hex
        path = self.folder / WAITING / f"{now:%Y%m%d-%H%M%S-%f}-{event}.json"  # sorted by time
        values = {"id": event, "created": now.isoformat(), "attempts": 0, "next": now.isoformat()}
        self._write(path, values | {"body": masked_values({"id": event, **body})})
        return event

    def deliver(self, now: datetime | None = None, *, early: bool = False) -> int:
        """Try each waiting event whose next attempt is due, oldest first, and return how many were accepted.

        early: also those that are not due yet. A server that does not respond ends the attempts: the others wait for it, too. Errors are
        logged. Nothing happens while another process delivers.
        """
        now, accepted = now or datetime.now(UTC), 0
        if not any((self.folder / WAITING).glob("*.json")):
            return 0
        try:
            with locked(self.folder / "lock", _Taken()):
                for path in sorted((self.folder / WAITING).glob("*.json")):
                    result = self._try(path, now, early=early)
                    accepted += bool(result)
                    if result is None:
                        break
        except _Taken:
            pass
        except OSError as error:
            log.warning("webhook: %s: %s", error.filename or self.folder, error.strerror or error)
        return accepted

    def deliver_in_background(self, *, early: bool = True) -> None:
        """Deliver in a thread, and wait for it for at most LIMIT_S seconds. A process that ends earlier leaves the events in the outbox."""
        thread = threading.Thread(target=self.deliver, kwargs={"early": early}, daemon=True, name="webhook")
        thread.start()
        thread.join(LIMIT_S)
        if thread.is_alive():
            log.warning("webhook: not delivered within %g s; the next run or the scheduler tries again", LIMIT_S)

    def _try(self, path: Path, now: datetime, *, early: bool) -> bool | None:
        """Return whether the event was accepted; None if the server does not respond."""
        try:
            entry = json.loads(path.read_text("utf-8"))
            due, created = datetime.fromisoformat(entry["next"]), datetime.fromisoformat(entry["created"])
            event, body, attempts = entry["id"], entry["body"], entry["attempts"] + 1
        except (ValueError, KeyError, TypeError) as error:
            log.warning("webhook: %s cannot be read (%s); it is skipped", path, error)
            return False
        if now < due <= now + LONGEST_WAIT and not early:  # a later time means that the clock was set back
            return False
        try:
            send(self.url, event, _bytes(json.dumps(body, ensure_ascii=False)), now)
        except NotDelivered as error:
            if now - created >= GIVE_UP:
                (self.folder / UNDELIVERED).mkdir(exist_ok=True)
                path.replace(self.folder / UNDELIVERED / path.name)
                log.warning("webhook: event %s was not delivered in %d days: %s", event, GIVE_UP.days, error)
            else:
                wait = min(FIRST_WAIT * 2 ** min(attempts - 1, 20), LONGEST_WAIT)
                self._write(path, entry | {"attempts": attempts, "next": (now + wait).isoformat()})
                log.warning("webhook: event %s waits for the next attempt: %s", event, error)
            return False if error.refused else None
        path.unlink()
        log.info("webhook: delivered event %s", event)
        return True

    @staticmethod
    def _write(path: Path, entry: Mapping[str, Any]) -> None:
        write_atomically(path, _bytes(json.dumps(entry, indent=1, ensure_ascii=False) + "\n"))


def _bytes(text: str) -> bytes:
    """Encode JSON as UTF-8. A byte of a path that is not UTF-8 becomes JSON's escape of it."""
    return text.encode("utf-8", "backslashreplace")
