"""Refract's own ops, registered by name: importing this module fills `refract.augment.registry.OPS`."""

from refract.augment.ops.color import COLOR
from refract.augment.ops.composition import COMPOSITION
from refract.augment.ops.corruption import CORRUPTION
from refract.augment.ops.crops import CROPS
from refract.augment.ops.deform import DEFORM
from refract.augment.ops.erasing import ERASING
from refract.augment.ops.external import EXTERNAL, LIBRARIES, external_transform
from refract.augment.ops.filters import FILTERS
from refract.augment.ops.geometric import GEOMETRIC
from refract.augment.ops.mixing import MIX
from refract.augment.ops.noise import NOISE
from refract.augment.ops.published_policies import PUBLISHED_POLICIES
from refract.augment.ops.tone import TONE
from refract.augment.ops.warps import WARPS
from refract.augment.registry import register, register_adapter
from refract.augment.text.external import EXTERNAL_TEXT, external_text_transform
from refract.augment.text.ops import TEXT

for _family in (
    GEOMETRIC,
    CROPS,
    WARPS,
    DEFORM,
    COLOR,
    TONE,
    NOISE,
    FILTERS,
    ERASING,
    MIX,
    COMPOSITION,
    PUBLISHED_POLICIES,
    CORRUPTION,
    EXTERNAL,
    TEXT,
    EXTERNAL_TEXT,
):
    register(_family)
for _library in LIBRARIES:
    register_adapter(_library, external_transform)
register_adapter("nlpaug", external_text_transform)
