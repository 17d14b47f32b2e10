"""The content of `preprocess.json`: everything that a client needs in addition to the network."""

from importlib.metadata import version
from typing import Any

from refract.models.bundle.bundle import Bundle
from refract.pipeline.export.target import Target
from refract.pipeline.export.triton import repository_name

FORMAT_VERSION = 1


def description_of(bundle: Bundle, target: Target) -> dict[str, Any]:
    """Describe the bundle for the clients of an export, in plain JSON values."""
    info = bundle.info
    height, width = info.network["image_size"]
    shape = [None, height, width, 3] if target.input["layout"] == "NHWC" else [None, 3, height, width]
    # A bundle from before color profiles lacks the field, and ignores them.
    preprocess = {
        "resize": "crop",
        "crop_ratio": 0.875,
        "normalize": "channel",
        "color_profile": "ignore",
    } | info.preprocess
    return {
        "format_version": FORMAT_VERSION,
        "target": target.name,
        "model": target.model.format(name=repository_name(info.name)),
        "name": info.name,
        "task": info.task,
        "labels": list(info.labels),
        "thresholds": list(info.thresholds),
        "temperature": info.temperature,
        "abstain_below": info.abstain_below,
        "hierarchy": info.hierarchy,
        "input": {**target.input, "shape": shape},
        "outputs": ["probabilities", "logits"] if target.input["layout"] == "NHWC" else ["logits"],
        "preprocess": preprocess,
        "network": info.network,
        "bundle": bundle.digest,
        "created_by": f"refract {version('refract')}",
    }
