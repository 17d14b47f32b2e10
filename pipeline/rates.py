"""The learning rates of a config that names none: by optimiser, and by what is trained."""

from collections.abc import Mapping
from types import MappingProxyType

from pipeline.config import Config
from pipeline.initial_weights import loads_weights

FROM_SCRATCH = 2e-3
FINE_TUNE = 3e-4
HEAD = 3e-3
"""Peak learning rates of AdamW for random weights, for loaded weights, and for a new head. `benchmarks/transfer.py --rates` measured the
last two."""

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
    """Replace optim.lr and optim.head_lr that are None by numbers, in place, so that a run stores what it used.

    The head of loaded weights is new, so it moves as many times faster as HEAD is above FINE_TUNE (discriminative learning rates: Howard &
    Ruder 2018, arXiv:1801.06146, section 3.2). Random weights need no second learning rate: head_lr stays None.
    """
    optim, transfer = config.optim, loads_weights(config) and config.model.mode != "feature-extract"
    if optim.lr is None:
        optim.lr = TIMES_ADAMW[optim.name] * _peak(config)
    if optim.head_lr is None and transfer:
        optim.head_lr = optim.lr * HEAD / FINE_TUNE


def _peak(config: Config) -> float:
    if config.model.mode == "feature-extract":
        return HEAD
    return FINE_TUNE if loads_weights(config) else FROM_SCRATCH
