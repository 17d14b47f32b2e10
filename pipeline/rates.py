"""The learning rates of a config that names none: by optimiser, and by what is trained."""

from collections.abc import Mapping
from types import MappingProxyType

from pipeline.config import Config
from pipeline.initial_weights import loads_weights

FROM_SCRATCH = 2e-3
FINE_TUNE = 3e-4
HEAD = 3e-3
"""Peak learning rates of AdamW for random weights, for loaded weights, and for a new head on frozen ones. `benchmarks/transfer.py --rates`
measured the last two."""

TIMES_ADAMW: Mapping[str, float] = MappingProxyType(
    {
        "sgd": 25.0,
        "adagrad": 5.0,
        "adadelta": 500.0,
        "rmsprop": 0.5,
        "adam": 1.0,
        "adamw": 1.0,
        "lion": 0.1,
        "muon": 10.0,
    }
)
"""What other optimisers need, as multiples of AdamW's learning rate: the ratios of the libraries' and papers' customary values."""


def fill_learning_rates(config: Config) -> None:
    """Replace optim.lr and optim.head_lr that are None by numbers, in place, so that a run stores what it used."""
    optim, times = config.optim, TIMES_ADAMW[config.optim.name]
    if optim.lr is None:
        optim.lr = times * _peak(config)
    if optim.head_lr is None:
        optim.head_lr = times * HEAD


def _peak(config: Config) -> float:
    if config.model.mode == "feature-extract":
        return HEAD
    return FINE_TUNE if loads_weights(config) else FROM_SCRATCH
