"""Plugins: Python files or modules of a user that add ops, networks, losses, metrics, sources, commands and serving backends.

    from refract.plugins import metric

    @metric
    def worst_recall(probabilities, truth): ...

A plugin runs only if the config's key `plugins` or the option `--plugin` lists it. This module imports no heavy module.
"""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

from refract.errors import InputError

__all__ = ["backend", "command", "loss", "metric", "network", "op", "source"]

GROUP = "refract.plugins"
"""The group of entry points whose names a list of plugins may contain."""

Added = TypeVar("Added", bound=Callable[..., Any])


class PluginError(InputError):
    """A plugin cannot be loaded. The message names its file, the line and the cause."""


@dataclass(frozen=True)
class Plugin:
    """A plugin's code.

    name: the name of the file, such as `my_ops.py`, or of the module; path: the path of the file; sha256: the SHA-256 of the file's
    content, in hexadecimal; source: that content, None for a module, which Python imports by its name.
    """

    name: str
    path: str
    sha256: str
    source: bytes | None = field(repr=False)


@dataclass(frozen=True)
class _Loaded:
    """entries: (registry, kind, name) of each entry that the plugin added."""

    plugin: Plugin
    entries: list[tuple[MutableMapping[str, Any], str, str]] = field(default_factory=list)

    def remove_entries(self) -> None:
        for table, _, name in self.entries:
            del table[name]


_loaded: dict[str, _Loaded] = {}
_running: list[_Loaded] = []


def op(added: Added) -> Added:
    """Add an op to those of policies, by the name of its class, which derives from `refract.augment.ops.base.Op`."""
    _registry("refract.augment.registry").register_op(added)
    return added


def network(added: Added) -> Added:
    """Add a network to those of `model.name`, by the name of the function or class.

    It is called with (num_classes, image_size=(height, width), **model.args) and returns a module: (N, 3, H, W) floats → logits (N, C).
    """
    _registry("refract.models.registry").register_network(added.__name__, added)
    return added


@overload
def loss(terms: Added, /) -> Added: ...
@overload
def loss(
    *, tasks: tuple[str, ...] = ..., reduction: str = ..., weighted_terms: bool = ...
) -> Callable[[Added], Added]: ...
def loss(terms: Callable[..., Any] | None = None, /, **declared: Any) -> Any:
    """Add a loss to those of `loss.name`, by the name of the function.

    It maps logits (N, C) and soft targets (N, C), both float32, to (N, C): each class's term of a sample's loss. Its keyword-only arguments
    are some of `gamma`, `multilabel` and `class_counts`.
    `@loss(tasks=("multilabel",), reduction="mean")` declares what `refract.models.training.losses.Loss` describes.
    """
    losses = _registry("refract.models.training.losses")

    def add(added: Added) -> Added:
        losses.register_loss(added.__name__, losses.Loss(terms=added, **declared))
        return added

    return add if terms is None else add(terms)


def metric(added: Added) -> Added:
    """Add a metric to those of each evaluation, by the name of the function.

    It maps the probabilities (N, C) float32 and the truth, class indices (N,) or bool (N, C) for multi-label, to a finite number.
    """
    _registry("refract.pipeline.evaluation.custom_metrics").register_metric(added.__name__, added)
    return added


def source(added: Added) -> Added:
    """Add a source to those of `data.source`, by the name of the function: `NAME:ARGUMENT` calls it with the text ARGUMENT.

    It returns the path of a folder, or of a CSV, TSV or Parquet manifest.
    """
    _registry("refract.pipeline.data.sources.custom").register_source(added.__name__, added)
    return added


def command(added: Added) -> Added:
    """Add a command: `refract --plugin FILE NAME …`, with - for each _ in the function's name.

    It is called with the arguments after the name, a list of texts, and returns the exit code. The first line of its docstring is its help.
    """
    _registry("refract.cli").register_command(added.__name__.replace("_", "-"), added)
    return added


def backend(added: Any) -> Any:
    """Add a serving backend to those of `--backend`. added: a `refract.serve.runtime.backends.base.Backend`."""
    _registry("refract.serve.runtime.backends.registry").register_backend(added)
    return added


def _registry(module: str) -> Any:
    return importlib.import_module(module)


def add_entry(kind: str, table: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Add an entry to a registry. PluginError, with the origins of both, if the registry has the name."""
    if name in table:
        holder = provider(kind, name)
        origin = getattr(table[name], "__module__", "Refract") if holder is None else holder.path
        new = f"the {kind} of {_running[-1].plugin.name}" if _running else f"the new {kind}"
        raise PluginError(f"the {kind} {name!r} exists already, in {origin}; rename {new}")
    table[name] = value
    if _running:
        _running[-1].entries.append((table, kind, name))


def load(entries: Iterable[str]) -> None:
    """Run the plugins that are not loaded yet. A file that was edited since replaces its earlier entries.

    entries: paths that end in .py, names of modules, or names of entry points of GROUP. Raises PluginError for a plugin that does not
    exist or fails, and for two files of one name.
    """
    for entry in entries:
        _run(read(entry))


def read(entry: str) -> Plugin:
    """Read a plugin's code without running it. Raises PluginError if there is none."""
    path = Path(entry)
    if path.suffix == ".py":
        if not path.stem.isidentifier():
            raise PluginError(f"plugin {entry}: {path.stem!r} is not the name of a Python module; rename the file")
        try:
            source = path.read_bytes()
        except OSError as error:
            raise PluginError(
                f"plugin {entry}: cannot be read: {error.strerror}; a path is relative to the config's folder or to the current folder"
            ) from error
        return Plugin(path.name, str(path.resolve()), hashlib.sha256(source).hexdigest(), source)
    origin = _module_file(entry)
    digest = hashlib.sha256(Path(origin).read_bytes()).hexdigest() if Path(origin).is_file() else ""
    return Plugin(entry, origin, digest, None)


def loaded() -> tuple[Plugin, ...]:
    """Return the plugins of this process, in the order of their loading."""
    return tuple(each.plugin for each in _loaded.values())


def provider(kind: str, name: str) -> Plugin | None:
    """Return the plugin that added the entry `name`, None for an entry of Refract."""
    for each in _loaded.values():
        if any(entry[1:] == (kind, name) for entry in each.entries):
            return each.plugin
    return None


class LoadedPlugins:
    """Pickles as the plugins of this process, and loads them in the process that unpickles it.

    Pickled before objects of the plugins' classes, it lets a worker process that does not fork find these classes.
    """

    def __reduce__(self) -> tuple[Callable[..., "LoadedPlugins"], tuple[Any, ...]]:
        return _restored, (loaded(),)


def _restored(plugins: Iterable[Plugin]) -> LoadedPlugins:
    for plugin in plugins:
        _run(plugin)
    return LoadedPlugins()


def _run(plugin: Plugin) -> None:
    earlier = _loaded.get(plugin.name)
    if earlier is not None and (plugin.source is None or earlier.plugin.sha256 == plugin.sha256):
        return  # Python imports a module once
    if earlier is not None and earlier.plugin.path != plugin.path:
        raise PluginError(
            f"two plugins are called {plugin.name}: {earlier.plugin.path} and {plugin.path}; rename one, or load one of them only"
        )
    if earlier is not None:
        earlier.remove_entries()
        del _loaded[plugin.name]
    running = _Loaded(plugin)
    _running.append(running)
    try:
        _execute(plugin)
    except (Exception, SystemExit) as error:
        running.remove_entries()
        raise PluginError(_failure(plugin, error)) from error
    finally:
        _running.pop()
    _loaded[plugin.name] = running


def _execute(plugin: Plugin) -> None:
    if plugin.source is None:
        importlib.import_module(_module_name(plugin.name))
        return
    # A prefix, so that a plugin called random.py hides no other module.
    module = ModuleType(f"refract_plugin_{Path(plugin.name).stem}")
    module.__file__ = plugin.path
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    try:
        exec(compile(plugin.source, plugin.path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise


def _failure(plugin: Plugin, error: BaseException) -> str:
    """Describe an exception of a plugin with the deepest line of the plugin's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == plugin.path]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == plugin.path else (lines or [None])[-1]
    where = plugin.path if line is None else f"{plugin.path}, line {line}"
    if isinstance(error, InputError):
        return f"plugin {where}: {error}"
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"plugin {where}: {type(error).__name__}{': ' if reason else ''}{reason}; correct it, or remove the plugin from the list"


def _module_name(entry: str) -> str:
    """Return the module of an entry point, or the entry itself."""
    from importlib.metadata import entry_points

    return next((point.module for point in entry_points(group=GROUP, name=entry)), entry)


def _module_file(entry: str) -> str:
    """Find the file of a module. Python runs the packages that contain it."""
    reason = ""
    try:
        spec = importlib.util.find_spec(_module_name(entry))
    except (ImportError, ValueError) as error:
        spec, reason = None, f" ({error})"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        raise PluginError(f"plugin {entry}: {where}: {type(error).__name__}: {error}; correct its package") from error
    if spec is None:
        raise PluginError(
            f"plugin {entry}: expected a path that ends in .py, the name of a module that Python can import, or the name of an entry "
            f"point of the group {GROUP}{reason}"
        )
    return spec.origin or ""
