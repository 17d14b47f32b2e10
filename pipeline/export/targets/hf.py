"""`--to hf`: a folder for the Hugging Face Hub, which timm loads: config.json, model.safetensors and the model card README.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from refract.models.bundle.bundle import Bundle
from refract.models.classifier import probabilities
from refract.models.pretrained.catalogues import Timm
from refract.models.registry import locate
from refract.pipeline.export.card import model_card
from refract.pipeline.export.target import Job, Run, Target
from refract.pipeline.export.targets import TARGETS

MODEL = "model.safetensors"
INPUT = {"name": "x", "dtype": "float32", "layout": "NCHW", "color": "RGB", "normalised": "(pixels / 255 - mean) / std"}


def unfit(bundle: Bundle) -> str | None:
    """Return why timm cannot load the bundle's network, None if it can."""
    info, others = bundle.info, f"use --to {', '.join(name for name in TARGETS if name != 'hf')}"
    if locate(info.network["name"])[0] != "timm":
        return f"the network {info.network['name']} is not one of timm's; {others}"
    if (head := info.network["args"].get("head", "linear")) != "linear":
        return f"timm builds no head {head}; {others}"
    if info.preprocess.get("normalize", "channel") != "channel":
        return f"timm cannot normalise by {info.preprocess['normalize']}; {others}"
    return None


def write(job: Job, folder: Path) -> None:
    """Write timm's weights, its config and a model card."""
    network, info = job.network.classifier.network, job.bundle.info
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    (folder / MODEL).write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))
    config = json.dumps(_config(network, job.bundle), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(config, "utf-8")
    (folder / "README.md").write_text(model_card(info, job.bundle.digest), "utf-8")


def _config(network: torch.nn.Module, bundle: Bundle) -> dict[str, Any]:
    info = bundle.info
    preprocess, given = info.preprocess, dict(network.pretrained_cfg)  # type: ignore[arg-type]
    height, width = info.network["image_size"]
    args = {key: value for key, value in info.network["args"].items() if key != "head"}
    sized = Timm().sized(locate(info.network["name"])[1], (height, width))
    layer_settings = {
        key: given[key] for key in ("first_conv", "classifier", "fixed_input_size") if given.get(key) is not None
    }
    return {
        "architecture": given["architecture"],
        "num_classes": len(info.labels),
        "num_features": network.num_features,
        "label_names": list(info.labels),
        "model_args": {**sized, **args},
        "pretrained_cfg": {
            **layer_settings,
            "tag": "refract",
            "custom_load": False,
            "num_classes": len(info.labels),
            "input_size": [3, height, width],
            "pool_size": None,
            "interpolation": "bilinear",
            "crop_pct": preprocess.get("crop_ratio", 1.0) if preprocess.get("resize") != "squash" else 1.0,
            "crop_mode": "squash" if preprocess.get("resize") == "squash" else "center",
            "mean": list(preprocess["mean"]),
            "std": list(preprocess["std"]),
        },
    }


def run(folder: Path, description: Mapping[str, Any]) -> Run:
    """Load the folder with timm, and normalise as its config says."""
    import timm

    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    given: Any = network.pretrained_cfg
    mean, std = (torch.tensor(given[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    options = {"task": description["task"], "temperature": description["temperature"]}

    def compute(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits = network((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
            return probabilities(logits, **options).numpy(), logits.numpy()

    return compute


TARGET = Target("hf", write, run, MODEL, INPUT, unfit=unfit)
