"""Images whose class depends on one planted square, and networks that learned them. A correct heat map is hottest in the square.

An image is a smooth random background with noise, a square with a checkerboard of two colours, which decides the class, and a square
of grey noise of the same size, which decides nothing.

Source of the idea: the pointing game, Zhang et al. 2018, arXiv:1608.00507, section 4.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.classifier import Classifier

SIDE = 0.28
"""A square's side over the image's: the square is 7.8 % of the image."""

DARK = (40, 40, 40)
COLOURS = ((220, 40, 40), (40, 180, 60), (60, 80, 230), (225, 205, 60))
"""RGB of each class's checkerboard, whose other colour is DARK."""

NUM_CLASSES = len(COLOURS)


class Planted(NamedTuple):
    """images: (N, 3, S, S) uint8; labels: (N,) int64; squares: (N, S, S) bool, True inside the square that decides the class."""

    images: Tensor
    labels: Tensor
    squares: Tensor


def plant(count: int, size: int, generator: torch.Generator) -> Planted:
    """Draw `count` images of `size` × `size` pixels."""
    side, cell = round(SIDE * size), max(1, size // 16)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 140 + 50
    noise = torch.randn(count, 3, size, size, generator=generator) * 12
    images = F.interpolate(coarse, size, mode="bilinear") + noise
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    squares = torch.zeros(count, size, size, dtype=torch.bool)
    colours = torch.tensor([[DARK, colour] for colour in COLOURS], dtype=torch.float32)
    places = torch.arange(side)
    for image, label, square in zip(images, labels, squares, strict=True):
        (top, left), (other_top, other_left) = _apart(size - side, side, generator)
        phase = int(torch.randint(2 * cell, (), generator=generator))
        board = ((places + phase).div(cell, rounding_mode="floor")[:, None] + places // cell) % 2
        image[:, top : top + side, left : left + side] = colours[label][board].permute(2, 0, 1)
        grey = torch.rand(1, side, side, generator=generator) * 255
        image[:, other_top : other_top + side, other_left : other_left + side] = grey
        square[top : top + side, left : left + side] = True
    return Planted(images.clamp(0, 255).to(torch.uint8), labels, squares)


def _apart(furthest: int, side: int, generator: torch.Generator) -> list[list[int]]:
    """The corners (top, left) of two squares that do not overlap."""
    while True:
        corners = torch.randint(furthest + 1, (2, 2), generator=generator)
        if int((corners[0] - corners[1]).abs().max()) >= side:
            return corners.tolist()


def learn(
    network: nn.Module, size: int, *, steps: int, learning_rate: float = 3e-3, wanted: float = 0.98, seed: int = 0
) -> tuple[Classifier, float]:
    """Train on fresh images, 32 a step, until `wanted` of 200 others are right. Returns the classifier in eval mode, and the fraction."""
    generator = torch.Generator().manual_seed(seed)
    classifier = Classifier(network, mean=(0.47,) * 3, std=(0.25,) * 3).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    fresh, accuracy = plant(200, size, generator), 0.0
    for step in range(1, steps + 1):
        batch = plant(32, size, generator)
        loss = F.cross_entropy(classifier(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            accuracy = _accuracy(classifier.eval(), fresh)
            if accuracy >= wanted:
                break
            classifier.train()
    return classifier.eval(), accuracy


def _accuracy(classifier: Classifier, planted: Planted) -> float:
    with torch.inference_mode():
        return float((classifier(planted.images).argmax(dim=1) == planted.labels).float().mean())
