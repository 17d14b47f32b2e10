"""The values that a config leaves open (null), by optimiser and by what is trained."""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pipeline.config import Config
from pipeline.initial_weights import loads_weights

FROM_SCRATCH = 2e-3
FINE_TUNE = 3e-4
HEAD = 3e-3
"""Peak learning rates of AdamW for random weights, for loaded weights, and for a new head. `benchmarks/transfer.py --settings`
compares others."""

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


def fill_defaults(config: Config) -> None:
    """Replace optim.lr, optim.head_lr and model.frozen_norms that are None, in place, so that a run stores what it used.

    Loaded batch norms keep their statistics: those of small, augmented batches cost 4 points on 196 photos (EfficientNet-Lite0, 4 epochs).
    Those of a bundle may come from a short training, and are trained on.
    """
    model = config.model
    config.optim.lr, config.optim.head_lr = learning_rates(config)
    if model.frozen_norms is None:
        model.frozen_norms = model.weights != "none" and not (Path(model.weights) / "bundle.json").is_file()


def filled(config: Config) -> Config:
    """A copy without open values, to compare with the stored config of a run."""
    own = copy.deepcopy(config)
    fill_defaults(own)
    return own


def learning_rates(config: Config) -> tuple[float, float | None]:
    """(optim.lr, optim.head_lr), chosen where the config leaves them open.

    The head of loaded weights is new, so it moves as many times faster as HEAD is above FINE_TUNE (discriminative learning rates: Howard &
    Ruder 2018, arXiv:1801.06146, section 3.2). Random weights need no second learning rate: head_lr stays None.
    """
    optim, mode = config.optim, config.model.mode
    transfer = loads_weights(config) and mode != "feature-extract"
    adamw = HEAD if mode == "feature-extract" else FINE_TUNE if transfer else FROM_SCRATCH
    lr = TIMES_ADAMW[optim.name] * adamw if optim.lr is None else optim.lr
    return lr, lr * HEAD / FINE_TUNE if optim.head_lr is None and transfer else optim.head_lr
