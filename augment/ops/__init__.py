"""The ops: one class each, a file for each kind. `OPS` maps the names used in policies and plans to the classes."""

from collections.abc import Mapping
from types import MappingProxyType

from augment.ops.color import COLOR
from augment.ops.geometric import GEOMETRIC
from augment.ops.mix import MIX
from augment.ops.op import Op
from augment.ops.pixel import PIXEL
from augment.ops.region import REGION

OPS: Mapping[str, type[Op]] = MappingProxyType({**GEOMETRIC, **COLOR, **PIXEL, **REGION, **MIX})

__all__ = ["OPS", "Op"]
