"""Sources of plugins: functions that fetch a data set and return its folder or manifest."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from refract.pipeline.data.errors import DataError
from refract.plugins import PluginError, add_entry

Source = Callable[[str], str | Path]
"""The text after `NAME:` in `data.source` → the path of a folder, or of a CSV, TSV or Parquet manifest."""

_sources: dict[str, Source] = {}

SOURCES: Mapping[str, Source] = MappingProxyType(_sources)
"""Name → source, of the loaded plugins."""


def register_source(name: str, source: Source) -> None:
    """Add the source of a plugin. PluginError if another source has the name."""
    if name == "digits":
        raise PluginError(
            "the source 'digits' exists already, in refract.pipeline.data.manifest; rename the new source"
        )
    add_entry("source", _sources, name, source)


def fetched(source: str | Path) -> str | Path:
    """Call the plugin's source of `NAME:ARGUMENT` or `NAME` and return its path; return any other source unchanged.

    Raises DataError if the plugin's function fails.
    """
    name, _, argument = str(source).partition(":")
    if name not in SOURCES or Path(source).exists():
        return source
    try:
        return SOURCES[name](argument)
    except Exception as error:  # the plugin's code may raise any
        raise DataError(
            f"data.source: {source}: the plugin's source {name} raised {type(error).__name__}: {error}"
        ) from error
