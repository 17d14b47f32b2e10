"""Heat maps by occlusion: cover windows of an image and measure how far the score of a label falls. Works with any network."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GRID = 7
"""Coarse windows along each side of the image. A window is a quarter of the side, so neighbours overlap by half."""

FINE = 4
"""Fine windows along each side of the region around the coarse maximum. A window is a sixth of the image's side."""

BATCH = 8
"""Images in one forward pass."""

PASSES = 2 + GRID**2 + FINE**2
"""The largest number of images for one heat map: the image, the fully covered image, and one for each window."""

EVIDENCE = math.log(1.25)
"""The smallest decrease of the log-odds that counts as evidence: the odds of the label fall by a fifth."""

CLEAR = 2.0
"""The smallest ratio of the largest decrease to the largest increase if the network predicts the label for the fully covered image too."""

OBVIOUS = 8.0
"""The smallest such ratio if, besides, the largest decrease is below the log-odds of the label for the fully covered image."""


class Window(NamedTuple):
    """A rectangle of pixels, half-open."""

    top: int
    left: int
    bottom: int
    right: int


class Occlusion:
    """Cover a 7×7 grid of windows, then a 4×4 grid of smaller windows around the largest decrease of the score.

    A covered window shows the mean colour of the image. The score is the log-odds of the label, which do not saturate as the
    probability does. The coarse heat of a pixel is the mean decrease of the windows over it, weighted by the pixel's distance from each
    window's edge, minus the median. The fine heat, scaled to 0…1, multiplies it by up to 2.

    Source: Zeiler & Fergus 2014, arXiv:1311.2901, section 4.2. Deviations: log-odds instead of the probability, overlapping weighted
    windows, two scales, and a map of zeros if no coarse window lowers the score by EVIDENCE. Every network predicts some label for the
    fully covered image. The network may predict that label because the evidence of the others is missing, and then no window holds its
    evidence. Its largest decrease must therefore also be CLEAR, and OBVIOUS if it is below the score of the fully covered image.
    Grad-CAM costs less, but its maximum lies outside the evidence for many networks: see `benchmarks.explanations`.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], *, multilabel: bool = False, temperature: float = 1.0
    ) -> None:
        """forward: (N, 3, H, W) uint8 → logits (N, C). temperature: divides the logits, so that the odds are calibrated."""
        self._forward, self._multilabel, self._temperature = forward, multilabel, temperature

    def heat(self, image: Tensor, label: int) -> Tensor:
        """Compute the heat map of `label`: the last value of `steps`."""
        *_, heat = self.steps(image, label)
        assert heat is not None
        return heat

    def steps(self, image: Tensor, label: int) -> Iterator[Tensor | None]:
        """Compute the heat map of `label`, and yield after each forward pass of BATCH images, so that the caller can stop there.

        image: (3, H, W) uint8, on the network's device. The last value is the heat map, float32 (H, W) in 0…1 on the CPU, 1 at its maximum;
        the values before are None. The map is all 0 if no window contains evidence for the label, or a logit is not finite.
        """
        height, width = image.shape[-2:]
        windows = _grid(height, width)
        batches = _batches([None, Window(0, 0, height, width), *windows])
        scores: list[float] = []
        for batch in batches[:-1]:
            scores += self._scores(image, batch, label)
            yield None
        scores += self._scores(image, batches[-1], label)
        whole, blank, *covered = scores
        decreases = [whole - score for score in covered]
        if not _has_evidence(decreases, blank):
            yield torch.zeros(height, width)
            return
        yield None
        coarse = _spread(decreases, windows, height, width)
        windows = _around(int(coarse.argmax()), height, width)
        batches, decreases = _batches(windows), []
        for batch in batches:
            decreases += [whole - score for score in self._scores(image, batch, label)]
            if batch is not batches[-1]:
                yield None
        fine = _scaled(_spread(decreases, windows, height, width))
        yield _scaled((coarse - coarse.median()) * (1 + fine))

    def _scores(self, image: Tensor, windows: Sequence[Window | None], label: int) -> list[float]:
        """Compute the log-odds of the label for each covered window; None covers nothing."""
        # The memory format is channels last, as in the batches that the server classifies.
        images = image.permute(1, 2, 0).repeat(len(windows), 1, 1, 1).permute(0, 3, 1, 2)
        mean = image.float().mean(dim=(1, 2), keepdim=True).round().to(image.dtype)
        for covered, window in zip(images, windows, strict=True):
            if window is not None:
                covered[:, window.top : window.bottom, window.left : window.right] = mean
        with torch.inference_mode():
            logits = self._forward(images).float().cpu() / self._temperature
        if self._multilabel or logits.shape[1] == 1:
            return logits[:, label].tolist()
        others = logits.clone()
        others[:, label] = -torch.inf
        return (logits[:, label] - others.logsumexp(dim=1)).tolist()


def _has_evidence(decreases: Sequence[float], blank: float) -> bool:
    """Return whether a window contains evidence for the label. blank: the log-odds of the label for the fully covered image."""
    decrease, increase = max(decreases), max(1e-9, -min(decreases))
    if not all(map(math.isfinite, [blank, *decreases])) or decrease < EVIDENCE:
        return False
    return blank <= 0 or decrease >= (CLEAR if decrease >= blank else OBVIOUS) * increase


def _batches(windows: Sequence[Window | None]) -> list[Sequence[Window | None]]:
    return [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]


def _grid(height: int, width: int) -> list[Window]:
    """Return GRID × GRID windows from edge to edge."""
    high, wide = max(1, height // 4), max(1, width // 4)
    fractions = [i / (GRID - 1) for i in range(GRID)]
    corners = [(round(y * (height - high)), round(x * (width - wide))) for y in fractions for x in fractions]
    return [Window(top, left, top + high, left + wide) for top, left in corners]


def _around(index: int, height: int, width: int) -> list[Window]:
    """Return FINE × FINE windows, centred up to an eighth of the side from the pixel at flat `index`, shifted to lie inside the image."""
    high, wide = max(1, height // 6), max(1, width // 6)
    row, column = divmod(index, width)
    offsets = [i / (FINE - 1) / 4 - 1 / 8 for i in range(FINE)]
    tops = [min(max(0, round(row + y * height - high / 2)), height - high) for y in offsets]
    lefts = [min(max(0, round(column + x * width - wide / 2)), width - wide) for x in offsets]
    return [Window(top, left, top + high, left + wide) for top in tops for left in lefts]


def _spread(decreases: Sequence[float], windows: Sequence[Window], height: int, width: int) -> Tensor:
    """Compute (H, W): the mean decrease of the windows over each pixel, weighted by a tent function; 0 for a pixel without a window."""
    total, weights = torch.zeros(height, width), torch.full((height, width), 1e-9)
    for decrease, (top, left, bottom, right) in zip(decreases, windows, strict=True):
        tent = _tent(bottom - top)[:, None] * _tent(right - left)
        total[top:bottom, left:right] += decrease * tent
        weights[top:bottom, left:right] += tent
    return total / weights


def _tent(length: int) -> Tensor:
    """Return a tent function (length,): it rises linearly from the ends to the middle and is above 0 everywhere."""
    return 1 - ((torch.arange(length) + 0.5) * 2 / length - 1).abs()


def _scaled(heat: Tensor) -> Tensor:
    """Clamp a map at 0 and divide it by its largest value."""
    heat = heat.clamp(min=0)
    return heat / heat.max().clamp(min=1e-12)
