"""The ops: one class each, a file for each family. `OPS` maps the names used in policies and plans to the classes."""

from collections.abc import Mapping
from types import MappingProxyType

from augment.ops.auto import AUTO
from augment.ops.choice import CHOICE
from augment.ops.color import COLOR
from augment.ops.corruption import CORRUPTION
from augment.ops.crops import CROPS
from augment.ops.deform import DEFORM
from augment.ops.filters import FILTERS
from augment.ops.geometric import TURNS
from augment.ops.guests import GUESTS
from augment.ops.mix import MIX
from augment.ops.noise import NOISE
from augment.ops.op import Op
from augment.ops.region import REGION
from augment.ops.text import TEXT
from augment.ops.text_guests import TEXT_GUESTS
from augment.ops.tone import TONE
from augment.ops.warps import WARPS

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
