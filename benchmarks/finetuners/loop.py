"""The parts of a training that every script writes alike."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    for images, targets in loader:
        loss = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in loader)
    return right / len(loader.dataset)  # type: ignore[arg-type]  # Dataset need not have a length, those here do
