"""The head of a network: its final layer, which has one output for each class, and the layers that can replace it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.layers import pick


class MLPHead(nn.Sequential):
    """A hidden layer of `hidden` units, GELU, then a linear layer. (N, inputs) → (N, outputs)."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 512) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class CosineHead(nn.Module):
    """s · cos(x, w_c): the cosine of the angle to each class's weight vector, independent of both norms; s is learned and starts at 10.

    (N, inputs) → (N, outputs). Source: Gidaris & Komodakis 2018, arXiv:1804.09458, section 3.2.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_normal_(self.weight)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, values: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(values, dim=-1), F.normalize(self.weight, dim=-1))


class NeighbourHead(nn.Module):
    """A vote of the nearest training samples by cosine similarity, weighted by exp(similarity / 0.07). (N, inputs) → (N, outputs).

    The logits are the logarithms of the votes, for multi-label their log odds. `remember` sets the training samples, which are buffers of
    the state dict. Source: Wu et al. 2018, arXiv:1805.01978, section 3.4.
    """

    TEMPERATURE, LEAST_VOTE = 0.07, 1e-3

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(1, inputs))
        self.register_buffer("votes", torch.zeros(1, outputs))
        self.register_buffer("neighbours", torch.tensor(1))
        self.register_buffer("multilabel", torch.tensor(False))
        self._read_settings()

    def _read_settings(self) -> None:
        """Read the settings from their buffers once: an exporter or a compiler cannot trace a number that it finds in a tensor."""
        self._count, self._log_odds = int(self.neighbours), bool(self.multilabel)

    def remember(self, features: Tensor, targets: Tensor, neighbours: int, *, multilabel: bool) -> None:
        """features: (M, inputs); targets: (M, outputs), 1 for the labels of a sample; neighbours: at most M."""
        self.directions, self.votes = F.normalize(features, dim=1), targets.float()
        self.neighbours, self.multilabel = torch.tensor(neighbours), torch.tensor(multilabel)
        self._read_settings()

    def forward(self, values: Tensor) -> Tensor:
        similarities = F.normalize(values, dim=-1) @ self.directions.T
        nearest, rows = similarities.topk(self._count, dim=-1)
        weights = (nearest / self.TEMPERATURE).softmax(dim=-1)
        votes = (weights[..., None] * self.votes[rows]).sum(dim=-2).clamp(self.LEAST_VOTE, 1 - self.LEAST_VOTE)
        return votes.logit() if self._log_odds else votes.log()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """Take the number of training samples from the state dict."""
        for name in ("directions", "votes"):
            stored, buffer = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(stored, Tensor) and stored.shape[1:] == buffer.shape[1:]:
                setattr(self, name, buffer.new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *more)
        self._read_settings()


HEADS = {"mlp": MLPHead, "cosine": CosineHead, "knn": NeighbourHead}


def swap_head(module: nn.Module, kind: str) -> nn.Module:
    """Replace the last layer by a new head `kind` of HEADS, in place. Returns the module. ValueError if the last layer is not a Linear."""
    make = pick("head", kind, HEADS)
    if callable(getter := getattr(module, "get_classifier", None)) and isinstance(getter(), list | tuple):
        raise ValueError(f"head={kind!r}: {type(module).__name__} has two heads; set head: linear")
    name = last_layer(module)
    old = module.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"head={kind!r}: {type(module).__name__} ends in a {type(old).__name__}, not a linear layer; set head: linear"
        )
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, make(old.in_features, old.out_features))
    return module


def neutralise_head(network: nn.Module) -> nn.Module:
    """Make the head of `network` give every class the same logit, in place. Returns the network.

    The first loss is then log(num_classes), for multi-label log(2) for each label. The first gradients come from the images and not from
    random weights. The last Linear or Conv2d of each output gets zeros. The layers below keep their random weights, so that they learn. A
    cosine head, which cannot have zeros, gets one direction for all classes. Source: zero weights are the limit of the small weights of
    Goyal et al. 2017, arXiv:1706.02677, section 5.1.
    """
    for output in _outputs(network):
        cosine = [module for module in output.modules() if isinstance(module, CosineHead)]
        if cosine:
            with torch.no_grad():
                cosine[-1].weight.copy_(cosine[-1].weight[:1].expand_as(cosine[-1].weight))
        elif layers := [module for module in output.modules() if isinstance(module, nn.Linear | nn.Conv2d)]:
            for parameter in layers[-1].parameters():
                nn.init.zeros_(parameter)
    return network


def class_parameters(network: nn.Module) -> list[nn.Parameter]:
    """List the parameters of the head with one row for each class: weight and bias of the last layer of each output."""
    rows: list[nn.Parameter] = []
    for output in _outputs(network):
        layers = [module for module in output.modules() if isinstance(module, nn.Linear | nn.Conv2d | CosineHead)]
        for layer in layers[-1:]:
            rows += [layer.weight] if isinstance(layer, CosineHead) else layer.parameters()
    return rows


def _outputs(network: nn.Module) -> list[nn.Module]:
    """List the modules whose outputs are logits.

    A multimodal network has one, its last layer. A timm network has all that its metadata names.
    """
    head = head_of(network)
    if callable(getattr(network, "joint_head", None)):
        return [head[-1] if isinstance(head, nn.ModuleList) else head]
    named = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    names = [named] if isinstance(named, str) else list(named)
    modules = dict(network.named_modules())
    heads = list(head) if isinstance(head, nn.ModuleList) else [head]
    return [*heads, *(modules[name] for name in names if name in modules)]


def head_of(module: nn.Module) -> nn.Module:
    """Return the final layer or layers, which are trained in every mode of transfer learning.

    - A multimodal network returns its head from `joint_head`, with the fusion layer, which is new as well.
    - timm's networks return it from `get_classifier`: two layers for a distilled network.
    - For other networks it is the last registered Linear or Conv2d, which a test verifies for torchvision's families.

    ValueError if the network has no such layer.
    """
    if callable(joint_head := getattr(module, "joint_head", None)):
        return joint_head()
    swapped = [child for child in module.modules() if isinstance(child, MLPHead | CosineHead | NeighbourHead)]
    if swapped:
        return swapped[-1]
    if callable(getter := getattr(module, "get_classifier", None)):
        layers = getter()
        head = nn.ModuleList(layers) if isinstance(layers, list | tuple) else layers
        if next(head.parameters(), None) is not None:
            return head
    return module.get_submodule(last_layer(module))


@contextmanager
def head_inputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of the head within the block: for each forward pass one tensor (N, features), float32, on the CPU.

    Feature maps and token sequences are averaged over their positions. If the network does not call the module that `head_of` returns,
    because it registers layers in another order than it calls them, the network's output is recorded instead.
    """
    head = called_head(network)
    features: list[Tensor] = []
    inputs: list[Tensor] = []

    def before_head(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(pooled(args[0], channels_first=isinstance(module, nn.Conv2d)))

    def after_network(module: nn.Module, args: object, output: Tensor) -> None:
        features.append((inputs[-1] if inputs else output).detach().float().cpu())
        inputs.clear()

    hooks = [head.register_forward_pre_hook(before_head), network.register_forward_hook(after_network)]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def called_head(network: nn.Module) -> nn.Module:
    """Return the last layer of the head. A ModuleList is never called itself, and a fusion layer precedes the last layer."""
    head = head_of(network)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def logits_of_embeddings(network: nn.Module, embeddings: Tensor) -> Tensor:
    """Apply the last layer of the head to embeddings (N, D), the `head_inputs`. Returns float32 (N, C), without gradients.

    They are the network's logits only if it computes nothing more after that layer.
    """
    head = called_head(network)
    rows = embeddings.to(next(network.parameters()).device)
    with torch.inference_mode():
        return head(rows[:, :, None, None] if isinstance(head, nn.Conv2d) else rows).flatten(1).float()


def pooled(values: Tensor, *, channels_first: bool) -> Tensor:
    """Average feature maps (N, D, H, W), with channels_first, or tokens (N, …, D) over their positions. Returns (N, D)."""
    if values.ndim <= 2:
        return values.flatten(1)  # a tracer would record the batch size of `len` as a constant
    return values.flatten(2).mean(dim=2) if channels_first else values.flatten(1, -2).mean(dim=1)


def replace_head(module: nn.Module, num_classes: int) -> nn.Module:
    """Replace the last Linear or Conv2d of `module` by a freshly initialised one with `num_classes` outputs, in place. Returns `module`.

    A ReLU after the last layer, which SqueezeNet has, becomes an identity: it would clamp every logit to at least 0, and its sigmoid to at
    least 0.5.
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
    """Return the name of the last Linear or Conv2d that the module registers. ValueError if it has none."""
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    if not names:
        raise ValueError(f"network {type(module).__name__}: expected a Linear or Conv2d layer to serve as its head")
    return names[-1]


def _resized(old: nn.Linear | nn.Conv2d, num_classes: int) -> nn.Module:
    if isinstance(old, nn.Conv2d):
        return nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None)  # type: ignore[arg-type]
    return nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
