"""The snapshots in a workspace: what they train on, and the removal of old ones."""

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from refract.pipeline.retraining.workspace import Workspace, read, read_run, write

log = logging.getLogger(__name__)

WITHOUT_TABLE = "without_corrections.csv"
"""The table of the data without the corrections since the champion, for `retrain.effect_of_labels`."""
TABLE, RECORD, FILES, CONTENTS = "manifest.csv", "snapshot.json", "files.json", "contents.json"
TABLES = (TABLE, WITHOUT_TABLE)
DECIDED = "decided"
"""The key of CONTENTS with the images whose labels the label history sets."""
PROPOSED = "proposed"
"""A file in the folder of a snapshot that no run has accepted yet."""
REMOVED = "removed.json"
"""The file next to the snapshots with the contents of removed ones, so that no later holdout gets images that they trained on."""
_REMOVING = ".removing"


def known_contents(folder: Path) -> frozenset[str] | None:
    """Return the `contents` of the samples that a snapshot trains and validates on; None if it is missing."""
    for name in (CONTENTS, FILES):  # earlier versions wrote FILES only
        if (folder / name).exists():
            return frozenset(read(folder / name).values() if name == FILES else read(folder / name)["contents"])
    return None


def decided_contents(folder: Path) -> frozenset[str]:
    """Return the SHA-256 of the images with an applied decision in a snapshot."""
    return frozenset(read(folder / CONTENTS).get(DECIDED, ())) if (folder / CONTENTS).exists() else frozenset()


def trained_before(workspace: Workspace) -> frozenset[str]:
    """Return the `contents` of the samples in all accepted snapshots, also of removed ones."""
    return _contents_of(_folders(workspace)) | _contents_of_removed(workspace)


def is_removed(table: Path) -> bool:
    """Return whether the path is that of a missing snapshot's table, next to which snapshots were removed."""
    return table.name in TABLES and not table.exists() and (table.parent.parent / REMOVED).exists()


def remove_unused(workspace: Workspace, keep: int | None, name: str, mlflow: str) -> None:
    """Remove all but the newest snapshots.

    keep: `retrain.keep_snapshots`, None for all; name: the registered model; mlflow: address of the registry.

    Snapshots of versions with an alias, of the last accepted run and of unfinished runs stay. A failure is only logged: the run is
    complete without it.
    """
    from refract.pipeline.tracking.aliases import aliases
    from refract.pipeline.tracking.model_registry import client_of

    if keep is None or len(_folders(workspace)) <= keep:
        return
    try:
        client = client_of(mlflow)
        versions = [client.get_model_version(name, version) for version in aliases(client, name).values()]
        records = [read_run(folder) for folder in workspace.runs()]
        running = [record for record in records if "outcome" not in record]
        in_use = {
            record["snapshot"]["digest"] for record in (workspace.last(), *running) if record and "snapshot" in record
        }
        in_use |= {version.tags["snapshot"] for version in versions if "snapshot" in version.tags}
        if removed := remove_old(workspace, keep, in_use):
            log.info("snapshots: removed %s; retrain.keep_snapshots is %d", ", ".join(removed), keep)
    except Exception as error:  # MLflow and the libraries below it raise many types for a database that cannot be read
        log.warning("snapshots: old ones stay for now: %s", error)


def remove_old(workspace: Workspace, keep: int, in_use: Collection[str]) -> list[str]:
    """Remove all snapshots except the `keep` newest and those with a digest of `in_use`. Returns the names of the removed ones.

    The age of a snapshot is that of the last run that took it. A removal that was killed continues at the next call. OSError for files
    that cannot be deleted.
    """
    folders = sorted(_folders(workspace), key=_taken_at)
    used = {workspace.snapshot(digest) for digest in in_use}
    old = [folder for folder in folders[:-keep] if folder not in used]
    if old:
        contents = _contents_of_removed(workspace) | _contents_of(old)
        write(workspace.root / "snapshots" / REMOVED, {"contents": sorted(contents)})
    for rest in (workspace.root / "snapshots").glob(f"*{_REMOVING}"):
        shutil.rmtree(rest)
    for folder in old:
        shutil.rmtree(folder.rename(folder.with_suffix(_REMOVING)))
    return [folder.name for folder in old]


def _folders(workspace: Workspace) -> list[Path]:
    folders = (workspace.root / "snapshots").glob("*")
    return [folder for folder in folders if folder.is_dir() and folder.suffix != _REMOVING]


def _taken_at(folder: Path) -> float:
    record = folder / RECORD
    return (record if record.exists() else folder).stat().st_mtime


def _contents_of(folders: Collection[Path]) -> frozenset[str]:
    """Return the contents of the accepted ones among the snapshots."""
    accepted = [known_contents(folder) for folder in folders if not (folder / PROPOSED).exists()]
    return frozenset[str]().union(*(contents for contents in accepted if contents is not None))


def _contents_of_removed(workspace: Workspace) -> frozenset[str]:
    path = workspace.root / "snapshots" / REMOVED
    return frozenset(read(path)["contents"]) if path.exists() else frozenset()
