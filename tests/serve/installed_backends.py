"""Those of the server's backends whose packages are there."""

import importlib.util

EXTRAS = {"openvino": "openvino", "openvino-bf16": "openvino", "onnx": "onnxruntime"}
INSTALLED = [name for name, package in EXTRAS.items() if importlib.util.find_spec(package)]
INT8 = [f"{name}-int8" for name in ("openvino", "onnx") if {name, "onnx"} <= {*INSTALLED}]
"""Made by ONNX Runtime, and not chosen by themselves."""
PACKAGES = sorted({EXTRAS[name] for name in INSTALLED})
