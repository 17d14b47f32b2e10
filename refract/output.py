"""The output of all commands: --quiet, --verbose and --json mean the same for each, and so does the variable NO_COLOR.

The result goes to the standard output. The log, progress, warnings and errors go to the standard error.
"""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

VARIABLE = "REFRACT_OUTPUT"
"""Environment variable with `quiet` or `verbose`. A command sets it for the processes that it starts."""

HELP = """
output:
  --quiet               show only the result, warnings and errors
  --verbose             show debug messages, with the time and the module of each, and the traceback of an error
  --json                print the result as JSON; everything else goes to the standard error
  NO_COLOR=1            environment variable: print no colours"""

TEXT_ONLY = ("completion",)
"""Commands without `--json`: their result is a script."""

TO_FILE = ("evaluate", "drift")
"""Commands whose option `--json FILE` writes the result to a file."""


class OutputOptionError(ValueError):
    """Output options that a command lacks or that exclude each other, or an invalid REFRACT_OUTPUT."""


@dataclass(frozen=True)
class Modes:
    """The output options of a command line."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False


def split(command: str, arguments: Sequence[str]) -> tuple[Modes, list[str]]:
    """Return (the output options, the other arguments). OutputOptionError if the command cannot have these options.

    The options may stand anywhere before `--`. Of the commands in TO_FILE, `--json FILE.json` stays among the other arguments.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    names, rest = set(), []
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        to_file = argument == "--json" and command in TO_FILE and following.endswith(".json")
        if index < end and argument in ("--quiet", "--verbose", "--json") and not to_file:
            names.add(argument.removeprefix("--"))
        else:
            rest.append(argument)
    if {"quiet", "verbose"} <= names:
        raise OutputOptionError("got --quiet and --verbose; remove one of them")
    if "json" in names and command in TEXT_ONLY:
        raise OutputOptionError("has no --json, as its result is a script")
    return Modes(**dict.fromkeys(names, True)), rest


def check_variable() -> None:
    """Raise OutputOptionError if the environment variable REFRACT_OUTPUT has an unknown value."""
    if (value := os.environ.get(VARIABLE, "")) not in ("", "quiet", "verbose"):
        raise OutputOptionError(f"environment variable {VARIABLE}: {value!r} is neither quiet nor verbose")


def help_of(command: str) -> str:
    """Return the lines that `refract COMMAND --help` ends with."""
    return "\n".join(line for line in HELP.splitlines() if command not in TEXT_ONLY or "--json" not in line)


def level() -> int:
    """Return the level of Refract's loggers: DEBUG with --verbose, WARNING with --quiet, else INFO."""
    return {"quiet": logging.WARNING, "verbose": logging.DEBUG}.get(os.environ.get(VARIABLE, ""), logging.INFO)


def log_format(default: str) -> str:
    """Return the format of log lines: `default`, or with --verbose one with time, level and module."""
    return "%(asctime)s %(levelname)s %(name)s: %(message)s" if level() == logging.DEBUG else default


def is_quiet() -> bool:
    """Whether progress and hints are omitted."""
    return level() == logging.WARNING


_json_stream: TextIO | None = None


def is_json() -> bool:
    """Whether `result` prints: the command runs with --json."""
    return _json_stream is not None


def result(value: Any) -> None:
    """With --json, print the result, or one result of several, as one line of JSON. Paths become text, NaN becomes null."""
    if _json_stream is not None:
        print(json.dumps(_as_json(value), ensure_ascii=False), file=_json_stream, flush=True)


@contextlib.contextmanager
def applied(modes: Modes) -> Iterator[None]:
    """Apply the options to this process and the processes that it starts.

    With --json, the standard output of both becomes the standard error, so that only `result` prints to it.
    """
    global _json_stream
    before, stream = os.environ.get(VARIABLE), _json_stream
    if modes.quiet or modes.verbose:
        os.environ[VARIABLE] = "quiet" if modes.quiet else "verbose"
    try:
        if modes.json:
            with _redirected() as _json_stream:
                yield
        else:
            yield
    finally:
        _json_stream = stream
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


@contextlib.contextmanager
def _redirected() -> Iterator[TextIO]:
    """Send what this process and its children print to the standard error. Yields the standard output."""
    stream = sys.stdout
    stream.flush()
    try:
        is_descriptor = stream.fileno() == 1
    except (OSError, ValueError):  # a stream in memory
        is_descriptor = False
    copy = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if not is_descriptor:
                yield stream
                return
            output = open(copy, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 — closed below, in its own way
            try:
                yield output
            finally:
                with contextlib.suppress(OSError):  # `result` has raised it: `refract predict --json … | head`
                    output.close()
    finally:
        os.dup2(copy, 1)
        os.close(copy)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _as_json(value.tolist()) if hasattr(value, "tolist") else str(value)
