"""Provide a home directory for caches if the user has none (`docker run --user 12345`)."""

import getpass
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

MISSING_HOME = "/nonexistent"
"""Debian's name of a home directory that does not exist. With it, libraries run without caches."""


def ensure_home() -> None:
    """Set HOME to a private temporary directory if the user's home cannot hold caches, and log a warning. Set USER if the user has no name,
    which PyTorch's compiler and MLflow look up. Child processes inherit both."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second from Python 3.13 on
        os.environ["USER"] = str(os.getuid())
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    if home != "~" and _exists_or_can_be_created(Path(home, ".cache")):
        return
    cause = "the user has no home directory" if home == "~" else f"no cache can be written below {home}"
    try:
        os.environ["HOME"] = directory = _private_directory()
        logger.warning("%s; caches are written to %s; set HOME to use another directory", cause, directory)
    except OSError as err:
        os.environ["HOME"] = MISSING_HOME
        logger.warning(
            "%s, and no temporary directory can be created (%s); the server runs without caches; set HOME",
            cause,
            err.strerror,
        )


def _exists_or_can_be_created(folder: Path) -> bool:
    """Whether `folder` exists, even if it is read-only, or this process can create it."""
    if folder.is_dir():
        return True
    parent = next((parent for parent in folder.parents if parent.exists()), None)
    return parent is not None and parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


def _private_directory() -> str:
    """Return a temporary directory that only this user can access: the same at each start, or a new one if another user took its name.
    Raises OSError if it cannot be created."""
    folder = Path(tempfile.gettempdir(), f"refract-home-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return str(folder)
    except FileExistsError:
        pass
    return tempfile.mkdtemp(prefix="refract-home-")
