"""Freezing of parameters: blocks from the input to the head, and the modes of transfer learning.

The trainable blocks depend on the epoch alone, so that a resumed run trains the same blocks as an uninterrupted one.
"""

from torch import nn

from refract.models.head import head_of

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

MODES = ("fine-tune", "feature-extract", "gradual", "linear-then-fine-tune", "lora")


def blocks_of(network: nn.Module) -> list[list[nn.Parameter]]:
    """Group the parameters into blocks, in the order of registration; the head's block is the last. Every parameter is in one block.

    A block is a layer with its norm, a residual block, a transformer layer, or in some networks a whole stage: sequences, and modules that
    hold nearly all remaining parameters, are split into their children. In a multimodal network (`branches`), blocks of the branches at
    the same distance from the head form one block. Parameters outside submodules (a class token) belong to the first block.
    """
    head = {id(parameter) for parameter in head_of(network).parameters()}
    branches = [_trunk(branch, head) for branch in getattr(network, "branches", lambda: [network])()]
    count = max(map(len, branches))
    blocks = [
        [parameter for branch in branches if (k := index - count + len(branch)) >= 0 for parameter in branch[k]]
        for index in range(count)
    ]
    assigned = head | {id(parameter) for block in blocks for parameter in block}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in assigned]
    first = [rest + blocks[0]] if blocks else [rest] if rest else []
    return [*first, *blocks[1:], [p for p in network.parameters() if id(p) in head]]


def _trunk(network: nn.Module, head: set[int]) -> list[list[nn.Parameter]]:
    """Group the parameters below the head into blocks, without parameters outside submodules."""
    total = sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in head)
    modules = [network]
    while True:
        split = [child for module in modules for child in (module.children() if _is_split(module, total) else [module])]
        if split == modules:
            break
        modules = split
    assigned = set(head)
    blocks: list[list[nn.Parameter]] = []
    for module in modules:
        parameters = [parameter for parameter in module.parameters() if id(parameter) not in assigned]
        assigned |= {id(parameter) for parameter in parameters}
        if parameters and blocks and isinstance(module, NORMS):
            blocks[-1] += parameters  # a norm joins the block of the layer before it
        elif parameters:
            blocks.append(parameters)
    return blocks


def _is_split(module: nn.Module, total: int) -> bool:
    if not any(True for _ in module.children()):
        return False
    count = sum(parameter.numel() for parameter in module.parameters())
    return isinstance(module, nn.Sequential | nn.ModuleList) or count > 0.6 * total


def trained_blocks(mode: str, epoch: int, unfreeze_epochs: int, count: int) -> int:
    """Return how many of `count` blocks, from the head down, are trained in `epoch`, counted from 0.

    - fine-tune: all
    - feature-extract: the head
    - gradual: the head in epoch 0, then evenly more, all from epoch unfreeze_epochs (Howard & Ruder 2018, arXiv:1801.06146, section 3.3)
    - linear-then-fine-tune: the head for unfreeze_epochs epochs, which may be 0, then all (Kumar et al. 2022, arXiv:2202.10054)
    - lora: all, as far as `refract.models.training.lora` has not frozen them

    ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if mode in ("fine-tune", "lora") or (mode != "feature-extract" and epoch >= unfreeze_epochs):
        return count
    if mode == "gradual":
        return 1 + epoch * (count - 1) // unfreeze_epochs
    return 1


def head_epochs(mode: str, unfreeze_epochs: int) -> int:
    """Return how many epochs train only the head before more blocks are unfrozen; 0 for modes that never unfreeze blocks."""
    return {"gradual": 1, "linear-then-fine-tune": unfreeze_epochs}.get(mode, 0)
