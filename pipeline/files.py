"""Files that are either whole or not there."""

import os
import tempfile
from pathlib import Path

# Asked for once: the process's mask can only be read by setting it, which other threads would see.
_MASK = os.umask(0o077)
os.umask(_MASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename over it: nobody sees half a file, and a failure leaves the old one. OSError as usual."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_MASK)  # mkstemp's own mode hides the file from everybody else
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
