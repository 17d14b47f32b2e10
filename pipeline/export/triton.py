"""Write a model repository for NVIDIA Triton: a folder that its ONNX Runtime backend serves without any of Refract's code."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAX_BATCH = 32
"""Most images of a batch that Triton forms, as in `refract serve`."""

MAX_DELAY_US = 2000
"""Longest wait of a request for a batch to fill, in microseconds, as in `refract serve`."""

LABELLED = "probabilities"
"""The output whose numbers belong to the labels. Triton's classification extension returns these instead of indices."""

DATA_TYPES = {"FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "UINT8": "TYPE_UINT8", "INT64": "TYPE_INT64"}
"""Element types of ONNX and their names in a model configuration."""


class Tensor(NamedTuple):
    """An input or output of the network. dims: without the batch; -1 is any size."""

    name: str
    data_type: str
    dims: Sequence[int]


def write_model_repository(onnx_file: Path, labels: Sequence[str], folder: Path, *, name: str) -> Path:
    """Write `NAME/config.pbtxt`, `NAME/1/model.onnx` and `NAME/labels.txt` into `folder`, and return the folder NAME.

    The configuration has the inputs and outputs of `onnx_file`, whose first dimension is any number of images. labels: in the order of the
    output `probabilities`. NAME is `name` with an underscore for each character that is neither a letter, digit, `.`, `_` nor `-`.
    ValueError for a network with a fixed batch, an output `probabilities` without one number for each label, or a label of several lines.
    """
    inputs, outputs = _tensors(onnx_file)
    labelled = next((tensor for tensor in outputs if tensor.name == LABELLED), None)
    if labelled is None or list(labelled.dims) != [len(labels)]:
        problem = "missing" if labelled is None else f"of shape {[-1, *labelled.dims]}"
        raise ValueError(f"{onnx_file}: the output `{LABELLED}` is {problem}; expected {[-1, len(labels)]}")
    if several := [label for label in labels if label.splitlines() != [label]]:
        raise ValueError(f"label {several[0]!r} must be one line of text, as labels.txt has one label on each line")
    model = folder / repository_name(name)
    (model / "1").mkdir(parents=True)
    shutil.copyfile(onnx_file, model / "1" / "model.onnx")
    (model / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    (model / "config.pbtxt").write_text(_configuration(model.name, inputs, outputs), "utf-8")
    return model


def repository_name(name: str) -> str:
    """Return the name of a model as that of its folder, which Triton requires to be equal."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "model"


def _tensors(onnx_file: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs and the outputs of the network."""
    import onnx

    graph = onnx.load(onnx_file, load_external_data=False).graph
    inputs, outputs = ([_tensor(onnx_file, value) for value in values] for values in (graph.input, graph.output))
    return inputs, outputs


def _tensor(onnx_file: Path, value: Any) -> Tensor:
    import onnx

    kind = value.type.tensor_type
    first, *dims = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    if first != -1:
        raise ValueError(f"{onnx_file}: `{value.name}` has a fixed batch of {first}; export it with a dynamic batch")
    return Tensor(value.name, DATA_TYPES[onnx.TensorProto.DataType.Name(kind.elem_type)], dims)


def _configuration(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """Return a ModelConfig in protobuf's text format."""
    lines = [f"name: {_quoted(name)}", 'backend: "onnxruntime"', f"max_batch_size: {MAX_BATCH}"]
    for field, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            lines += [f"{field} {{", f"  name: {_quoted(tensor.name)}", f"  data_type: {tensor.data_type}"]
            lines += [f"  dims: {list(tensor.dims)}"]
            lines += ['  label_filename: "labels.txt"'] if field == "output" and tensor.name == LABELLED else []
            lines += ["}"]
    lines += [f"dynamic_batching {{ max_queue_delay_microseconds: {MAX_DELAY_US} }}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
