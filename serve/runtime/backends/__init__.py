"""Backends that compute a network, one file for each library. Independent of HTTP.

`registry` imports the libraries; this module imports nothing heavy, so that `refract serve --help` responds at once.
"""

from collections.abc import Mapping
from types import MappingProxyType

MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch_backends": ("eager", "bf16", "fp16", "compiled"),
        "cuda_graphs": ("cuda-graphs",),
        "tensorrt": ("tensorrt",),
        "openvino": ("openvino", "openvino-bf16", "openvino-int8"),
        "onnx": ("onnx", "onnx-int8"),
    }
)
"""The modules of this folder that define backends, and the names of these."""

NAMES = ("auto", *(name for names in MODULES.values() for name in names), "int8")
"""The values of `--backend` without plugins: the backends, `auto` for the fastest, `int8` for the faster of the 8-bit ones."""
