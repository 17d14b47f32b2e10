"""Augmentation ops: one class for each op, one file for each family. `OPS` maps the op names of policies and plans to classes."""

from collections.abc import Mapping
from types import MappingProxyType

from refract.augment.ops.base import Op
from refract.augment.ops.color import COLOR
from refract.augment.ops.composition import COMPOSITION
from refract.augment.ops.corruption import CORRUPTION
from refract.augment.ops.crops import CROPS
from refract.augment.ops.deform import DEFORM
from refract.augment.ops.erasing import ERASING
from refract.augment.ops.external import EXTERNAL
from refract.augment.ops.filters import FILTERS
from refract.augment.ops.geometric import GEOMETRIC
from refract.augment.ops.mixing import MIX
from refract.augment.ops.noise import NOISE
from refract.augment.ops.published_policies import PUBLISHED_POLICIES
from refract.augment.ops.tone import TONE
from refract.augment.ops.warps import WARPS
from refract.augment.text.external import EXTERNAL_TEXT
from refract.augment.text.ops import TEXT

OPS: Mapping[str, type[Op]] = MappingProxyType(
    {
        **GEOMETRIC,
        **CROPS,
        **WARPS,
        **DEFORM,
        **COLOR,
        **TONE,
        **NOISE,
        **FILTERS,
        **ERASING,
        **MIX,
        **COMPOSITION,
        **PUBLISHED_POLICIES,
        **CORRUPTION,
        **EXTERNAL,
        **TEXT,
        **EXTERNAL_TEXT,
    }
)

__all__ = ["OPS", "Op"]
