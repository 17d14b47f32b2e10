"""A home directory for the caches of the server and its libraries, where the user has none (`docker run --user 12345`)."""

import getpass
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

NOWHERE = "/nonexistent"
"""Debian's name of a home that is not there: what would be kept below it is not."""


def ensure_home() -> None:
    """Set HOME to a private directory below the temporary one where caches cannot be kept in the user's home, and log it; USER where the
    user has no name, for which PyTorch's compiler and MLflow ask. Child processes inherit both."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second from Python 3.13 on
        os.environ["USER"] = str(os.getuid())
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    if home != "~" and _can_keep(Path(home, ".cache")):
        return
    cause = "the user has no home directory" if home == "~" else f"no cache can be kept below {home}"
    try:
        os.environ["HOME"] = own = _private()
        logger.warning("%s; caches are kept in %s; set HOME to keep them elsewhere", cause, own)
    except OSError as err:
        os.environ["HOME"] = NOWHERE
        logger.warning(
            "%s, nor in a temporary directory (%s); the server runs without caches; set HOME", cause, err.strerror
        )


def _can_keep(folder: Path) -> bool:
    """Whether it is there, though it may be read-only, or can be made."""
    if folder.is_dir():
        return True
    above = next((one for one in folder.parents if one.exists()), None)
    return above is not None and above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def _private() -> str:
    """A directory of this user alone, the same at the next start; another where somebody else has taken its name. OSError."""
    folder = Path(tempfile.gettempdir(), f"refract-home-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return str(folder)
    except FileExistsError:
        pass
    return tempfile.mkdtemp(prefix="refract-home-")
