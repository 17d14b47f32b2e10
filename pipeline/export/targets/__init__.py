"""The export targets, one file for each. This module imports nothing heavy, so that `refract export --help` responds at once."""

from collections.abc import Mapping
from types import MappingProxyType

TARGETS: Mapping[str, str] = MappingProxyType(
    {
        "onnx": "refract.pipeline.export.targets.onnx",
        "openvino": "refract.pipeline.export.targets.openvino",
        "torch-export": "refract.pipeline.export.targets.torch_export",
        "hf": "refract.pipeline.export.targets.hf",
        "triton": "refract.pipeline.export.targets.triton",
        "web": "refract.pipeline.export.targets.web",
    }
)
"""Value of `--to` → the module whose `TARGET` is a `refract.pipeline.export.target.Target`."""
