"""The messages of the Open Inference Protocol over gRPC, built at import from the table of their fields: no generated code.

Names, numbers and types of the fields are those of the published protocol: https://github.com/kserve/open-inference-protocol.
Deviation: fields that the server neither reads nor writes (parameters, tensor contents of other types) are not declared. protobuf skips
them in requests.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

FIELDS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "ServerLiveRequest": (),
        "ServerLiveResponse": ("bool live = 1",),
        "ServerReadyRequest": (),
        "ServerReadyResponse": ("bool ready = 1",),
        "ModelReadyRequest": ("string name = 1", "string version = 2"),
        "ModelReadyResponse": ("bool ready = 1",),
        "ServerMetadataRequest": (),
        "ServerMetadataResponse": ("string name = 1", "string version = 2", "repeated string extensions = 3"),
        "ModelMetadataRequest": ("string name = 1", "string version = 2"),
        "ModelMetadataResponse": (
            "string name = 1",
            "repeated string versions = 2",
            "string platform = 3",
            "repeated ModelMetadataResponse.TensorMetadata inputs = 4",
            "repeated ModelMetadataResponse.TensorMetadata outputs = 5",
        ),
        "ModelMetadataResponse.TensorMetadata": ("string name = 1", "string datatype = 2", "repeated int64 shape = 3"),
        "ModelInferRequest": (
            "string model_name = 1",
            "string model_version = 2",
            "string id = 3",
            "repeated ModelInferRequest.InferInputTensor inputs = 5",
            "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6",
            "repeated bytes raw_input_contents = 7",
        ),
        "ModelInferRequest.InferInputTensor": (
            "string name = 1",
            "string datatype = 2",
            "repeated int64 shape = 3",
            "InferTensorContents contents = 5",
        ),
        "ModelInferRequest.InferRequestedOutputTensor": ("string name = 1",),
        "ModelInferResponse": (
            "string model_name = 1",
            "string model_version = 2",
            "string id = 3",
            "repeated ModelInferResponse.InferOutputTensor outputs = 5",
            "repeated bytes raw_output_contents = 6",
        ),
        "ModelInferResponse.InferOutputTensor": ("string name = 1", "string datatype = 2", "repeated int64 shape = 3"),
        "InferTensorContents": ("repeated uint32 uint_contents = 4", "repeated bytes bytes_contents = 8"),
    }
)
"""Fields of each message, as a .proto file writes them. A name with a dot is a nested message, after the message that contains it."""


def _message_classes() -> Iterator[tuple[str, type[Any]]]:
    """Yield (name, class) of each message. The pool is separate: Triton's client declares the same names in protobuf's default pool."""
    file = FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    declared: dict[str, DescriptorProto] = {}
    for name, fields in FIELDS.items():
        outer, _, inner = name.rpartition(".")
        messages = declared[outer].nested_type if outer else file.message_type
        declared[name] = messages.add(name=inner)
        declared[name].field.extend(map(_field, fields))
    pool = DescriptorPool()
    pool.Add(file)
    for name in FIELDS:
        yield name, GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def _field(line: str) -> FieldDescriptorProto:
    """Return the descriptor of a field, such as `repeated int64 shape = 3`."""
    *labels, kind, name, _, number = line.split()
    label = FieldDescriptorProto.LABEL_REPEATED if labels else FieldDescriptorProto.LABEL_OPTIONAL
    field = FieldDescriptorProto(name=name, number=int(number), label=label)
    if kind in FIELDS:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    return field


MESSAGES: Mapping[str, type[Any]] = MappingProxyType(dict(_message_classes()))
"""The class of each message by its name."""
