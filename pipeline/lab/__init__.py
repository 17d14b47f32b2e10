"""The lab: textbook claims, each tested by a small seeded experiment with Refract's own layers and losses."""

from collections.abc import Mapping
from types import MappingProxyType

from refract.pipeline.lab.experiment import Experiment


def experiments() -> Mapping[str, Experiment]:
    """Return name → experiment, in the order of the output."""
    from refract.pipeline.lab.learning import LEARNING
    from refract.pipeline.lab.signals import SIGNALS

    return MappingProxyType({**SIGNALS, **LEARNING})
