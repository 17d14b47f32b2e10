"""The script that an engineer writes around timm: its transforms, a zero head, AdamW, warm-up and cosine, the best epoch by validation.

Two settings add what Refract does by default: `optim.head_lr=10`, the factor on the learning rate of the head, and
`model.frozen_norms=true`, which keeps the loaded statistics of the batch norms.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.finetuners.loop import accuracy, train_epoch
from benchmarks.finetuners.task import Task, answer, given, state

LR, HEAD_LR, WEIGHT_DECAY, WARMUP = 3e-4, 3e-3, 0.05, 0.1


class Images(Dataset):
    def __init__(self, task: Task, split: str) -> None:
        self.rows, self.labels = task.rows(split), task.labels()
        self.transform = create_transform(
            task.size, is_training=split == "train", mean=(task.mean,) * 3, std=(task.std,) * 3
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.rows[index]
        return self.transform(Image.open(path).convert("RGB")), self.labels.index(label)


def phases(task: Task) -> Iterator[tuple[bool, int, float]]:
    """(whether the backbone is trained, epochs, peak learning rate): plain scripts know no gradual unfreezing, so it is fine-tune here."""
    if task.mode == "feature-extract":
        yield False, task.epochs, HEAD_LR
    elif task.mode == "linear-then-fine-tune":
        yield False, 1, HEAD_LR
        yield True, task.epochs - 1, LR
    else:
        yield True, task.epochs, LR


def main() -> None:
    task = given()
    torch.manual_seed(task.seed)
    model = timm.create_model(task.network, num_classes=len(task.labels()))
    model.load_state_dict(state(task.weights), strict=False)
    head: nn.Module = model.get_classifier()  # type: ignore[operator]  # timm does not declare it on nn.Module
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    loaders = {
        split: DataLoader(Images(task, split), task.batch_size, shuffle=split == "train", num_workers=2)
        for split in ("train", "val", "test")
    }
    settings = dict(setting.split("=") for setting in task.settings)
    head_factor, frozen_norms = float(settings.get("optim.head_lr", 1)), settings.get("model.frozen_norms") == "true"
    best, best_state = -1.0, model.state_dict()
    for whole, epochs, peak in phases(task):
        model.requires_grad_(whole)
        head.requires_grad_(True)
        of_head = set(head.parameters())
        backbone = [
            parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in of_head
        ]
        groups: list[dict[str, Any]] = [{"params": backbone}, {"params": [*of_head], "lr": peak * head_factor}]
        optimizer = torch.optim.AdamW(groups, lr=peak, weight_decay=WEIGHT_DECAY)
        steps = epochs * len(loaders["train"])
        warmup = max(1, round(WARMUP * steps))

        def factor(step: int, steps: int = steps, warmup: int = warmup) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for _ in range(epochs):
            model.train(whole)
            if frozen_norms:
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
            train_epoch(model, loaders["train"], nn.functional.cross_entropy, optimizer, schedule)
            if (score := accuracy(model, loaders["val"])) >= best:
                best, best_state = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    answer(accuracy(model, loaders["test"]))


if __name__ == "__main__":
    main()
