"""Mask passwords, tokens and keys in URLs and messages before they reach a user, a log or a file."""

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

MASK = "***"

TOKENS = (
    "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING", "HF_TOKEN", "REFRACT_WEBHOOK_SECRET",
)  # fmt: skip
"""Environment variables with random values, which are masked wherever they occur."""

PASSWORDS = ("MLFLOW_TRACKING_PASSWORD", "PGPASSWORD")
"""Environment variables with secret values that may be ordinary words."""

SHORTEST = 6
"""The shortest secret, in characters, that is searched by its value: shorter values also occur in ordinary words."""

_ADDRESS = re.compile(
    r"""(?<![a-z0-9+.-])(?P<scheme>[a-z][a-z0-9+.-]{0,30}://)(?P<user>[^/?\#\s"<>]+)@""", re.IGNORECASE
)
# SQLAlchemy accepts a slash in a password, and an @ in a user name.
_DATABASE = re.compile(
    r"""(?P<scheme>(?:postgres|mysql|mariadb|mssql|oracle)[a-z0-9+]{0,30}://)[^:/\s"<>]*:[^?\s"<>]*@""", re.IGNORECASE
)
_PARAMETER = re.compile(
    r"""(?P<name>[?&][\w.-]{0,40}(?:token|passw\w{0,9}|passphrase|pwd|secret(?:[_-]?key)?|signature|credentials?|key|auth|sig|odbc_connect)=)
    (?P<value>[^&\s'"<>;]+)""",
    re.IGNORECASE | re.VERBOSE,
)
_NAMED = re.compile(
    r"""(?P<name>(?:password|passwd|passphrase|secret|secret[_-]?key|api[_-]?key|access[_-]?key|account[_-]?key|access[_-]?token)
      ['"]?\s?[=:]\s?['"]?
      |\bauthorization['"]?\s?[=:]\s?['"]?(?:bearer|basic|token)\s)
    (?P<value>[^\s'"&,;)}\]]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def masked(text: str) -> str:
    """Replace each password, token and key in a text by `***`.

    - in the user part of URLs
    - in query parameters such as `token=`
    - after names such as `password=`
    - wherever the value of an environment variable of TOKENS or PASSWORDS occurs, or the password of MLFLOW_TRACKING_URI

    The function is idempotent.
    """
    return _by_pattern(_without(text, _tokens() | _passwords()))


def masked_values(value: Any) -> Any:
    """Apply `masked` to every text in mappings and lists.

    In a text without a URL, values of PASSWORDS stay, because they may be ordinary words: a stored config must name the same folder.
    """
    if isinstance(value, str):
        return masked(value) if "://" in value else _by_pattern(_without(value, _tokens()))
    if isinstance(value, Mapping):
        return {key: masked_values(item) for key, item in value.items()}
    return [masked_values(item) for item in value] if isinstance(value, list | tuple) else value


def hide_credentials() -> None:
    """Mask the log records of all libraries in this process, and the tracebacks of uncaught exceptions."""
    before = logging.getLogRecordFactory()
    if getattr(before, "masks", False):
        return

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a library's wrong format arguments, which logging reports
            return record
        if (hidden := masked(text)) != text:  # otherwise keep the arguments, which some formatters read
            record.msg, record.args = hidden, ()
        if record.exc_info and record.exc_info[0] is not None:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            if (hidden := masked(text)) != text:
                record.exc_text = hidden
        return record

    factory.masks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)
    sys.excepthook = _print_masked
    threading.excepthook = lambda hooked: _print_masked(hooked.exc_type, hooked.exc_value, hooked.exc_traceback)


def _print_masked(kind: Any, error: Any, trace: Any) -> None:
    if not issubclass(kind, SystemExit):
        sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))


def _by_pattern(text: str) -> str:
    if "://" in text:
        text = _DATABASE.sub(rf"\g<scheme>{MASK}@", text)
        text = _ADDRESS.sub(_without_user, text)
    return _NAMED.sub(rf"\g<name>{MASK}", _PARAMETER.sub(rf"\g<name>{MASK}", text))


def _without_user(match: re.Match[str]) -> str:
    # The user name of a database is not secret; its password may be in PGPASSWORD. The user name of a server may be a token.
    if ":" not in match["user"] and not match["scheme"].lower().startswith("http"):
        return match[0]
    return f"{match['scheme']}{MASK}@"


def _without(text: str, secrets: set[str]) -> str:
    """Replace the secrets, the longest first, as a secret may contain another."""
    for secret in sorted(
        (secret for secret in secrets if len(secret) >= SHORTEST and secret != MASK), key=len, reverse=True
    ):
        text = text.replace(secret, MASK)
    return text


def _tokens() -> set[str]:
    return {os.environ.get(name, "") for name in TOKENS}


def _passwords() -> set[str]:
    """Return the values of PASSWORDS and the password of MLFLOW_TRACKING_URI.

    A password that is also the name of the user or of the database is excluded, because it occurs in many messages. The patterns still
    mask it.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    try:
        parts = urlsplit(address)
        password = parts.password or ""
    except ValueError:  # brackets without an IP address
        return {os.environ.get(name, "") for name in PASSWORDS}
    rest = address.replace(f":{password}@", ":@", 1)
    uri_passwords = set() if password in rest else {password, unquote(password)}
    return uri_passwords | {os.environ.get(name, "") for name in PASSWORDS}
