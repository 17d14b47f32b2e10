"""Networks of fully connected layers: the perceptron and the multi-layer perceptron."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.layers.activations import make_activation, pieces_of
from refract.models.layers.norms import make_norm, standardise_weights

log = logging.getLogger(__name__)


class Perceptron(nn.Module):
    """One linear unit for each class on the flattened pixels, initialised to zero.

    With the loss `perceptron`, SGD without momentum and a batch size of one, training is the perceptron's learning rule.
    Source: Rosenblatt 1958.
    """

    def __init__(self, num_classes: int, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.head = nn.Linear(3 * image_size[0] * image_size[1], num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) of the `image_size` it was built for → logits (N, num_classes)."""
        return self.head(images.flatten(1))


class MLP(nn.Module):
    """Hidden layers of linear, norm, activation and dropout on the flattened pixels, then a linear head.

    - hidden: units of each layer
    - activation, norm: names in `refract.models.layers`; activation_args: arguments of the activation, such as {slope: 2.0}
    - dropout: fraction of the units set to 0 in training, in [0, 1) (Srivastava et al. 2014)
    - pretrain: `rbm` makes `prepare` train the hidden layers one by one, which needs sigmoid units without a norm; or none
    - pretrain_epochs: epochs for each layer of this pretraining

    ValueError for another value.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: tuple[int, int],
        hidden: Sequence[int] = (256, 128),
        activation: str = "relu",
        activation_args: Mapping[str, float] | None = None,
        norm: str = "none",
        dropout: float = 0.0,
        pretrain: str = "none",
        pretrain_epochs: int = 5,
    ) -> None:
        super().__init__()
        args = dict(activation_args or {})
        if not hidden or any(not isinstance(width, int) or width < 1 for width in hidden):
            raise ValueError(f"hidden={list(hidden)}: expected whole numbers above 0, one for each layer")
        if pretrain not in ("none", "rbm"):
            raise ValueError(f"pretrain={pretrain!r}: expected none or rbm")
        if pretrain == "rbm" and (activation != "sigmoid" or norm != "none"):
            raise ValueError(
                f"pretrain='rbm' with activation={activation!r}, norm={norm!r}: set activation: sigmoid, norm: none"
            )
        check_dropout(norm, dropout)
        self.pretrain, self.pretrain_epochs = pretrain, pretrain_epochs
        layers: list[nn.Module] = []
        inputs = 3 * image_size[0] * image_size[1]
        for width in hidden:
            units = width * pieces_of(activation, args)
            layer: nn.Module = nn.Linear(inputs, units)
            layer = standardise_weights(layer) if norm == "weight_standardisation" else layer
            layers += [layer, make_norm(norm, units, dims=0), make_activation(activation, **args)]
            layers += [nn.Dropout(dropout)] if dropout else []
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) of the `image_size` it was built for → logits (N, num_classes)."""
        return self.head(self.layers(images.flatten(1)))

    def prepare(self, images: Tensor) -> None:
        """Pretrain the hidden layers as restricted Boltzmann machines, each on the outputs of the layer before. images: (N, 3, H, W)."""
        if self.pretrain != "rbm":
            return
        inputs = images.flatten(1)
        low, spread = inputs.amin(), (inputs.amax() - inputs.amin()).clamp(min=1e-6)
        values = (inputs - low) / spread  # probabilities of visible units
        layers = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer in layers:
                contrastive_divergence(layer, values, epochs=self.pretrain_epochs)
                values = torch.sigmoid(F.linear(values, layer.weight, layer.bias))
            # Fold the scaling into the first layer, because the network's images are not scaled.
            first = layers[0]
            first.weight.div_(spread)
            first.bias.sub_(first.weight.sum(dim=1) * low)


def contrastive_divergence(
    layer: nn.Linear, visible: Tensor, *, epochs: int, lr: float = 0.05, batch: int = 64
) -> list[float]:
    """Train a layer's weights and bias as a restricted Boltzmann machine of binary units by CD-1, in place.

    Returns the mean squared error of the reconstruction in each epoch.
    visible: (N, in) in 0…1. p(h|v) = σ(Wv + c), p(v|h) = σ(Wᵀh + b); ΔW = lr (⟨h vᵀ⟩_data − ⟨h vᵀ⟩_reconstruction).
    Source: Hinton 2002, "Training products of experts by minimizing contrastive divergence"; Hinton 2010, "A practical guide", section 3.
    """
    errors = []
    with torch.no_grad():
        below = torch.zeros(visible.shape[1])
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        for _ in range(epochs):
            total = 0.0
            for v0 in visible[torch.randperm(len(visible))].split(batch):
                p0 = torch.sigmoid(F.linear(v0, layer.weight, layer.bias))
                h0 = torch.bernoulli(p0)
                v1 = torch.sigmoid(h0 @ layer.weight + below)
                p1 = torch.sigmoid(F.linear(v1, layer.weight, layer.bias))
                layer.weight.add_(lr * (p0.T @ v0 - p1.T @ v1) / len(v0))
                layer.bias.add_(lr * (p0 - p1).mean(dim=0))
                below = below + lr * (v0 - v1).mean(dim=0)
                total += float((v0 - v1).square().mean(dim=1).sum())
            errors.append(total / len(visible))
    return errors


def check_dropout(norm: str, dropout: float) -> None:
    """Raise ValueError for a dropout outside [0, 1). Warn of dropout with batch normalisation (Li et al. 2018, arXiv:1801.05134)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: expected a fraction in [0, 1)")
    if dropout and norm == "batch":
        log.warning(
            "dropout before a batch norm shifts the variance between training and evaluation and often costs accuracy; "
            "set dropout: 0 or norm: none"
        )
