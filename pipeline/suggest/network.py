"""Choose the network of a first config, its initial weights and its input size."""

from dataclasses import dataclass, field
from typing import Any

from refract.models.pretrained.packages import INSTALL
from refract.pipeline.config.config import ConfigError
from refract.pipeline.suggest.backbones import choose_backbone
from refract.pipeline.suggest.start import Start
from refract.pipeline.suggest.survey import LEAST_ENLARGED, Survey

ENLARGED = 128
"""Side in pixels to which small images are enlarged for a pretrained network."""

FEW_SMALL = 5_000
"""Training images up to which small images are enlarged for a pretrained network."""


@dataclass(frozen=True)
class ProposedNetwork:
    """The proposed network.

    size: side of the input in pixels; size_reason: reason for the size; args, head: values of `model.args` and `model.head`.
    """

    name: str
    reason: str
    weights: str
    weights_reason: str
    size: int
    size_reason: str
    args: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"

    @property
    def pretrained(self) -> bool:
        """Whether training starts from pretrained weights."""
        return self.weights != "none"


def choose_network(survey: Survey) -> ProposedNetwork:
    """Return the best network for the data, with pretrained weights if they help and this machine has them."""
    if not survey.images:
        return ProposedNetwork("none", "no images: only texts", "none", "", 0, "")
    backbone = choose_backbone(survey.backbones, gpu=survey.device == "cuda", few=survey.few)
    if backbone is not None and gains_from_weights(survey):
        whole = survey.side >= backbone.trained_at // 2
        size = backbone.fixed_size or (backbone.trained_at if whole else ENLARGED)
        return ProposedNetwork(
            backbone.name, backbone.reason, "default", "pretrained weights are on this machine: no download",
            size, _sized(survey, size, trained_at=backbone.trained_at),
        )  # fmt: skip
    size = _scratch_size(survey)
    if survey.small:
        return ProposedNetwork(
            "resnet20", f"a residual network for images of about {size} px",
            "none", "a network this small is trained from scratch", size, _sized(survey, size),
        )  # fmt: skip
    glyphs = "strokes on a plain ground gain little from the weights of photos"
    return ProposedNetwork(
        "resnet18", "the smallest residual network for images of this size",
        "none", glyphs if survey.content.glyphs else "no pretrained weights are on this machine", size, _sized(survey, size),
    )  # fmt: skip


def named_network(survey: Survey, start: Start) -> ProposedNetwork:
    """Return the network that the user names. ConfigError if the data has no images."""
    if not survey.images:
        raise ConfigError(f"--model.name: {start.name} reads images, and {survey.source} has none; remove the option")
    pretrained = start.weights != "none"
    size = start.size if pretrained and start.size else _scratch_size(survey)
    if pretrained and not start.fixed and survey.side < size // 2:
        size = max(min(size, ENLARGED), survey.side // 32 * 32)
    return ProposedNetwork(
        start.name, "the network of the weights" if start.is_in_weights else "named by --model.name", start.weights,
        "named by --model.weights" if pretrained else "no weights are named",
        size, _sized(survey, size, trained_at=start.size if pretrained else 0), start.args, start.head,
    )  # fmt: skip


def missing_weights_notes(survey: Survey, network: ProposedNetwork) -> list[str]:
    """Return how to get pretrained weights, if the proposal starts from scratch because this machine has none."""
    if network.pretrained or survey.backbones or not gains_from_weights(survey):
        return []
    return [
        f"note: training starts from scratch, as no pretrained weights are on this machine; for {survey.training:,} training images "
        f"they are better: {INSTALL}, then run init again with --force",
        f"note: other weights: refract init {survey.source} --model.name resnet18 --model.weights FILE (.safetensors or .pth), or "
        "--model.weights default, which training downloads",
    ]


def gains_from_weights(survey: Survey) -> bool:
    """Return whether ImageNet weights are expected to help."""
    if not survey.images or survey.content.glyphs or survey.side < LEAST_ENLARGED:
        return False
    return not survey.small or survey.training <= FEW_SMALL


def _scratch_size(survey: Survey) -> int:
    """Return the input side in pixels of a network with random weights."""
    if survey.small:
        return 32 if survey.side <= 40 else 48
    return 128 if survey.side >= 128 else max(64, survey.side // 32 * 32)


def _sized(survey: Survey, size: int, *, trained_at: int = 0) -> str:
    """Return the reason for the input side `size`. trained_at: side of the images that the weights were trained on, 0 without weights."""
    median = f"median shorter side {survey.side} px"
    if size == trained_at:
        return f"{median}; the size that the weights were trained at"
    if trained_at and survey.side < size:
        return f"{median}; small images are enlarged for the pretrained network"
    if survey.side >= 2 * size:
        return f"{median}, reduced for speed: {(survey.side / size) ** 2:.0f} times fewer pixels"
    return median
