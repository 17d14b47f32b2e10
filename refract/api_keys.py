"""A file of API keys, which the server of a model and the web page of a label review accept."""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
"""Seconds between two checks whether the file of keys changed."""

MIN_KEY_CHARS = 8
"""Shortest key, in characters. A shorter one can be guessed, and is more likely a mistake in the file."""

_COMMENT = re.compile(r"(?:^|\s)#")


class Key(NamedTuple):
    """An API key. name: the text after `#` in its line, else the first 8 hex digits of its SHA-256; it reveals nothing about the key."""

    value: bytes
    name: str


class KeyFile:
    """The API keys of a file, one per line. The file is read again when it changes, so that keys are rotated without a restart. The text
    after a `#` at the start of a line or after white space names the key.

    Raises OSError or ValueError for a file that cannot be read, has no key, or has a key shorter than MIN_KEY_CHARS or with non-ASCII
    characters, which no header carries safely. If a changed file is invalid, the previous keys stay valid and a warning is logged.
    """

    def __init__(self, file: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._keys, self._stamp = self._read()
        self._checked_at, self._logged_error = clock(), ""

    def find(self, sent: str) -> Key | None:
        """Return the key that equals the text `sent` of a request, or None. It never waits for more than a look at the file."""
        self._reload_if_changed()
        # Every key is compared, each in constant time, so that the duration reveals no part of a key.
        matches = [key for key in self._keys if hmac.compare_digest(key.value, sent.encode())]
        return matches[0] if matches else None

    def _reload_if_changed(self) -> None:
        if self._clock() - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = self._clock()
        try:
            if _stamp(self._file) != self._stamp:
                self._keys, self._stamp = self._read()
        except (OSError, ValueError) as err:  # being replaced, or invalid: the previous keys stay valid
            if str(err) != self._logged_error:
                logger.warning("the changed file of API keys is ignored, the previous keys stay valid: %s", err)
            self._logged_error = str(err)
        else:
            self._logged_error = ""

    def _read(self) -> tuple[list[Key], tuple[int, ...]]:
        stamp = _stamp(self._file)
        names: dict[bytes, str] = {}
        for number, line in enumerate(self._file.read_text("utf-8-sig").splitlines(), 1):
            text, *comment = (part.strip() for part in _COMMENT.split(line, maxsplit=1))
            if 0 < len(text) < MIN_KEY_CHARS:
                raise ValueError(
                    f"{self._file}: line {number}: an API key must have at least {MIN_KEY_CHARS} characters"
                )
            if not text.isascii():
                raise ValueError(f"{self._file}: line {number}: an API key must have ASCII characters only")
            if text:
                key = text.encode()
                names[key] = "".join(comment) or hashlib.sha256(key).hexdigest()[:8]
        if not names:
            raise ValueError(f"{self._file}: the file has no API key; write one per line")
        return [Key(key, name) for key, name in names.items()], stamp


def sent_key(authorization: str, x_api_key: str = "") -> str:
    """Return the key that a request sent in `Authorization: Bearer KEY` or `X-API-Key: KEY`, an empty text without one."""
    scheme, _, bearer = authorization.partition(" ")
    return (bearer if scheme.lower() == "bearer" else x_api_key).strip()


def _stamp(file: Path) -> tuple[int, ...]:
    """Return a value that changes when the file is written or replaced, even if its modification time is preserved."""
    status = file.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
