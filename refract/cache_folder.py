"""The folder of files that Refract can create again: `REFRACT_CACHE_DIR`, by default ~/.cache/refract."""

import os
from pathlib import Path

VARIABLE = "REFRACT_CACHE_DIR"


def cache_folder() -> Path:
    """Return the folder. It may be missing; for a user without a home, it cannot be created."""
    try:
        return Path(os.environ.get(VARIABLE) or "~/.cache/refract").expanduser().absolute()
    except RuntimeError:  # a container's user without an entry in /etc/passwd
        return Path(os.devnull, "refract")
