"""Passwords, tokens and keys in addresses and messages: they are replaced before a user, a log or a file sees them."""

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

SECRETS = (
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_CONNECTION_STRING", "PGPASSWORD", "HF_TOKEN",
)  # fmt: skip
"""Environment variables whose values are secret wherever they stand."""

SHORTEST = 6
"""Characters of a secret that is searched for by its value: shorter ones are parts of ordinary words."""

_ADDRESS = re.compile(
    r"""\b(?P<scheme>[a-z][a-z0-9+.-]*://)
    (?:(?P<both>[^/\s'"<>?\#:@]*:[^/\s'"<>]*)@      # user:password
      |(?P<token>[^/\s'"<>?\#@]+)@)""",
    re.IGNORECASE | re.VERBOSE,
)
# SQLAlchemy takes a slash in a password.
_DATABASE = re.compile(
    r"\b(?P<scheme>(?:postgres|mysql|mariadb|mssql|oracle)[a-z0-9+]*://)[^/\s'\"<>:@]*:[^\s'\"<>]*@", re.IGNORECASE
)
_PARAMETER = re.compile(
    r"""(?P<name>(?:^|(?<=[?&;\s'"]))
    (?:[\w.-]*(?:token|passw\w*|passphrase|pwd|secret(?:[_-]?key)?|signature|credentials?|api[_-]?key|access[_-]?key|account[_-]?key)
      |auth|sig|key|odbc_connect)=)
    (?P<value>[^&\s'"<>;]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def masked(text: str) -> str:
    """The text with `***` for each password, token and key: in the user part of addresses, in query parameters such as `token=`, and
    wherever the value of an environment variable of SECRETS stands. Masked text stays as it is."""
    for secret in _known_secrets():
        text = text.replace(secret, MASK)
    text = _DATABASE.sub(rf"\g<scheme>{MASK}@", text)
    return _PARAMETER.sub(rf"\g<name>{MASK}", _ADDRESS.sub(_without_user, text))


def masked_values(value: Any) -> Any:
    """`masked` for every text in mappings and lists."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: masked_values(item) for key, item in value.items()}
    return [masked_values(item) for item in value] if isinstance(value, list | tuple) else value


def hide_credentials() -> None:
    """Mask what this process logs, whichever library does so, and the tracebacks of errors that nothing catches."""
    before = logging.getLogRecordFactory()
    if getattr(before, "masks", False):
        return

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a library's own mistake, which logging itself reports
            return record
        if (hidden := masked(text)) != text:  # else the arguments stay, which some formatters read
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


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match["scheme"], match["token"]
    # A database's user alone is no secret, as with a password in PGPASSWORD; of a server it may be a token.
    if user is not None and not scheme.lower().startswith("http"):
        return match[0]
    return f"{scheme}{MASK}@"


def _known_secrets() -> list[str]:
    """The longest first, as one may hold another."""
    found = {os.environ.get(name, "") for name in SECRETS}
    try:
        password = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).password or ""
    except ValueError:  # brackets that hold no address
        password = ""
    found |= {password, unquote(password)}
    return sorted((secret for secret in found if len(secret) >= SHORTEST and secret != MASK), key=len, reverse=True)
