"""The files of a config's plugins: where they are, and their copies in the folder of a run."""

from collections.abc import Sequence
from pathlib import Path

from refract.pipeline.files import write_atomically
from refract.plugins import loaded, read

FOLDER = "plugins"
"""The folder of a run that holds the copies."""


def absolute_paths(entries: Sequence[str], *folders: Path) -> tuple[str, ...]:
    """Return the entries with absolute paths for the files, each in the first of the folders that has it. Names of modules stay."""
    return tuple(_absolute(entry, folders) if entry.endswith(".py") else entry for entry in entries)


def _absolute(entry: str, folders: Sequence[Path]) -> str:
    paths = [(folder / entry).absolute() for folder in folders]
    return str(next((path for path in paths if path.is_file()), paths[0]))


def store_plugins(entries: Sequence[str], folder: Path) -> list[str]:
    """Write copies of the files to `folder`/FOLDER and return the entries with the paths of the copies, relative to `folder`.

    A loaded plugin is written as it was loaded, even if its file has changed since. Raises PluginError for a missing file.
    """
    known = {plugin.path: plugin for plugin in loaded()}
    stored = []
    for entry in entries:
        if not entry.endswith(".py"):
            stored.append(entry)
            continue
        plugin = known.get(str(Path(entry).resolve())) or read(entry)
        write_atomically(folder / FOLDER / plugin.name, plugin.source or b"")
        stored.append(f"{FOLDER}/{plugin.name}")
    return stored


def plugin_digests(entries: Sequence[str]) -> dict[str, str]:
    """Return name → SHA-256 of the plugins, which identify them independently of their folder. Raises PluginError for a missing one."""
    return {plugin.name: plugin.sha256 for plugin in map(read, entries)}
