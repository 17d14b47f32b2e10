"""Experiments on the functions that a network can represent, and on signals and gradients in its layers."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from refract.models.layers.initialisation import initialise
from refract.models.registry import build
from refract.models.training.objective import classification_loss
from refract.pipeline.lab.experiment import Experiment, Outcome
from refract.pipeline.lab.small import accuracy, centred, digits, train

GATES = {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "xor": [0, 1, 1, 0]}
DEPTH, WIDTH = 10, 64
KILLING = 0.5
"""A learning rate at which many ReLU units die, while leaky ones still learn."""


def gate(name: str) -> tuple[Tensor, Tensor]:
    """Return the four inputs of a logic gate as images (4, 3, 1, 2), and its outputs (4,)."""
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return inputs.view(4, 1, 1, 2).expand(4, 3, 1, 2).contiguous(), torch.tensor(GATES[name])


def perceptron(seed: int) -> Outcome:
    best = {}
    for name in GATES:
        torch.manual_seed(seed)
        network, highest = build("perceptron", 2, image_size=(1, 2)), 0.0
        rule = torch.optim.SGD(network.parameters(), lr=1.0)
        for _ in range(100):
            train(network, gate(name), rule, steps=4, batch=1, loss="perceptron")
            highest = max(highest, accuracy(network, gate(name)))
        best[name] = highest
    listed = ", ".join(f"{name.upper()} {score:.0%}" for name, score in best.items())
    return Outcome(best["and"] == best["or"] == 1 and best["xor"] < 1, f"best accuracy in 100 epochs: {listed}")


def mlp_xor(seed: int) -> Outcome:
    solved = 0
    for trial in range(5):
        torch.manual_seed(5 * seed + trial)
        network = build("mlp", 2, image_size=(1, 2), hidden=[8], activation="tanh")
        losses = train(
            network, gate("xor"), torch.optim.Adam(network.parameters(), lr=0.05), steps=300, batch=4, until=0.05
        )
        solved += accuracy(network, gate("xor")) == 1
    return Outcome(
        solved == 5,
        f"8 hidden units solve XOR in {solved} of 5 trials",
        {"loss": losses},
        "step",
        "loss of a trial",
        True,
    )


def vanishing(seed: int) -> Outcome:
    norms = {}
    for activation, init in (("sigmoid", "xavier_normal"), ("relu", "he_normal")):
        torch.manual_seed(seed)
        network = initialise(build("mlp", 10, image_size=(8, 8), hidden=[WIDTH] * DEPTH, activation=activation), init)
        images, targets = digits()[0]
        classification_loss(network(centred(images[:256])), targets[:256], task="multiclass").backward()
        norms[activation] = [float(m.weight.grad.norm()) for m in network.layers if isinstance(m, nn.Linear)]  # type: ignore
    sigmoid, relu = (norms[name][0] / norms[name][-1] for name in ("sigmoid", "relu"))
    return Outcome(
        sigmoid < 1e-3 and relu > 0.1,
        f"ratio of the gradient norms of the first and the last of {DEPTH} layers: sigmoid {sigmoid:.1e}, ReLU {relu:.2f}",
        norms, "layer", "norm of the gradient", True,
    )  # fmt: skip


def depth_statistics(seed: int) -> Outcome:
    inputs = centred(digits()[0][0][:256])
    spreads: dict[str, list[float]] = {}
    saturated: dict[str, float] = {}
    for activation in ("tanh", "relu"):
        for init in ("small_gaussian", "large_gaussian", "xavier_normal", "he_normal"):
            torch.manual_seed(seed)
            network = initialise(
                build("mlp", 10, image_size=(8, 8), hidden=[500] * DEPTH, activation=activation), init
            ).layers
            values, layer_stds = inputs.flatten(1), []
            with torch.no_grad():
                for layer in network:  # type: ignore
                    values = layer(values)
                    if not isinstance(layer, nn.Linear | nn.Identity):
                        layer_stds.append(float(values.std()))
            spreads[f"{activation}, {init}"] = layer_stds
            saturated[f"{activation}, {init}"] = float((values.abs() > 0.95).float().mean())
    tanh_xavier = spreads["tanh, xavier_normal"][-1] / spreads["tanh, xavier_normal"][0]
    he, halved = (spreads[f"relu, {name}"][-1] / spreads[f"relu, {name}"][0] for name in ("he_normal", "xavier_normal"))
    holds = (
        spreads["tanh, small_gaussian"][-1] < 1e-3
        and saturated["tanh, large_gaussian"] > 0.8
        and 0.2 < tanh_xavier < 5
        and 0.2 < he < 5
        and halved < 0.2
    )
    return Outcome(
        holds,
        f"ratio of the standard deviations of layers {DEPTH} and 1: tanh with Xavier {tanh_xavier:.2f}, ReLU with He {he:.2f}, ReLU with "
        f"Xavier {halved:.2f}; tanh with small Gaussian weights falls to {spreads['tanh, small_gaussian'][-1]:.0e}, large ones saturate "
        f"{saturated['tanh, large_gaussian']:.0%} of the tanh units",
        spreads, "layer", "standard deviation", True,
    )  # fmt: skip


def dead_relus(seed: int) -> Outcome:
    """Count the units whose bias has no gradient from any digit after 200 steps."""
    dead, scores = {}, {}
    inputs, targets = centred(digits()[0][0]), digits()[0][1]
    for label, activation, lr in (
        (f"ReLU, lr {KILLING}", "relu", KILLING),
        ("ReLU, lr 0.1", "relu", 0.1),
        (f"leaky ReLU, lr {KILLING}", "leaky_relu", KILLING),
    ):
        torch.manual_seed(seed)
        network = initialise(build("mlp", 10, image_size=(8, 8), hidden=[100, 100], activation=activation), "he_normal")
        train(network, (inputs, targets), torch.optim.SGD(network.parameters(), lr=lr), steps=200)
        has_gradient = []
        values = inputs.flatten(1)
        for layer in network.layers:  # type: ignore
            if isinstance(layer, nn.Linear):
                before = layer(values).detach().requires_grad_()
            elif isinstance(layer, nn.Identity):
                continue
            else:
                values = layer(before)
                (slope,) = torch.autograd.grad(values.sum(), before)
                has_gradient.append((slope != 0).any(dim=0))
                values = values.detach()
        dead[label] = 1 - float(torch.cat(has_gradient).float().mean())
        scores[label] = accuracy(network, (inputs, targets))
    high, low, leaky = dead.values()
    return Outcome(
        high > 0.1 and low < 0.05 and leaky == 0 and scores[f"leaky ReLU, lr {KILLING}"] > 0.9,
        "units without gradient on any of 1,297 digits after 200 steps, and training accuracy: "
        + ", ".join(f"{label} {fraction:.0%}, {scores[label]:.0%}" for label, fraction in dead.items()),
        {label: [fraction] for label, fraction in dead.items()}, "", "fraction of dead units",
    )  # fmt: skip


def batch_norm(seed: int) -> Outcome:
    scores: dict[str, list[float]] = {"none": [], "batch": []}
    deviations = [10 ** (k / 2) for k in range(-4, 2)]
    (inputs, targets), (test_inputs, test_targets) = digits()
    for norm, norm_scores in scores.items():
        for deviation in deviations:
            torch.manual_seed(seed)
            network = build("mlp", 10, image_size=(8, 8), hidden=[64] * 5, norm=norm)
            for module in network.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=deviation)
            train(
                network,
                (centred(inputs), targets),
                torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
                steps=100,
            )
            norm_scores.append(accuracy(network, (centred(test_inputs), test_targets)))
    good = {norm: sum(score > 0.85 for score in norm_scores) for norm, norm_scores in scores.items()}
    return Outcome(
        good["batch"] >= 5 and good["none"] <= 3,
        f"of {len(deviations)} Gaussian initialisations with standard deviations from {min(deviations):.2g} to {max(deviations):.2g}, "
        f"{good['batch']} exceed 85 % with batch normalisation and {good['none']} without",
        {f"norm: {norm}": norm_scores for norm, norm_scores in scores.items()},
        f"standard deviation of the weights, from {min(deviations):.2g}, each √10 times the previous one",
        "test accuracy",
    )


SIGNALS: Mapping[str, Experiment] = MappingProxyType(
    {
        "perceptron": Experiment("A perceptron learns AND and OR, but not XOR.", perceptron),
        "mlp-xor": Experiment("With one hidden layer, a network learns XOR.", mlp_xor),
        "vanishing-gradients": Experiment(
            "Deep sigmoid networks lose their gradient layer by layer; ReLU networks do not.", vanishing
        ),
        "initialisation": Experiment(
            "Small Gaussian weights make activations vanish, large ones saturate tanh; Xavier suits tanh, and He suits ReLU.",
            depth_statistics,
        ),
        "dead-relus": Experiment(
            "A learning rate that is too high kills ReLU units; a lower one or a leaky ReLU does not.", dead_relus
        ),
        "batch-norm": Experiment("Batch normalisation makes training robust to a bad initialisation.", batch_norm),
    }
)
