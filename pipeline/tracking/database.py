"""A new SQLite database for MLflow, whole or not there: MLflow makes its tables one by one, over seconds, and refuses for ever after a
database of which a kill left a part."""

import os
import tempfile
from pathlib import Path

from refract.pipeline.tracking.address import sqlite_path, sqlite_uri


def make_database(uri: str) -> None:
    """Make the file that the URI names, if it is SQLite's and there is none. OSError where it cannot be."""
    path = sqlite_path(uri)
    if path is None or path.exists() or not path.parent.is_dir():
        return
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as beside:
        made = Path(beside) / path.name
        new = sqlite_uri(made.resolve())
        MlflowClient(new, new).search_experiments(max_results=1)
        try:
            os.link(made, path)
        except FileExistsError:
            pass  # another process was quicker, and its own is as good
        except OSError:  # a file system without hard links
            made.replace(path)
