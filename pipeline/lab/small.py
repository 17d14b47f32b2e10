"""Shared by the experiments: the digits as tensors, and a plain training loop."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from refract.models.training.objective import classification_loss

Data = tuple[Tensor, Tensor]


@cache
def digits() -> tuple[Data, Data]:
    """Return the training and the test set: 1,297 and 500 digits in a fixed order.

    Each is (images, labels): float 0…1 (N, 3, 8, 8), and int64 (N,).
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1).div(16).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], torch.tensor(labels)[order]
    return (images[:-500], targets[:-500]), (images[-500:], targets[-500:])


def centred(images: Tensor) -> Tensor:
    """Normalise images by the mean and standard deviation over all values of the training digits."""
    mean, deviation = _train_statistics()
    return (images - mean) / deviation


@cache
def _train_statistics() -> tuple[Tensor, Tensor]:
    images = digits()[0][0]
    return images.mean(), images.std()


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
    """Train and return the loss of each step.

    change: applied to the images of each batch; until: stop when the mean of the last ten losses is below it.
    """
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
    """Return the fraction of right predictions, in evaluation mode."""
    network.eval()
    return float((network(data[0]).argmax(1) == data[1]).float().mean())
