"""Build a classifier with fresh weights from the plain values that bundles and recorded batches store. Downloads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from refract.models.classifier import Classifier
from refract.models.modalities import NO_IMAGES
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import TextSpec
from refract.models.registry import build


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
    """Build a classifier with fresh weights.

    network: {"name", "image_size": [height, width], "args"}; text: see `text_record`, None for a classifier of images alone; files: those
    of the tokenizer, name → bytes. ValueError or TypeError for values from which no classifier can be built.
    """
    height, width = network["image_size"]
    size, args = (height, width), dict(network["args"])
    normalisation: dict[str, Any] = {"mean": mean, "std": std, "normalize": normalize, "image_size": size}
    if text is None:
        return Classifier(build(network["name"], num_classes, image_size=size, weights="none", **args), **normalisation)
    fusion_args = dict(text)
    spec = TextSpec(**{item.name: fusion_args.pop(item.name) for item in fields(TextSpec)})
    head = args.pop("head", "linear")
    images = None
    if network["name"] != NO_IMAGES:
        images = build(network["name"], num_classes, image_size=size, weights="none", **args)
    reader = Reader(images, spec.network(), num_classes, head=head, **fusion_args)
    return Classifier(reader, tokens=spec.tokens(files or {}), **normalisation)


def text_record(spec: TextSpec, fusion_args: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the text encoder's spec to plain values. fusion_args: `fusion` and `width` of `refract.models.multimodal.fusion.Reader`."""
    return {item.name: _plain(getattr(spec, item.name)) for item in fields(TextSpec)} | dict(fusion_args)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
