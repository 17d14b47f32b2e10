"""A classifier with fresh weights from plain values, as bundles and kept batches store them. Downloads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from refract.models.classifier import Classifier
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import TextPart
from refract.models.registry import build

NO_IMAGES = "none"
"""The name of the network of images where there is none."""


def make_classifier(
    network: Mapping[str, Any],
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    normalize: str = "channel",
    text: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Classifier:
    """network: name, image_size [height, width], args; text: see `text_record`, None where no texts are read; files: of the tokenizer.
    ValueError or TypeError for values that build none."""
    height, width = network["image_size"]
    size, args = (height, width), dict(network["args"])
    own: dict[str, Any] = {"mean": mean, "std": std, "normalize": normalize, "image_size": size}
    if text is None:
        return Classifier(build(network["name"], num_classes, image_size=size, weights="none", **args), **own)
    plain = dict(text)
    part = TextPart(**{item.name: plain.pop(item.name) for item in fields(TextPart)})
    head = args.pop("head", "linear")
    images = None
    if network["name"] != NO_IMAGES:
        images = build(network["name"], num_classes, image_size=size, weights="none", **args)
    reader = Reader(images, part.network(), num_classes, head=head, **plain)
    return Classifier(reader, tokens=part.tokens(files or {}), **own)


def text_record(part: TextPart, reading: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of what reads texts. reading: `fusion` and `width`, of `refract.models.multimodal.fusion.Reader`."""
    return {item.name: _plain(getattr(part, item.name)) for item in fields(TextPart)} | dict(reading)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
