"""The head of a network: its final layer, the one with a row for each class, or what stands in its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.layers import pick


class MLPHead(nn.Sequential):
    """One hidden layer of `hidden` units, GELU, then a linear layer. (N, inputs) → (N, outputs)."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 512) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class CosineHead(nn.Module):
    """s · cos(x, w_c): the angle to each class's direction, whatever the lengths; s is learned and begins at 10.

    (N, inputs) → (N, outputs). Source: Gidaris & Komodakis 2018, arXiv:1804.09458, section 3.2.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_normal_(self.weight)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, values: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(values, dim=-1), F.normalize(self.weight, dim=-1))


HEADS = {"mlp": MLPHead, "cosine": CosineHead}


def swap_head(module: nn.Module, kind: str) -> nn.Module:
    """Put a new head of `kind`, of HEADS, in the place of the last layer. Returns the module. ValueError where that is no Linear."""
    make = pick("head", kind, HEADS)
    if callable(named := getattr(module, "get_classifier", None)) and isinstance(named(), list | tuple):
        raise ValueError(f"head={kind!r}: {type(module).__name__} has two heads; take head: linear")
    name = last_layer(module)
    old = module.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"head={kind!r}: {type(module).__name__} ends in a {type(old).__name__}, not a linear layer; take head: linear"
        )
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, make(old.in_features, old.out_features))
    return module


def neutralise_head(network: nn.Module) -> nn.Module:
    """Make the head of `network` give every class the same logit, in place. Returns the network.

    The first loss is then log(num_classes), for multi-label log(2) a label, and the first gradients come from the images rather than from
    random weights. The last Linear or Conv2d of each output gets zeros; the layers below keep their random weights, so that they learn. A
    cosine head, which cannot have zeros, gets one direction for all classes. Source: zero weights are the limit of the small ones of
    Goyal et al. 2017, arXiv:1706.02677, section 5.1.
    """
    for part in _outputs(network):
        cosine = [module for module in part.modules() if isinstance(module, CosineHead)]
        if cosine:
            with torch.no_grad():
                cosine[-1].weight.copy_(cosine[-1].weight[:1].expand_as(cosine[-1].weight))
        elif layers := [module for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d)]:
            for parameter in layers[-1].parameters():
                nn.init.zeros_(parameter)
    return network


def _outputs(network: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are logits: of a network that joins two the last one, of timm's networks all that their metadata names."""
    head = head_of(network)
    if callable(getattr(network, "joint_head", None)):
        return [head[-1] if isinstance(head, nn.ModuleList) else head]
    named = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    names = [named] if isinstance(named, str) else list(named)
    known = dict(network.named_modules())
    parts = list(head) if isinstance(head, nn.ModuleList) else [head]
    return [*parts, *(known[name] for name in names if name in known)]


def head_of(module: nn.Module) -> nn.Module:
    """The final layer or layers, which are trained in every mode of transfer learning.

    A network that joins two says it itself (`joint_head`), as what joins them is new too. timm's networks say it themselves
    (`get_classifier`; two layers where the network is distilled); for others it is the last Linear or Conv2d that the module registers,
    which a test holds for torchvision's families.
    ValueError if there is none.
    """
    if callable(own := getattr(module, "joint_head", None)):
        return own()
    exchanged = [child for child in module.modules() if isinstance(child, MLPHead | CosineHead)]
    if exchanged:
        return exchanged[-1]
    if callable(named := getattr(module, "get_classifier", None)):
        found = named()
        head = nn.ModuleList(found) if isinstance(found, list | tuple) else found
        if next(head.parameters(), None) is not None:
            return head
    return module.get_submodule(last_layer(module))


@contextmanager
def head_inputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """While the block lasts, what the last layers are given: for each forward pass one tensor (N, features), float32, on the CPU.

    Maps and rows of tokens are averaged over their places. A network that does not call what `head_of` takes for its head, as one whose
    layers are registered in another order than they are called, gives its output instead.
    """
    head = _called_head(network)
    kept: list[Tensor] = []
    seen: list[Tensor] = []

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(_averaged(given[0], channels_first=isinstance(module, nn.Conv2d)))

    def after(module: nn.Module, given: object, output: Tensor) -> None:
        kept.append((seen[-1] if seen else output).detach().float().cpu())
        seen.clear()

    hooks = [head.register_forward_pre_hook(before), network.register_forward_hook(after)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _called_head(network: nn.Module) -> nn.Module:
    """Of several layers the last: a list of them is never called, and what joins two networks lies before what they have in common."""
    head = head_of(network)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def _averaged(values: Tensor, *, channels_first: bool) -> Tensor:
    if values.ndim <= 2:
        return values.reshape(len(values), -1)
    return values.flatten(2).mean(dim=2) if channels_first else values.flatten(1, -2).mean(dim=1)


def replace_head(module: nn.Module, num_classes: int) -> nn.Module:
    """Give `module` a new last Linear or Conv2d with `num_classes` outputs, in place; freshly initialised. Returns it.

    A ReLU after the last layer, which SqueezeNet has, becomes an identity: it would keep every logit above zero, and a
    sigmoid of it above 0.5.
    """
    name = last_layer(module)
    parent_name, _, child = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    old = module.get_submodule(name)
    setattr(parent, child, _resized(old, num_classes))  # type: ignore[arg-type]
    if isinstance(parent, nn.Sequential):
        names = [child for child, _ in parent.named_children()]
        for after in names[names.index(child) + 1 :]:
            if isinstance(parent.get_submodule(after), nn.ReLU):
                setattr(parent, after, nn.Identity())
    return module


def last_layer(module: nn.Module) -> str:
    """The name of the last Linear or Conv2d that the module registers. ValueError where there is none."""
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    if not names:
        raise ValueError(f"network {type(module).__name__}: expected a Linear or Conv2d layer to serve as its head")
    return names[-1]


def _resized(old: nn.Linear | nn.Conv2d, num_classes: int) -> nn.Module:
    if isinstance(old, nn.Conv2d):
        return nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None)  # type: ignore[arg-type]
    return nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
