"""All backends by name."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from refract.plugins import PluginError, add_entry
from refract.serve.runtime.backends import MODULES, NAMES
from refract.serve.runtime.backends.base import Backend

_backends: dict[str, Backend] = {
    backend.name: backend
    for module in MODULES
    for backend in import_module(f"refract.serve.runtime.backends.{module}").BACKENDS
}

BACKENDS: Mapping[str, Backend] = MappingProxyType(_backends)
"""The backends of Refract and of the loaded plugins."""

INT8 = tuple(name for name, backend in BACKENDS.items() if backend.int8)
"""Names of Refract's backends that compute in 8-bit integers."""


def register_backend(backend: Backend) -> None:
    """Add the backend of a plugin. PluginError if it is not a Backend, or if another backend or `--backend` uses the name."""
    if not isinstance(backend, Backend):
        raise PluginError(f"backend: got {backend!r}; expected a refract.serve.runtime.backends.base.Backend")
    if backend.name in NAMES and backend.name not in BACKENDS:
        raise PluginError(f"backend: the name {backend.name!r} is a choice of --backend; rename the backend")
    add_entry("backend", _backends, backend.name, backend)
