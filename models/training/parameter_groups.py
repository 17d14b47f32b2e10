"""Groups of parameters by learning rate and weight decay: matrices and kernels decay, norms and biases do not."""

from typing import TYPE_CHECKING

from torch import nn

from refract.models.training.freezing import NORMS, blocks_of
from refract.models.training.optimizers import Groups

if TYPE_CHECKING:
    from refract.models.training.specs import OptimSpec


def parameter_groups(network: nn.Module, spec: "OptimSpec") -> Groups:
    """Group the trainable parameters by learning rate and weight decay. Matrices and kernels of layers decay, other parameters do not.

    Decay of a norm's scale, a bias, a class token or a position table does not improve generalisation. Parameters in the network's
    `no_weight_decay`, which timm's networks have, do not decay either. Empty groups are excluded. ValueError if nothing is trainable.
    Sources: He et al. 2019, arXiv:1812.01187, section 3.1, "no bias decay"; the factors by block, Clark et al. 2020, arXiv:2003.10555.
    """
    decayed = decayed_parameter_ids(network)
    norms = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters()}
    by_block = spec.layer_decay < 1 or spec.head_factor != 1
    blocks = blocks_of(network) if by_block else [list(network.parameters())]
    groups: Groups = []
    for distance, block in zip(reversed(range(len(blocks))), blocks, strict=True):
        scale = spec.peak_lr * spec.layer_decay**distance
        if not distance:  # the head, or the only block if both factors are 1
            scale *= spec.head_factor
        trainable = [parameter for parameter in block if parameter.requires_grad]
        groups += [
            {"params": [p for p in trainable if id(p) in decayed], "weight_decay": spec.weight_decay, "lr": scale},
            {"params": [p for p in trainable if id(p) not in decayed | norms], "weight_decay": 0.0, "lr": scale},
            {"params": [p for p in trainable if id(p) in norms], "weight_decay": 0.0, "lr": scale * spec.norm_lr},
        ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{type(network).__name__} has no parameter that requires a gradient; unfreeze at least one")
    return groups


def decayed_parameter_ids(network: nn.Module) -> set[int]:
    """Return the ids of the matrices and kernels of layers: parameters named `weight`, also behind a parametrisation."""
    no_weight_decay = getattr(network, "no_weight_decay", None)
    excluded = set(no_weight_decay()) if callable(no_weight_decay) else set()
    return {
        id(parameter)
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1
        and name not in excluded
        and (name.endswith("weight") or ".parametrizations." in f".{name}")
    }
