"""The model repository for Triton, read by protobuf with Triton's own messages and by ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from refract.pipeline.export.triton import write_model_repository

LABELS = ("ant", "bee, honey", 'the "wasp"', "Käfer")


def network(path: Path, *, batch: str | int = "N", classes: int = 4) -> Path:
    """Save a network that maps uint8 N×2×3×3 to the means of its columns as `logits`, and their softmax as `probabilities`."""
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("ReduceMean", ["floats"], ["means"], axes=[1, 2], keepdims=0),
        node("Pad", ["means", "widths"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto
    outputs = [value(name, kind.FLOAT, [batch, classes]) for name in ("probabilities", "logits")]
    widths = onnx.numpy_helper.from_array(np.array([0, 0, 0, classes - 3]), "widths")
    graph = onnx.helper.make_graph(nodes, "g", [value("images", kind.UINT8, [batch, 2, 3, 3])], outputs, [widths])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_tritons_messages_read_the_configuration_of_the_network(tmp_path) -> None:
    source = network(tmp_path / "model.onnx")
    model = write_model_repository(source, LABELS, tmp_path / "repository", name="pets: 2025/v1")
    files = {str(path.relative_to(tmp_path / "repository")) for path in model.rglob("*") if path.is_file()}
    assert files == {f"pets__2025_v1/{name}" for name in ("config.pbtxt", "labels.txt", "1/model.onnx")}
    config = text_format.Parse((model / "config.pbtxt").read_text("utf-8"), ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (model.name, "onnxruntime", 32)
    assert config.HasField("dynamic_batching")
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    types = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)"}
    names = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    for described, actual in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        rows = [(row.name, types[names[row.data_type].name], ["N", *row.dims]) for row in described]
        assert rows == [(value.name, value.type, value.shape) for value in actual]
    assert [output.label_filename for output in config.output] == ["labels.txt", ""]
    assert (model / "labels.txt").read_text("utf-8").split("\n") == [*LABELS, ""]
    assert session.run(["logits"], {"images": np.ones((5, 2, 3, 3), np.uint8)})[0].shape == (5, 4)


@pytest.mark.parametrize(
    ("options", "labels", "says"),
    [
        ({"batch": 1}, LABELS, "has a fixed batch of 1"),
        ({}, LABELS[:3], r"`probabilities` is of shape \[-1, 4\]; expected \[-1, 3\]"),
        ({}, (*LABELS[:3], "two\nlines"), "must be one line"),
        ({}, (*LABELS[:3], ""), "must be one line"),
    ],
)
def test_what_triton_could_not_serve_is_rejected(tmp_path, options, labels, says: str) -> None:
    source = network(tmp_path / "model.onnx", **options)
    with pytest.raises(ValueError, match=says):
        write_model_repository(source, labels, tmp_path / "repository", name="pets")
    assert not (tmp_path / "repository").exists()
