"""Experiments on how fast and how well networks learn."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from refract.augment import Augmenter
from refract.augment.executors import torch_batch
from refract.models.registry import build
from refract.pipeline.lab.experiment import Experiment, Outcome
from refract.pipeline.lab.small import accuracy, centred, digits, train

FEW, TRIALS = 500, 2


def activations(seed: int) -> Outcome:
    """Count the steps to a loss of 0.1, for each activation at the best of five learning rates."""
    data = (centred(digits()[0][0]), digits()[0][1])
    steps, curves = {}, {}
    for activation in ("relu", "tanh", "sigmoid"):
        best: list[float] = []
        for lr in (0.1, 0.3, 0.03, 1.0, 0.01):
            torch.manual_seed(seed)
            network = build("mlp", 10, image_size=(8, 8), hidden=[64, 64, 64], activation=activation)
            optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
            losses = train(network, data, optimizer, steps=len(best) or 1000, until=0.1)
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
    """Count the steps to a loss of 0.2, for images of variance 1 with an offset of three standard deviations and without it.

    Each form is trained at the best of five learning rates.
    """
    images, targets = digits()[0]
    forms = {"offset": images / images.std() + 3, "centred": centred(images)}
    steps, curves = {}, {}
    for form, inputs in forms.items():
        best: list[float] = []
        for lr in (0.1, 0.03, 0.3, 0.01, 0.003):
            torch.manual_seed(seed)
            network = build("mlp", 10, image_size=(8, 8), hidden=[64], activation="tanh")
            optimizer = torch.optim.SGD(network.parameters(), lr=lr)
            losses = train(network, (inputs, targets), optimizer, steps=len(best) or 1500, until=0.2)
            if sum(losses[-10:]) < 2 and (not best or len(losses) < len(best)):
                best = losses
        steps[form], curves[form] = len(best) or 1500, best
    return Outcome(
        steps["centred"] * 1.5 < steps["offset"],
        f"steps to a loss of 0.2 at the best learning rate: mean subtracted {steps['centred']}, offset by three standard deviations "
        f"{steps['offset']}",
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
        f"loss after 400 steps, {start:.2f} at the start: {low:.2f} at rate 0.0003, {right:.3f} at 0.1, {high:.3g} at 10",
        curves, "step", "loss", True,
    )  # fmt: skip


def overfitting(seed: int) -> Outcome:
    """Measure the gap of training and test accuracy on FEW training digits, the mean of TRIALS trials with different digits."""
    (images, targets), test = digits()
    augmenter = Augmenter([{"Affine": {"degrees": 12, "translate": 0.1, "scale": [0.9, 1.1], "shear": 8}}], seed=seed)
    counter = iter(range(10**9))

    def augmented(images: Tensor) -> Tensor:
        plans = [augmenter.draw((8, 8), epoch=next(counter), index=0) for _ in images]
        return centred(torch_batch.run(plans, (images * 255).round().to(torch.uint8)).float() / 255)

    methods: dict[str, tuple[dict[str, Any], float, Callable[[Tensor], Tensor]]] = {
        "nothing": ({}, 0.0, centred),
        "weight decay": ({}, 0.3, centred),
        "dropout": ({"dropout": 0.5}, 0.0, centred),
        "augmentation": ({}, 0.0, augmented),
    }
    train_scores, test_scores = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0.0)
    for trial in range(TRIALS):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(TRIALS * seed + trial))[:FEW]
        few = images[chosen], targets[chosen]
        for method, (args, decay, change) in methods.items():
            torch.manual_seed(TRIALS * seed + trial)
            network = build("mlp", 10, image_size=(8, 8), hidden=[256, 256], args=args)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=decay, fused=True)
            train(network, few, optimizer, steps=800, change=change)
            train_scores[method] += accuracy(network, (centred(few[0]), few[1])) / TRIALS
            test_scores[method] += accuracy(network, (centred(test[0]), test[1])) / TRIALS
    gaps = {method: train_scores[method] - test_scores[method] for method in methods}
    listed = ", ".join(f"{method} {gap:.1%} (test {test_scores[method]:.1%})" for method, gap in gaps.items())
    return Outcome(
        gaps["augmentation"] < gaps["nothing"] - 0.005 and test_scores["augmentation"] > test_scores["nothing"] + 0.0025,
        f"training minus test accuracy: {listed}",
        {method: [gap] for method, gap in gaps.items()}, "", "training minus test accuracy",
    )  # fmt: skip


def noise(seed: int) -> Outcome:
    (images, targets), (test_images, test_targets) = digits()
    levels = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    curves: dict[str, list[float]] = {}
    for method, spread in (("trained on clean digits", 0.0), ("trained with noise", 0.3)):
        torch.manual_seed(seed)
        network: nn.Module = build("cnn", 10, image_size=(8, 8), widths=[16, 32], norm="batch")

        def noisy(images: Tensor, spread: float = spread) -> Tensor:
            return centred(images + spread * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images[:, :1]))

        train(network, (images, targets), torch.optim.AdamW(network.parameters(), lr=3e-3), steps=300, change=noisy)
        generator = torch.Generator().manual_seed(7)
        disturbance = torch.randn(test_images[:, :1].shape, generator=generator)
        curves[method] = [
            accuracy(network, (centred(test_images + level * disturbance), test_targets)) for level in levels
        ]
    clean, with_noise = curves.values()
    return Outcome(
        with_noise[3] > clean[3] + 0.03 and with_noise[0] > clean[0] - 0.03,
        f"test accuracy at noise 0 and 0.3: {clean[0]:.1%} and {clean[3]:.1%} trained on clean digits, {with_noise[0]:.1%} and "
        f"{with_noise[3]:.1%} trained with noise",
        curves, "standard deviation of the noise, in tenths of the range", "test accuracy",
    )  # fmt: skip


LEARNING: Mapping[str, Experiment] = MappingProxyType(
    {
        "activations": Experiment(
            "ReLU and tanh both reach a given loss sooner than sigmoid; of the three, only tanh has outputs centred on zero.",
            activations,
        ),
        "zero-centred": Experiment(
            "Networks learn faster from inputs with zero mean than from inputs with an offset of three standard deviations.",
            mean_subtraction,
        ),
        "learning-rate": Experiment(
            "A learning rate that is too low learns slowly, and one that is too high does not learn.", learning_rates
        ),
        "overfitting": Experiment(
            f"On {FEW} images, augmentation narrows the gap between training and test accuracy, and raises test accuracy.",
            overfitting,
        ),
        "noise": Experiment("Training with noise preserves the accuracy on noisy images.", noise),
    }
)
