"""Quantisation-aware training: what is rounded, which gradients pass, and that the network is unchanged afterwards."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.overrides
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from refract.models.registry import build
from refract.models.training.quantization_aware import (
    ACTIVATION_LEVELS,
    WEIGHT_LEVELS,
    round_activations,
    round_weights,
    rounded_forward,
)

NUMBERS = st.floats(-100, 100, width=32)


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_weights_become_whole_multiples_of_each_channels_step(rows: list[list[float]]) -> None:
    weights = torch.tensor(rows)
    rounded = round_weights(weights)
    for before, after in zip(weights, rounded, strict=True):
        step = before.abs().max().double() / WEIGHT_LEVELS
        if step > 1e-30:
            multiples = after.double() / step
            torch.testing.assert_close(multiples, multiples.round(), atol=1e-3, rtol=0)
            assert (after - before).abs().max() <= 0.51 * step


@given(st.lists(NUMBERS, min_size=1, max_size=50))
def test_activations_have_256_steps_and_zero_stays_zero(values: list[float]) -> None:
    rounded = round_activations(torch.tensor([0.0, *values]))
    assert rounded[0] == 0, "padding and ReLU give zeros, which 8 bits represent exactly"
    extent = max(0.0, *values) - min(0.0, *values)
    assert (rounded[1:] - torch.tensor(values)).abs().max() <= 1.01 * extent / ACTIVATION_LEVELS + 1e-30
    assert len(rounded.unique()) <= ACTIVATION_LEVELS + 1


def test_weights_have_7_bits_and_activations_8() -> None:
    assert len(round_weights(torch.linspace(-1, 1, 5000)[None]).unique()) == 127
    assert len(round_activations(torch.linspace(-1, 3, 5000)).unique()) == 256


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3, padding=1), nn.Conv1d(3, 4, 3)])
def test_a_layer_computes_with_rounded_weights_and_inputs(layer: nn.Module) -> None:
    inputs = torch.randn(*{nn.Linear: (5, 6), nn.Conv2d: (2, 3, 8, 8), nn.Conv1d: (2, 3, 8)}[type(layer)])
    expected_layer = deepcopy(layer)
    with torch.no_grad():
        expected_layer.weight.copy_(round_weights(layer.weight))
        with rounded_forward(layer):
            got = layer(inputs)
        torch.testing.assert_close(got, expected_layer(round_activations(inputs)), atol=0, rtol=0)
        assert not torch.equal(got, expected_layer(inputs)) and not torch.equal(got, layer(inputs))


@pytest.mark.parametrize("name", ["torchvision/vit_b_32", "torchvision/swin_t", "timm/test_vit"])
def test_all_weights_of_a_transformer_are_rounded(name: str) -> None:
    """Rounding them twice changes nothing: with rounded weights, only the activations are rounded by the block."""
    torch.manual_seed(0)
    side = 160 if name.startswith("timm") else 224
    network = build(name, 5, image_size=(side, side)).eval()
    read: set[int] = set()
    plain = {id(parameter) for parameter in network.parameters() if parameter.ndim > 1}

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (nn.functional.linear, nn.functional.conv2d, nn.functional.multi_head_attention_forward):
                read.update(id(value) for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), rounded_forward(network), Spy():
        network(torch.randn(1, 3, side, side))
    assert not plain & read


def test_gradients_pass_through_the_rounding() -> None:
    weights = torch.randn(4, 3, 3, 3, requires_grad=True)
    activations = torch.randn(2, 3, 5, 5, requires_grad=True)
    (round_weights(weights).sum() + round_activations(activations).sum()).backward()
    assert weights.grad.eq(1).all() and activations.grad.eq(1).all()


@pytest.mark.parametrize("name", ["resnet20", "lenet5", "timm/test_resnet", "timm/test_vit", "timm/test_mambaout"])
def test_a_network_is_rounded_in_the_block_alone(name: str) -> None:
    torch.manual_seed(0)
    side = 160 if "vit" in name else 32
    network = build(name, 5, image_size=(side, side)).eval()
    before, images = deepcopy(network.state_dict()), torch.randn(2, 3, side, side)
    with torch.no_grad():
        plain = network(images)
        with rounded_forward(network) as count:
            rounded = network(images)
            assert network.state_dict().keys() == before.keys()
        again = network(images)
    assert count > 2 and not torch.equal(plain, rounded)
    assert (rounded - plain).norm() < 0.5 * plain.norm()
    assert torch.equal(plain, again)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_every_parameter_gets_a_gradient_and_an_error_restores_the_network() -> None:
    network = build("resnet20", 5, image_size=(32, 32)).train()
    with rounded_forward(network):
        network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with pytest.raises(RuntimeError), rounded_forward(network):
        network(torch.randn(2, 4, 32, 32))
    assert all(isinstance(layer.weight, nn.Parameter) for layer in network.modules() if isinstance(layer, nn.Conv2d))


def test_the_rounded_network_errs_as_much_as_the_quantised_one() -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx, which quantises")
    from refract.models.classifier import Classifier
    from refract.models.conversion.deployable import OUTPUTS, Deployable
    from refract.models.conversion.int8 import quantise
    from refract.models.conversion.onnx import open_session, to_onnx

    torch.manual_seed(0)
    network = build("resnet20", 5, image_size=(32, 32)).train()
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    network(images.float() / 64 - 2)  # statistics of the batch norms
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    classifier = Classifier(network.eval(), mean=(0.5,) * 3, std=(0.25,) * 3)
    deployable = Deployable(classifier, task="multiclass", temperature=1.0)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    session = open_session(quantise(to_onnx(deployable, torch.from_numpy(pixels), OUTPUTS), pixels))
    with torch.no_grad():
        plain = deployable(torch.from_numpy(pixels))[1]
        with rounded_forward(network):
            rounded = deployable(torch.from_numpy(pixels))[1]
    quantised = session.run(None, {session.get_inputs()[0].name: pixels})[1]
    difference, predicted = quantised - plain.numpy(), (rounded - plain).numpy()
    assert 0.5 < np.linalg.norm(predicted) / np.linalg.norm(difference) < 2
