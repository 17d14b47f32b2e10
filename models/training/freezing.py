"""Which parameters of a network are trained, and when: blocks from the input to the head, and the modes of transfer learning.

What is trained is a function of the epoch alone, so a run that goes on after an interruption trains what it would have trained.
"""

from torch import nn

from refract.models.head import head_of

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

MODES = ("fine-tune", "feature-extract", "gradual", "linear-then-fine-tune")


def blocks_of(network: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters in blocks, in the order in which the network registers them, the head's last.

    Modules that hold nearly all of the rest and plain sequences are opened, so that a block is a layer with its norm, a residual block, a
    transformer layer, or of some networks a whole stage. Of a network that joins two (`branches`), blocks as far from the head are one.
    Parameters beside the modules (a class token) go with the first block. Every parameter is in one block.
    """
    head = {id(parameter) for parameter in head_of(network).parameters()}
    branches = [_trunk(branch, head) for branch in getattr(network, "branches", lambda: [network])()]
    count = max(map(len, branches))
    blocks = [
        [parameter for own in branches if (k := place - count + len(own)) >= 0 for parameter in own[k]]
        for place in range(count)
    ]
    taken = head | {id(parameter) for block in blocks for parameter in block}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in taken]
    first = [rest + blocks[0]] if blocks else [rest] if rest else []
    return [*first, *blocks[1:], [p for p in network.parameters() if id(p) in head]]


def _trunk(network: nn.Module, head: set[int]) -> list[list[nn.Parameter]]:
    """The blocks of what is not the head, without parameters beside the modules."""
    total = sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in head)
    modules = [network]
    while True:
        opened = [child for module in modules for child in (module.children() if _opens(module, total) else [module])]
        if opened == modules:
            break
        modules = opened
    taken = set(head)
    blocks: list[list[nn.Parameter]] = []
    for module in modules:
        own = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in own}
        if own and blocks and isinstance(module, NORMS):
            blocks[-1] += own  # with the layer that it follows
        elif own:
            blocks.append(own)
    return blocks


def _opens(module: nn.Module, total: int) -> bool:
    if not any(True for _ in module.children()):
        return False
    count = sum(parameter.numel() for parameter in module.parameters())
    return isinstance(module, nn.Sequential | nn.ModuleList) or count > 0.6 * total


def trained_blocks(mode: str, epoch: int, unfreeze_epochs: int, count: int) -> int:
    """How many of `count` blocks, from the head down, are trained in `epoch`, counted from 0.

    fine-tune: all. feature-extract: the head. gradual: the head in epoch 0, then evenly more, all from epoch unfreeze_epochs on (Howard &
    Ruder 2018, arXiv:1801.06146, section 3.3). linear-then-fine-tune: the head for unfreeze_epochs epochs, then all (Kumar et al. 2022,
    arXiv:2202.10054). ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "fine-tune" or (mode != "feature-extract" and epoch >= unfreeze_epochs):
        return count
    if mode == "gradual":
        return 1 + epoch * (count - 1) // unfreeze_epochs
    return 1


def head_epochs(mode: str, unfreeze_epochs: int) -> int:
    """How many epochs train only the head before more blocks follow: none where nothing or all is ever unfrozen."""
    return {"gradual": 1, "linear-then-fine-tune": unfreeze_epochs}.get(mode, 0)
