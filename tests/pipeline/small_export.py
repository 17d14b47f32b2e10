"""Bundles whose predictions differ between images, and clients that open their exports without Refract."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_data import COLORS, make_image

from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier, probabilities
from refract.models.registry import build
from refract.pipeline.export.targets import TARGETS

EXTRAS = {"onnx": "onnxruntime", "openvino": "openvino", "triton": "onnxruntime", "web": "onnxruntime"}
INSTALLED = [name for name in TARGETS if importlib.util.find_spec(EXTRAS.get(name, "torch"))]
needs_onnx = pytest.mark.skipif(
    "onnx" not in INSTALLED, reason="needs the extra onnx: ONNX Runtime quantises for every target"
)
TEMPERATURE = 0.3
LABELS = tuple(COLORS)


def encoded(label: str, number: int) -> bytes:
    return cv2.imencode(".png", make_image(label, number, 40)[:, :, ::-1])[1].tobytes()


def make_bundle(path: Path, network: str, *, size=(32, 40), task="multiclass", normalize="channel", **more) -> Bundle:
    """Save a bundle whose logits differ between the images, as those of a trained network: a head of larger weights."""
    torch.manual_seed(0)
    labels = LABELS[:2] if task == "binary" else LABELS
    net = build(network, len(labels), image_size=size, **more.get("args", {}))
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:]:
            parameter.mul_(10)
    preprocess = Preprocess(*size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), normalize=normalize)
    arrays = {"image_size": size, "mean_image": torch.rand(3, *size)} if normalize == "mean_image" else {}
    classifier = Classifier(net, mean=preprocess.mean, std=preprocess.std, normalize=normalize, **arrays).eval()
    goldens = []
    for number, label in enumerate([*COLORS, *COLORS]):
        data = encoded(label, number)
        images = torch.from_numpy(preprocess(data)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            row = probabilities(classifier(images), task=task, temperature=TEMPERATURE)[0]
        goldens.append(GoldenSample(f"{number:02}.png", data, tuple(map(float, row))))
    info = BundleInfo(
        name="colours",
        task=task,
        labels=labels,
        network={"name": network, "image_size": list(size), "args": more.get("args", {})},
        preprocess=preprocess.to_dict(),
        temperature=TEMPERATURE,
        thresholds=(0.4, 0.5, 0.6) if task == "multilabel" else (),
        metrics={"accuracy": 0.9},
        created="2026-01-01T00:00:00+00:00",
    )
    return load_bundle(save_bundle(path, info, classifier, goldens[: more.get("goldens", 6)]))


def names_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def batch_of(bundle: Bundle) -> np.ndarray:
    preprocess = Preprocess.from_dict(bundle.info.preprocess)
    return np.stack([preprocess(golden.data) for golden in bundle.golden_samples])


def stored(bundle: Bundle) -> np.ndarray:
    return np.array([golden.probabilities for golden in bundle.golden_samples], np.float32)


def client_onnx(folder: Path, images: np.ndarray) -> tuple[np.ndarray, Mapping[str, str]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(item.name, item.type, item.shape[1:]) for item in session.get_inputs()] == [
        ("images", "tensor(uint8)", [*images.shape[1:]])
    ]
    return session.run(["probabilities"], {"images": images})[0], session.get_modelmeta().custom_metadata_map


def client_openvino(folder: Path, images: np.ndarray) -> tuple[np.ndarray, Mapping[str, str]]:
    import openvino

    model = openvino.Core().read_model(folder / "model.xml")
    assert model.input("images").element_type == openvino.Type.u8 and model.input("images").partial_shape[0].is_dynamic
    given = {name: model.get_rt_info(["refract", name]).astype(str) for name in ("labels", "temperature", "task")}
    # As documented: the default is bfloat16 on processors that support it.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(model, "CPU", settings)({"images": images})["probabilities"], given


def client_torch(folder: Path, images: np.ndarray) -> tuple[np.ndarray, Mapping[str, str]]:
    extra = {"metadata.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra)
    return program.module()(torch.from_numpy(images))[0].detach().numpy(), json.loads(extra["metadata.json"])


def client_triton(folder: Path, images: np.ndarray) -> tuple[np.ndarray, Mapping[str, str]]:
    """As Triton's backend: the model and its labels are found by the configuration."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    model = folder / json.loads((folder / "preprocess.json").read_text())["model"]
    repository = model.parent.parent
    config = text_format.Parse((repository / "config.pbtxt").read_text("utf-8"), ModelConfig())
    assert (config.name, config.backend) == (repository.name, "onnxruntime")
    labelled = next(output for output in config.output if output.label_filename)
    labels = (repository / labelled.label_filename).read_text("utf-8").split("\n")
    got, metadata = client_onnx(model.parent, images)
    assert labels[:-1] == json.loads(metadata["labels"]) and labelled.dims == [got.shape[1]]
    return got, metadata


CLIENTS: Mapping[str, Callable] = {
    "onnx": client_onnx,
    "openvino": client_openvino,
    "torch-export": client_torch,
    "triton": client_triton,
}
PIXEL_TARGETS = [name for name in CLIENTS if name in INSTALLED]
