"""A plain PyTorch training loop, the baseline for Refract's training."""

import time
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.gpu.timing import wait
from refract.models.classifier import Classifier
from refract.models.training.objective import classification_loss
from refract.models.training.specs import OptimSpec


def seconds_a_step(
    classifier: Classifier, batches: Iterable[dict[str, Any]], total: int, device: str, *, warm_up: int, mixed: bool
) -> float:
    """Train on `total` batches, and return the mean seconds of the steps after the first `warm_up`.

    batches: `images` (B, 3, H, W) uint8 and `targets` (B,); mixed: in bf16 autocast. FloatingPointError if a loss is not finite.
    """
    classifier.train()
    spec = OptimSpec(lr=1e-3)
    optimizer = spec.make(classifier.network)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: spec.factor(step, total))
    started, losses, right = 0.0, torch.zeros((), device=device), torch.zeros((), device=device)
    for step, batch in enumerate(batches):
        if step == warm_up:
            wait(device)
            started = time.perf_counter()
        images = batch["images"].to(device, memory_format=torch.channels_last)
        targets = batch["targets"].to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            logits = classifier(images)
            loss = classification_loss(logits, targets, task="multiclass")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses += loss.detach()
        right += (logits.detach().argmax(1) == targets).sum()
    wait(device)
    seconds = (time.perf_counter() - started) / (total - warm_up)
    if not torch.isfinite(losses):
        raise FloatingPointError("the loss is not finite")
    return seconds
