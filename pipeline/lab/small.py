"""What the experiments share: the digits as tensors, and a plain loop."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from refract.models.training.losses import classification_loss

Data = tuple[Tensor, Tensor]


@cache
def digits() -> tuple[Data, Data]:
    """((images, labels) to train on, (images, labels) held out): 1,297 and 500 digits, float 0…1, (N, 3, 8, 8), in a fixed order."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1).div(16).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], torch.tensor(labels)[order]
    return (images[:-500], targets[:-500]), (images[-500:], targets[-500:])


def centred(images: Tensor) -> Tensor:
    """Zero mean and unit variance over all values of the training digits."""
    mean, deviation = _of_all()
    return (images - mean) / deviation


@cache
def _of_all() -> tuple[Tensor, Tensor]:
    known = digits()[0][0]
    return known.mean(), known.std()


def train(
    network: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int = 64,
    loss: str = "auto",
    change: Callable[[Tensor], Tensor] = lambda images: images,
    until: float = 0.0,
) -> list[float]:
    """Losses, one a step. change: what happens to each batch's images. until: stop when the mean of ten losses is below it."""
    images, targets = data
    generator = torch.Generator().manual_seed(1)
    losses: list[float] = []
    network.train()
    while len(losses) < steps:
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            value = classification_loss(network(change(images[rows])), targets[rows], task="multiclass", name=loss)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            if len(losses) == steps or (len(losses) >= 10 and sum(losses[-10:]) < 10 * until):
                return losses
    return losses


@torch.no_grad()
def accuracy(network: nn.Module, data: Data) -> float:
    """Share of right answers, in evaluation mode."""
    network.eval()
    return float((network(data[0]).argmax(1) == data[1]).float().mean())
