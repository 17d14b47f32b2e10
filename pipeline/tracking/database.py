"""Create MLflow's SQLite database atomically.

MLflow creates its tables one by one, over seconds. After a kill in between it refuses the incomplete database for ever.
"""

import os
import tempfile
from pathlib import Path

from refract.pipeline.tracking.address import sqlite_path, sqlite_uri


def make_database(uri: str) -> None:
    """Create the SQLite file that the URI names, unless it exists. Other URIs are ignored. OSError if that fails."""
    path = sqlite_path(uri)
    if path is None or path.exists() or not path.parent.is_dir():
        return
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        database = Path(temporary) / path.name
        new = sqlite_uri(database.resolve())
        MlflowClient(new, new).search_experiments(max_results=1)
        try:
            os.link(database, path)
        except FileExistsError:
            pass  # another process created it first
        except OSError:  # a file system without hard links
            database.replace(path)
