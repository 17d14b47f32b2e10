"""The scripts that a careful engineer writes to train a network from random weights, for small colour images and for large grey scans.

Small images: the residual network of He et al. 2016, section 4.2, with SGD, Nesterov momentum and one learning-rate cycle; shifts, flips
and an erased patch. Grey images: torchvision's resnet18 with AdamW and one cycle; small rotations, shifts and changes of scale, no flips.
"""

import copy

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.finetuners.loop import accuracy, train_epoch
from benchmarks.finetuners.task import Task, answer, given


def transforms(task: Task) -> tuple[v2.Transform, v2.Transform]:
    """(of training, of evaluation): from Pillow images to normalised tensors."""
    resize = v2.Resize((task.size, task.size), antialias=True)
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((task.mean,) * 3, (task.std,) * 3)]
    if task.mode == "small":
        drawn = [v2.RandomCrop(task.size, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
        return v2.Compose([resize, *drawn, *tensor, v2.RandomErasing(0.5, scale=(0.05, 0.1))]), v2.Compose(
            [resize, *tensor]
        )
    moved = v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([resize, moved, v2.ColorJitter(0.2, 0.2), *tensor]), v2.Compose([resize, *tensor])


class Images(Dataset):
    """Decoded once: the images fit into memory."""

    def __init__(self, task: Task, split: str) -> None:
        labels, drawn = task.labels(), transforms(task)
        self.images = [Image.open(path).convert("RGB") for path, _ in task.rows(split)]
        self.targets = [labels.index(label) for _, label in task.rows(split)]
        self.transform = drawn[0] if split == "train" else drawn[1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def model_of(task: Task) -> nn.Module:
    from refract.models.registry import build

    return build(task.network, len(task.labels()), image_size=(task.size, task.size))


def optimizer_of(task: Task, model: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    """(optimiser, peak learning rate)"""
    if task.mode == "small":
        peak = 0.1 * task.batch_size / 128
        return torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4), peak
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05), 1e-3


def main() -> None:
    task = given()
    torch.manual_seed(task.seed)
    model = model_of(task)
    loaders = {
        split: DataLoader(
            Images(task, split), task.batch_size, shuffle=split == "train", drop_last=split == "train", num_workers=2
        )
        for split in ("train", "val", "test")
    }
    optimizer, peak = optimizer_of(task, model)
    steps = task.epochs * len(loaders["train"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.25)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    best, best_state = -1.0, model.state_dict()
    for _ in range(task.epochs):
        model.train()
        train_epoch(model, loaders["train"], loss_of, optimizer, schedule)
        if (score := accuracy(model, loaders["val"])) >= best:
            best, best_state = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    answer(accuracy(model, loaders["test"]))


if __name__ == "__main__":
    main()
