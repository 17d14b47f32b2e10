"""Published policies as ops: each draws ops from a table of its paper and adds them to the plan.

Strengths follow the papers' scales and torchvision's classes of the same names; AugMix follows its authors' code. Deviations of all:

- Shears are about the image's centre, not its top left corner.
- Consecutive geometric and colour ops fuse to one pass.
- After a crop, the surrounding pixels of the source image fill the border where they exist.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from refract.augment.ops.base import Args, Op, Size, below, between, choice, color, number, whole
from refract.augment.ops.pixel import BlendOp
from refract.augment.plan import Step

Builder = Callable[[float, Size], tuple[str, Args] | None]


def _shear(axis: str) -> Builder:
    return lambda level, size: ("Shear", {axis: math.degrees(math.atan(level))})


def _shift(axis: int) -> Builder:
    def build(level: float, size: Size) -> tuple[str, Args]:
        shift = [0.0, 0.0]
        shift[axis] = math.trunc(level) / size[axis]  # whole pixels, as torchvision and the papers' code
        return "Translate", {"shift": shift}

    return build


# Functions from a signed strength, in the unit of the paper's scale, to a step.
_BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "Identity": lambda level, size: None,
        "ShearX": _shear("shear"),
        "ShearY": _shear("shear_y"),
        "TranslateX": _shift(1),
        "TranslateY": _shift(0),
        "Rotate": lambda level, size: ("Rotate", {"angle": level}),
        "Brightness": lambda level, size: ("Brightness", {"factor": max(0.0, 1 + level)}),
        "Color": lambda level, size: ("Saturation", {"factor": max(0.0, 1 + level)}),
        "Contrast": lambda level, size: ("Contrast", {"factor": max(0.0, 1 + level)}),
        "Sharpness": lambda level, size: ("Sharpen", {"factor": max(0.0, 1 + level)}),
        "Posterize": lambda level, size: ("Posterize", {"bits": round(level)}),
        "Solarize": lambda level, size: ("Solarize", {"threshold": math.ceil(level)}),
        "AutoContrast": lambda level, size: ("AutoContrast", {}),
        "Equalize": lambda level, size: ("Equalize", {}),
        "Invert": lambda level, size: ("Invert", {}),
    }
)
_SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


Scale = Mapping[str, tuple[float, float]]
"""The weakest and the strongest strength of each op."""


def _strength(scale: Scale, name: str, level: float, highest: int) -> float:
    """Return the strength at `level`, in 0 … `highest`."""
    low, high = scale.get(name, (0, 0))
    return low + (high - low) * level / highest


@dataclass(frozen=True, kw_only=True)
class AutoOp(Op):
    """fill: grey level or RGB in 0…255, the colour beyond the image's edge."""

    kind: ClassVar[str] = "composition"
    fill: int | tuple[int, int, int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("fill", color("fill", self.fill))

    def _step(self, name: str, level: float, rng: np.random.Generator, size: Size) -> list[Step]:
        signed = -level if name in _SIGNED and rng.random() < 0.5 else level
        op_and_args = _BUILDERS[name](signed, size)
        if op_and_args is None:
            return []
        op, args = op_and_args
        outside = {"border": "constant", "fill": list(self.fill)} if name in _GEOMETRIC else {}  # type: ignore[arg-type]
        return [Step(op, {**args, **outside})]


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentWide(AutoOp):
    """Apply one of fourteen ops (one of them the identity) at one of 31 strengths, all equally likely.

    Source: Müller & Hutter 2021, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", arXiv:2103.10158, table 5 (wide).
    """

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        name = list(_TRIVIAL)[below(rng, len(_TRIVIAL))]
        return self._step(name, _strength(_TRIVIAL, name, below(rng, 31), 30), rng, size)


_TRIVIAL = {
    "Identity": (0, 0),
    "ShearX": (0, 0.99),
    "ShearY": (0, 0.99),
    "TranslateX": (0, 32),
    "TranslateY": (0, 32),
    "Rotate": (0, 135),
    "Brightness": (0, 0.99),
    "Color": (0, 0.99),
    "Contrast": (0, 0.99),
    "Sharpness": (0, 0.99),
    "Posterize": (8, 2),
    "Solarize": (255, 0),
    "AutoContrast": (0, 0),
    "Equalize": (0, 0),
}


@dataclass(frozen=True, kw_only=True)
class RandAugment(AutoOp):
    """Apply `ops` of fourteen ops, drawn with replacement, all at one strength.

    ops: number of ops, at least 1. magnitude: strength in [0, 30]. jitter: standard deviation of normal noise on the magnitude, at least 0
    (timm's `mstd`; 0 in the paper).
    Source: Cubuk et al. 2020, "RandAugment: practical automated data augmentation", arXiv:1909.13719, section 3.
    """

    ops: int = 2
    magnitude: float = 9.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("ops", whole("ops", self.ops, 1))
        self._set("magnitude", number("magnitude", self.magnitude, 0, 30))
        self._set("jitter", number("jitter", self.jitter, 0, 30))

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        steps: list[Step] = []
        for _ in range(self.ops):
            name = list(_RAND)[below(rng, len(_RAND))]
            noise = self.jitter * float(rng.standard_normal()) if self.jitter else 0.0
            magnitude = min(max(self.magnitude + noise, 0.0), 30.0)
            steps += self._step(name, _rand_strength(name, magnitude, 30, size), rng, size)
        return steps


_RAND = {
    "Identity": (0, 0),
    "ShearX": (0, 0.3),
    "ShearY": (0, 0.3),
    "TranslateX": (0, 150 / 331),  # a fraction of the side
    "TranslateY": (0, 150 / 331),
    "Rotate": (0, 30),
    "Brightness": (0, 0.9),
    "Color": (0, 0.9),
    "Contrast": (0, 0.9),
    "Sharpness": (0, 0.9),
    "Posterize": (8, 4),
    "Solarize": (255, 0),
    "AutoContrast": (0, 0),
    "Equalize": (0, 0),
}


def _rand_strength(name: str, level: float, highest: int, size: Size) -> float:
    strength = _strength(_RAND, name, level, highest)
    return strength * size[1 if name == "TranslateX" else 0] if name.startswith("Translate") else strength


@dataclass(frozen=True, kw_only=True)
class AutoAugment(AutoOp):
    """Apply one of 25 pairs of ops found by a search on a data set. Each op has its probability and strength.

    policy: `imagenet`, `cifar10` or `svhn`, the data set of the search.
    Source: Cubuk et al. 2019, "AutoAugment: learning augmentation policies from data", arXiv:1805.09501, tables 7 to 9 of the appendix.
    """

    policy: str = "imagenet"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("policy", choice("policy", self.policy, tuple(_AUTO)))

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        pairs = _AUTO[self.policy]
        steps: list[Step] = []
        for name, probability, level in pairs[below(rng, len(pairs))]:
            if rng.random() < probability:
                steps += self._step(name, _rand_strength(name, level, 9, size), rng, size)
        return steps


def _pairs(text: str) -> tuple[tuple[tuple[str, float, int], ...], ...]:
    """Parse lines of `Op probability·10 level, Op probability·10 level`."""
    rows = []
    for line in text.strip().splitlines():
        ops = [entry.split() for entry in line.split(",")]
        rows.append(tuple((name, int(tenths) / 10, int(level)) for name, tenths, level in ops))
    return tuple(rows)


_AUTO: Mapping[str, Sequence[Sequence[tuple[str, float, int]]]] = MappingProxyType(
    {
        "imagenet": _pairs("""
            Posterize 4 8, Rotate 6 9
            Solarize 6 5, AutoContrast 6 0
            Equalize 8 0, Equalize 6 0
            Posterize 6 7, Posterize 6 6
            Equalize 4 0, Solarize 2 4
            Equalize 4 0, Rotate 8 8
            Solarize 6 3, Equalize 6 0
            Posterize 8 5, Equalize 10 0
            Rotate 2 3, Solarize 6 8
            Equalize 6 0, Posterize 4 6
            Rotate 8 8, Color 4 0
            Rotate 4 9, Equalize 6 0
            Equalize 0 0, Equalize 8 0
            Invert 6 0, Equalize 10 0
            Color 6 4, Contrast 10 8
            Rotate 8 8, Color 10 2
            Color 8 8, Solarize 8 7
            Sharpness 4 7, Invert 6 0
            ShearX 6 5, Equalize 10 0
            Color 4 0, Equalize 6 0
            Equalize 4 0, Solarize 2 4
            Solarize 6 5, AutoContrast 6 0
            Invert 6 0, Equalize 10 0
            Color 6 4, Contrast 10 8
            Equalize 8 0, Equalize 6 0
        """),
        "cifar10": _pairs("""
            Invert 1 0, Contrast 2 6
            Rotate 7 2, TranslateX 3 9
            Sharpness 8 1, Sharpness 9 3
            ShearY 5 8, TranslateY 7 9
            AutoContrast 5 0, Equalize 9 0
            ShearY 2 7, Posterize 3 7
            Color 4 3, Brightness 6 7
            Sharpness 3 9, Brightness 7 9
            Equalize 6 0, Equalize 5 0
            Contrast 6 7, Sharpness 6 5
            Color 7 7, TranslateX 5 8
            Equalize 3 0, AutoContrast 4 0
            TranslateY 4 3, Sharpness 2 6
            Brightness 9 6, Color 2 8
            Solarize 5 2, Invert 0 0
            Equalize 2 0, AutoContrast 6 0
            Equalize 2 0, Equalize 6 0
            Color 9 9, Equalize 6 0
            AutoContrast 8 0, Solarize 2 8
            Brightness 1 3, Color 7 0
            Solarize 4 5, AutoContrast 9 0
            TranslateY 9 9, TranslateY 7 9
            AutoContrast 9 0, Solarize 8 3
            Equalize 8 0, Invert 1 0
            TranslateY 7 9, AutoContrast 9 0
        """),
        "svhn": _pairs("""
            ShearX 9 4, Invert 2 0
            ShearY 9 8, Invert 7 0
            Equalize 6 0, Solarize 6 6
            Invert 9 0, Equalize 6 0
            Equalize 6 0, Rotate 9 3
            ShearX 9 4, AutoContrast 8 0
            ShearY 9 8, Invert 4 0
            ShearY 9 5, Solarize 2 6
            Invert 9 0, AutoContrast 8 0
            Equalize 6 0, Rotate 9 3
            ShearX 9 4, Solarize 3 3
            ShearY 8 8, Invert 7 0
            Equalize 9 0, TranslateY 6 6
            Invert 9 0, Equalize 6 0
            Contrast 3 3, Rotate 8 4
            Invert 8 0, TranslateY 0 2
            ShearY 7 6, Solarize 4 8
            Invert 6 0, Rotate 8 4
            ShearY 3 7, TranslateX 9 3
            ShearX 1 6, Invert 6 0
            Solarize 7 2, TranslateY 6 7
            ShearY 8 4, Invert 8 0
            ShearX 7 9, TranslateY 8 3
            ShearY 8 5, AutoContrast 7 0
            ShearX 7 2, Invert 1 0
        """),
    }
)


@dataclass(frozen=True, kw_only=True)
class ThreeAugment(Op):
    """Apply one of Grayscale, Solarize and GaussianBlur, equally likely.

    Source: Touvron et al. 2022, "DeiT III: revenge of the ViT", arXiv:2204.07118, section 3.2. The paper combines it with a flip and a
    ColorJitter of 0.3.
    """

    kind: ClassVar[str] = "composition"

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        drawn = below(rng, 3)
        if drawn == 2:
            return [Step("GaussianBlur", {"sigma": between(rng, (0.1, 2.0))})]
        return [Step("Grayscale", {}) if drawn == 0 else Step("Solarize", {"threshold": 128})]


@dataclass(frozen=True, kw_only=True)
class AugMix(BlendOp):
    """Blend the image with a weighted sum of chains of ops: m · image + (1 − m) · Σ wᵢ · chainᵢ(image).

    severity: in [0, 10]; each op draws its strength from [0.1, severity]. width: number of chains. depth: ops in a chain; 0 draws 1 to 3.
    alpha: parameter of the Dirichlet distribution of the weights w and of the Beta distribution of m; positive. fill: grey level or RGB
    in 0…255, the colour beyond the image's edge.
    Source: Hendrycks et al. 2020, "AugMix", arXiv:1912.02781, algorithm 1. Deviation: the blend precedes
    normalisation, which is linear.
    """

    former: ClassVar[Mapping[str, str]] = MappingProxyType({"share": "original_weight"})
    severity: float = 3.0
    width: int = 3
    depth: int = 0
    alpha: float = 1.0
    fill: int | tuple[int, int, int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("severity", number("severity", self.severity, 0, 10))
        self._set("width", whole("width", self.width, 1))
        self._set("depth", whole("depth", self.depth, 0))
        if number("alpha", self.alpha, 0, 1e6) == 0:
            raise ValueError("alpha: 0 is not positive; accepted: (0, 1e6]")
        self._set("fill", color("fill", self.fill))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        weights = rng.dirichlet([self.alpha] * self.width).tolist()
        original_weight = float(rng.beta(self.alpha, self.alpha))
        chains = []
        for _ in range(self.width):
            length = self.depth or 1 + below(rng, 3)
            steps = [step for _ in range(length) for step in self._chain_step(rng, size)]
            chains.append([{"op": step.op, **step.args} for step in steps])
        return {"original_weight": original_weight, "weights": weights, "chains": chains}

    def _chain_step(self, rng: np.random.Generator, size: Size) -> list[Step]:
        name = _MIX[below(rng, len(_MIX))]
        fraction = between(rng, (0.1, max(self.severity, 0.1))) / 10
        return AutoOp(fill=self.fill)._step(name, _mix_strength(name, fraction, size), rng, size)

    @staticmethod
    def chains(args: Args) -> tuple[float, list[tuple[float, tuple[Step, ...]]]]:
        drawn = [tuple(Step(entry["op"], {k: v for k, v in entry.items() if k != "op"}) for entry in chain)
                 for chain in args["chains"]]  # fmt: skip
        weights = [(1 - args["original_weight"]) * weight for weight in args["weights"]]
        return args["original_weight"], list(zip(weights, drawn, strict=True))


def _mix_strength(name: str, fraction: float, size: Size) -> float:
    """Return the strength at a fraction of the highest severity, truncated to whole degrees, bits, grey levels and pixels.

    The authors' code truncates in the same way.
    """
    if name.startswith("Shear"):
        return 0.3 * fraction
    if name.startswith("Translate"):
        return int(size[1 if name == "TranslateX" else 0] / 3 * fraction)
    strengths = {
        "Rotate": int(30 * fraction),
        "Posterize": max(1, 4 - int(4 * fraction)),  # Pillow's Posterize keeps at least one bit
        "Solarize": 256 - int(256 * fraction),
    }
    return strengths.get(name, 0)


# As the paper: the ops that overlap with the corruptions of ImageNet-C are excluded.
_MIX = (
    "AutoContrast", "Equalize", "Posterize", "Rotate", "Solarize", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip

PUBLISHED_POLICIES: Mapping[str, type[Op]] = MappingProxyType(
    {
        "AutoAugment": AutoAugment,
        "RandAugment": RandAugment,
        "TrivialAugmentWide": TrivialAugmentWide,
        "ThreeAugment": ThreeAugment,
        "AugMix": AugMix,
    }
)
