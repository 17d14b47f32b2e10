"""The ops: one class each, a file for each family. `OPS` maps the names used in policies and plans to the classes."""

from collections.abc import Mapping
from types import MappingProxyType

from refract.augment.ops.auto import AUTO
from refract.augment.ops.choice import CHOICE
from refract.augment.ops.color import COLOR
from refract.augment.ops.corruption import CORRUPTION
from refract.augment.ops.crops import CROPS
from refract.augment.ops.deform import DEFORM
from refract.augment.ops.filters import FILTERS
from refract.augment.ops.geometric import TURNS
from refract.augment.ops.guests import GUESTS
from refract.augment.ops.mix import MIX
from refract.augment.ops.noise import NOISE
from refract.augment.ops.op import Op
from refract.augment.ops.region import REGION
from refract.augment.ops.text import TEXT
from refract.augment.ops.text_guests import TEXT_GUESTS
from refract.augment.ops.tone import TONE
from refract.augment.ops.warps import WARPS

OPS: Mapping[str, type[Op]] = MappingProxyType(
    {
        **TURNS,
        **CROPS,
        **WARPS,
        **DEFORM,
        **COLOR,
        **TONE,
        **NOISE,
        **FILTERS,
        **REGION,
        **MIX,
        **CHOICE,
        **AUTO,
        **CORRUPTION,
        **GUESTS,
        **TEXT,
        **TEXT_GUESTS,
    }
)

__all__ = ["OPS", "Op"]
