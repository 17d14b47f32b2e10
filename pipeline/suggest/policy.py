"""Which augmentation fits the images."""

from dataclasses import dataclass
from typing import Any

from refract.pipeline.suggest.label_names import are_signs, exchanged_by_flip
from refract.pipeline.suggest.survey import Survey

MANY = 50_000
"""Training images from which training from scratch needs the stronger crops and colours of the preset `imagenet`."""


@dataclass(frozen=True)
class PolicyChoice:
    """policy: as `augment.policy` takes it; reason: a sentence; crops: whether it cuts parts out of the image."""

    policy: str | list[Any]
    reason: str
    crops: bool


def choose_policy(survey: Survey, *, pretrained: bool) -> PolicyChoice:
    """pretrained: whether training starts from pretrained weights."""
    if not survey.images:
        return PolicyChoice("none", "texts: [{WordSwap: {p: 0.3}}] is one policy that changes them", crops=False)
    content = survey.content
    if survey.small and content.glyphs and are_signs(survey.labels):
        return PolicyChoice(
            "digits", "small grey strokes with names of signs: no flips, a flipped sign is another one", crops=False
        )
    if content.grey and not survey.small:
        return PolicyChoice("medical-safe", "grey images, such as scans: no colour ops, flips or crops", crops=False)
    name, reason = _with_flips(survey, pretrained=pretrained)
    why_not = _why_no_flips(survey)
    if why_not:
        return PolicyChoice(
            _without_flips(name), f"the preset {name} without its flip: {why_not}", crops=not survey.small
        )
    return PolicyChoice(name, f"{reason}; no sign that left and right matter", crops=not survey.small)


def _with_flips(survey: Survey, *, pretrained: bool) -> tuple[str, str]:
    """(preset, reason)"""
    if survey.small:
        return "cifar", "small images: shifts, flips, a patch cut out, no colour ops"
    if survey.training >= MANY and not pretrained:
        return "imagenet", f"{MANY:,} images or more from scratch: strong crops, flips, colours"
    return "fine-tune", "colour photos: mild crops, flips, light, no change of hue"


def _why_no_flips(survey: Survey) -> str:
    named, seen = exchanged_by_flip(survey.labels), survey.content.swapped
    if named:
        return f"the labels {named[0]} and {named[1]} differ by left and right"
    if seen:
        return f"flipped images of {seen[0]} look like {seen[1]}"
    return ""


def _without_flips(preset: str) -> list[Any]:
    from importlib import resources

    from refract.augment.yaml_text import read_yaml

    text = resources.files("refract.augment").joinpath("presets", f"{preset}.yaml").read_text("utf-8")
    return [op for op in read_yaml(text) if "HorizontalFlip" not in op]
