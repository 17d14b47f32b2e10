"""Choose the augmentation policy for the images."""

from dataclasses import dataclass
from typing import Any

from refract.pipeline.suggest.label_names import are_signs, exchanged_by_flip
from refract.pipeline.suggest.survey import Survey

MANY = 50_000
"""Number of training images from which training from scratch uses the stronger crops and colours of the preset `imagenet`."""


@dataclass(frozen=True)
class PolicyChoice:
    """A chosen policy. policy: value of `augment.policy`; reason: a sentence; crops: whether it crops the image."""

    policy: str | list[Any]
    reason: str
    crops: bool


def choose_policy(survey: Survey, *, pretrained: bool) -> PolicyChoice:
    """Return the policy for the data. pretrained: whether training starts from pretrained weights."""
    if not survey.images:
        return PolicyChoice("none", "texts: [{WordSwap: {p: 0.3}}] is an example of a text policy", crops=False)
    content = survey.content
    if survey.small and content.glyphs and are_signs(survey.labels):
        return PolicyChoice(
            "digits", "small grey signs, such as digits: no flips, as a flipped sign is a different sign", crops=False
        )
    if content.grey and not survey.small:
        return PolicyChoice("medical-safe", "grey images, such as scans: no colour ops, flips or crops", crops=False)
    name, reason = _with_flips(survey, pretrained=pretrained)
    obstacle = _why_no_flips(survey)
    if obstacle:
        return PolicyChoice(
            _without_flips(name), f"the preset {name} without its flip: {obstacle}", crops=not survey.small
        )
    return PolicyChoice(name, f"{reason}; flips show no change of class", crops=not survey.small)


def _with_flips(survey: Survey, *, pretrained: bool) -> tuple[str, str]:
    """Return (preset, reason), ignoring that flips may change the class."""
    if survey.small:
        return "cifar", "small images: shifts, flips, a patch cut out, no colour ops"
    if survey.training >= MANY and not pretrained:
        return "imagenet", f"{MANY:,} images or more from scratch: strong crops, flips, colours"
    return "fine-tune", "colour photos: mild crops, flips, light, no change of hue"


def _why_no_flips(survey: Survey) -> str:
    by_name, by_pixels = exchanged_by_flip(survey.labels), survey.content.swapped
    if by_name:
        return f"the labels {by_name[0]} and {by_name[1]} differ by left and right"
    if by_pixels:
        return f"flipped images of {by_pixels[0]} look like {by_pixels[1]}"
    return ""


def _without_flips(preset: str) -> list[Any]:
    from importlib import resources

    from refract.augment.yaml_text import read_yaml

    text = resources.files("refract.augment").joinpath("presets", f"{preset}.yaml").read_text("utf-8")
    return [op for op in read_yaml(text) if "HorizontalFlip" not in op]
