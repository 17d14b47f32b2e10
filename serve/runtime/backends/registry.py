"""All backends by name."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from refract.serve.runtime.backends import MODULES
from refract.serve.runtime.backends.base import Backend

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for module in MODULES
        for backend in import_module(f"refract.serve.runtime.backends.{module}").BACKENDS
    }
)

INT8 = tuple(name for name, backend in BACKENDS.items() if backend.int8)
"""Names of the backends that compute in 8-bit integers."""
