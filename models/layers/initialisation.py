"""Initialisation of weights by name, for the linear and convolutional layers of a network. Biases start at 0.

n_in and n_out are a layer's fan-in and fan-out: its inputs and outputs times the size of the kernel.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from refract.models.layers import pick

SMALL, LARGE = 0.01, 1.0
"""Standard deviations of two Gaussians that textbooks advise against."""


def initialise(network: nn.Module, name: str, images: Tensor | None = None) -> nn.Module:
    """Initialise every trainable linear and convolutional layer, in place. Returns the network. Frozen layers keep their weights.

    images: a batch of the network's inputs, for lsuv. Draws from torch's global generator. ValueError for an unknown name, or lsuv without
    images.
    """
    fill = pick("init", name, INITIALISATIONS)
    layers = [m for m in network.modules() if isinstance(m, LAYERS) and _stored_weight(m).requires_grad]
    with torch.no_grad():
        for layer in layers:
            _fill(layer, fill)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if name == "lsuv":
        if images is None:
            raise ValueError("init='lsuv' needs a batch of images")
        _unit_variance(network, layers, images)
    return network


def _unit_variance(network: nn.Module, layers: Sequence[nn.Module], images: Tensor) -> None:
    """Scale each layer, in the order of the forward pass, until its outputs have variance 1 within 1 %.

    Source: Mishkin & Matas 2016, "All you need is a good init", arXiv:1511.06422, algorithm 1.
    """
    order: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda module, _, __: order.append(module)) for layer in layers]
    deviations: dict[nn.Module, float] = {}

    def measure(module: nn.Module, _: object, output: Tensor) -> None:
        deviations[module] = float(output.float().std())  # computed here, as the next layer may overwrite the output

    training = network.training
    network.train()  # in eval mode, batch norms without statistics would not normalise
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        with torch.no_grad():
            network(images)
            for layer in dict.fromkeys(order):
                if hasattr(layer, "parametrizations"):
                    continue  # the scale of a standardised weight has no effect
                hooks.append(layer.register_forward_hook(measure))
                for _ in range(10):
                    network(images)
                    deviation = deviations[layer]
                    if deviation == 0 or abs(deviation - 1) < 0.005:
                        break
                    _stored_weight(layer).div_(deviation)
            for name, buffer in network.named_buffers():
                buffer.copy_(buffers[name])
    finally:
        for hook in hooks:
            hook.remove()
        network.train(training)


def _fill(layer: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    weight = _stored_weight(layer)
    if not isinstance(layer, nn.ConvTranspose2d):
        fill(weight)
        return
    # PyTorch stores (in, out, …) here, but computes the fans from (out, in, …).
    transposed = weight.transpose(0, 1).contiguous()
    fill(transposed)
    weight.copy_(transposed.transpose(0, 1))


def _stored_weight(layer: nn.Module) -> Tensor:
    """Return the stored parameter of a weight, also behind a parametrisation such as weight standardisation."""
    return layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight  # type: ignore


def _lecun_normal(weight: Tensor) -> Tensor:
    """Draw from N(0, 1 / n_in). Source: LeCun et al. 1998, "Efficient BackProp", equation 16."""
    return nn.init.normal_(weight, std=1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(weight)[0]))


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)

INITIALISATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "zeros": nn.init.zeros_,
        "constant": partial(nn.init.constant_, val=0.1),  # all units of a layer stay equal: a textbook counterexample
        "small_gaussian": partial(nn.init.normal_, std=SMALL),
        "large_gaussian": partial(nn.init.normal_, std=LARGE),
        "lecun_normal": _lecun_normal,
        # U(±√(6 / (n_in + n_out))) and N(0, 2 / (n_in + n_out)): Glorot & Bengio 2010, equation 16
        "xavier_uniform": nn.init.xavier_uniform_,
        "xavier_normal": nn.init.xavier_normal_,
        # U(±√(6 / n_in)) and N(0, 2 / n_in): He et al. 2015, arXiv:1502.01852, equation 10
        "he_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
        "he_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
        "orthogonal": nn.init.orthogonal_,  # Saxe et al. 2014, arXiv:1312.6120
        "lsuv": nn.init.orthogonal_,  # then scaled, see `initialise`
    }
)
