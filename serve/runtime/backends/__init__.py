"""Backends that compute a network, one file for each library. Independent of HTTP."""

from collections.abc import Mapping
from types import MappingProxyType

from refract.serve.runtime.backends import cuda_graphs, onnx, openvino, tensorrt, torch_backends
from refract.serve.runtime.backends.base import Backend

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for module in (torch_backends, cuda_graphs, tensorrt, openvino, onnx)
        for backend in module.BACKENDS
    }
)

INT8 = tuple(name for name, backend in BACKENDS.items() if backend.int8)
"""Names of the backends that compute in 8-bit integers."""
