"""Backends that compute a network, one file for each library. Independent of HTTP."""

from collections.abc import Mapping
from types import MappingProxyType

from refract.plugins import PluginError, add_entry
from refract.serve.runtime.backends import cuda_graphs, onnx, openvino, tensorrt, torch_backends
from refract.serve.runtime.backends.base import Backend

_backends = {
    backend.name: backend
    for module in (torch_backends, cuda_graphs, tensorrt, openvino, onnx)
    for backend in module.BACKENDS
}

BACKENDS: Mapping[str, Backend] = MappingProxyType(_backends)
"""Name of `--backend` → backend: those of Refract and of the loaded plugins."""

INT8 = tuple(name for name, backend in BACKENDS.items() if backend.int8)
"""Names of Refract's backends that compute in 8-bit integers."""


def register_backend(backend: Backend) -> None:
    """Add the backend of a plugin. PluginError if it is not a Backend, or if another backend or `--backend` uses the name."""
    if not isinstance(backend, Backend):
        raise PluginError(f"backend: got {backend!r}; expected a refract.serve.runtime.backends.base.Backend")
    if backend.name in ("auto", "int8"):
        raise PluginError(f"backend: the name {backend.name!r} is a choice of --backend; rename the backend")
    add_entry("backend", _backends, backend.name, backend)
