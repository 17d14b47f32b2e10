"""Errors with a message for the user: commands print it as one line and exit with the error's code, without a traceback."""

from typing import ClassVar


class RefractError(Exception):
    """An error that a user can act on. Its message names what was wrong, where, what is accepted, and the next step."""

    exit_code: ClassVar[int]


class InputError(RefractError, ValueError):
    """Input that cannot be used: a config, a policy, data, a bundle."""

    exit_code = 2


class ServiceError(RefractError, RuntimeError):
    """Work that failed although its input was valid: a tracking server, a worker process, a checkpoint on a full disk."""

    exit_code = 1


def first_line(err: Exception) -> str:
    """Return the first line of the error's message, at most 200 characters."""
    return (str(err).splitlines() or [""])[0][:200] or type(err).__name__
