"""Experiments on how fast and how well networks learn."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from refract.augment import Augmenter
from refract.augment.executors import torch_batch
from refract.models.registry import build
from refract.pipeline.lab import Experiment, Outcome
from refract.pipeline.lab.small import accuracy, centred, digits, train

FEW, TRIALS = 500, 3


def activations(seed: int) -> Outcome:
    """Steps to a loss of 0.1, each activation at the best of five learning rates."""
    data = (centred(digits()[0][0]), digits()[0][1])
    steps, curves = {}, {}
    for activation in ("relu", "tanh", "sigmoid"):
        best: list[float] = []
        for lr in (0.01, 0.03, 0.1, 0.3, 1.0):
            torch.manual_seed(seed)
            network = build("mlp", 10, image_size=(8, 8), hidden=[64, 64, 64], activation=activation)
            losses = train(
                network, data, torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9), steps=1000, until=0.1
            )
            if sum(losses[-10:]) < 1 and (not best or len(losses) < len(best)):
                best = losses
        steps[activation], curves[activation] = len(best) or 1000, best
    relu, tanh, sigmoid = steps.values()
    return Outcome(
        1.5 * relu < sigmoid and 1.5 * tanh < sigmoid,
        f"steps to a loss of 0.1 at the best learning rate: ReLU {relu}, tanh {tanh} ({tanh / relu:.1f} ×), sigmoid {sigmoid} "
        f"({sigmoid / relu:.1f} ×)",
        curves, "step", "loss", True,
    )  # fmt: skip


def mean_subtraction(seed: int) -> Outcome:
    """Steps to a loss of 0.2 from images of variance 1 on a bright ground, three deviations above 0, and from centred ones; each at the
    best of five learning rates."""
    images, targets = digits()[0]
    forms = {"offset": images / images.std() + 3, "centred": centred(images)}
    steps, curves = {}, {}
    for form, inputs in forms.items():
        best: list[float] = []
        for lr in (0.003, 0.01, 0.03, 0.1, 0.3):
            torch.manual_seed(seed)
            network = build("mlp", 10, image_size=(8, 8), hidden=[64], activation="tanh")
            losses = train(
                network, (inputs, targets), torch.optim.SGD(network.parameters(), lr=lr), steps=1500, until=0.2
            )
            if sum(losses[-10:]) < 2 and (not best or len(losses) < len(best)):
                best = losses
        steps[form], curves[form] = len(best) or 1500, best
    return Outcome(
        steps["centred"] * 1.5 < steps["offset"],
        f"steps to a loss of 0.2 at the best learning rate: centred {steps['centred']}, offset by three deviations {steps['offset']}",
        curves, "step", "loss", True,
    )  # fmt: skip


def learning_rates(seed: int) -> Outcome:
    data = (centred(digits()[0][0]), digits()[0][1])
    curves = {}
    for label, lr in (("too low: 0.0003", 3e-4), ("right: 0.1", 0.1), ("too high: 10", 10.0)):
        torch.manual_seed(seed)
        network = build("mlp", 10, image_size=(8, 8), hidden=[64, 64])
        curves[label] = train(network, data, torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9), steps=400)
    low, right, high = (sum(losses[-20:]) / 20 for losses in curves.values())
    start = curves["right: 0.1"][0]
    return Outcome(
        right < 0.1 and low > 0.3 * start and not high < start,
        f"loss after 400 steps, from {start:.2f}: 0.0003 {low:.2f}, 0.1 {right:.3f}, 10 {high:.3g}",
        curves, "step", "loss", True,
    )  # fmt: skip


def overfitting(seed: int) -> Outcome:
    """FEW training digits; the gap between the accuracy on them and on those held out, the mean of TRIALS trials, other digits in each."""
    (images, targets), held = digits()
    augmenter = Augmenter([{"Affine": {"degrees": 12, "translate": 0.1, "scale": [0.9, 1.1], "shear": 8}}], seed=seed)
    counter = iter(range(10**9))

    def augmented(images: Tensor) -> Tensor:
        plans = [augmenter.draw((8, 8), epoch=next(counter), index=0) for _ in images]
        return centred(torch_batch.run(plans, (images * 255).round().to(torch.uint8)).float() / 255)

    ways: dict[str, tuple[dict[str, Any], float, Callable[[Tensor], Tensor]]] = {
        "nothing": ({}, 0.0, centred),
        "weight decay": ({}, 0.3, centred),
        "dropout": ({"dropout": 0.5}, 0.0, centred),
        "augmentation": ({}, 0.0, augmented),
    }
    seen, scores = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for trial in range(TRIALS):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(TRIALS * seed + trial))[:FEW]
        few = images[chosen], targets[chosen]
        for way, (args, decay, change) in ways.items():
            torch.manual_seed(TRIALS * seed + trial)
            network = build("mlp", 10, image_size=(8, 8), hidden=[256, 256], args=args)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=decay, fused=True)
            train(network, few, optimizer, steps=800, change=change)
            seen[way] += accuracy(network, (centred(few[0]), few[1])) / TRIALS
            scores[way] += accuracy(network, (centred(held[0]), held[1])) / TRIALS
    gaps = {way: seen[way] - scores[way] for way in ways}
    found = ", ".join(f"{way} {gap:.1%} (hold-out {scores[way]:.1%})" for way, gap in gaps.items())
    return Outcome(
        gaps["augmentation"] < gaps["nothing"] - 0.005 and scores["augmentation"] > scores["nothing"] + 0.0025,
        f"train minus hold-out accuracy: {found}",
        {way: [gap] for way, gap in gaps.items()}, "", "train minus hold-out accuracy",
    )  # fmt: skip


def noise(seed: int) -> Outcome:
    (images, targets), (held, truth) = digits()
    levels = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    curves: dict[str, list[float]] = {}
    for way, spread in (("trained on clean digits", 0.0), ("trained with noise", 0.3)):
        torch.manual_seed(seed)
        network: nn.Module = build("cnn", 10, image_size=(8, 8), widths=[16, 32], norm="batch")

        def noisy(images: Tensor, spread: float = spread) -> Tensor:
            return centred(images + spread * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images[:, :1]))

        train(network, (images, targets), torch.optim.AdamW(network.parameters(), lr=3e-3), steps=300, change=noisy)
        generator = torch.Generator().manual_seed(7)
        disturbance = torch.randn(held[:, :1].shape, generator=generator)
        curves[way] = [accuracy(network, (centred(held + level * disturbance), truth)) for level in levels]
    clean, with_noise = curves.values()
    return Outcome(
        with_noise[3] > clean[3] + 0.03 and with_noise[0] > clean[0] - 0.03,
        f"hold-out accuracy at noise 0 and 0.3: trained clean {clean[0]:.1%} and {clean[3]:.1%}, with noise {with_noise[0]:.1%} "
        f"and {with_noise[3]:.1%}",
        curves, "standard deviation of the noise, in tenths of the range", "hold-out accuracy",
    )  # fmt: skip


LEARNING: Mapping[str, Experiment] = MappingProxyType(
    {
        "activations": Experiment(
            "ReLU and tanh, which is zero-centred, both reach a given loss sooner than sigmoid.", activations
        ),
        "zero-centred": Experiment(
            "Zero-centred inputs are learned from faster than inputs with an offset of three deviations.",
            mean_subtraction,
        ),
        "learning-rate": Experiment(
            "Too low a learning rate crawls, the right one learns, too high a one does not.", learning_rates
        ),
        "overfitting": Experiment(
            f"On {FEW} images, augmentation narrows the gap between training and hold-out, and raises the hold-out.",
            overfitting,
        ),
        "noise": Experiment("Training with noise keeps the accuracy on noisy images.", noise),
    }
)
