"""Each layer against its formula, with values computed by hand or by NumPy."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from refract.models.architectures import mlp as mlp_module
from refract.models.architectures.cnn import CNN
from refract.models.architectures.mlp import MLP, contrastive_divergence
from refract.models.layers.activations import ACTIVATIONS, Maxout, make_activation
from refract.models.layers.convolutions import CONVS, ChannelShuffle, make_conv
from refract.models.layers.initialisation import INITIALISATIONS, initialise
from refract.models.layers.norms import NORMS, make_norm, standardise_weights
from refract.models.layers.pooling import GLOBAL_POOLS, POOLS, GeneralisedMean, StochasticPool, make_pool
from refract.models.registry import build

X = np.array([-2.0, -0.5, 0.0, 0.5, 2.0])


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("step", {}, X >= 0),
        ("sigmoid", {}, 1 / (1 + np.exp(-X))),
        ("sigmoid", {"slope": 3.0}, 1 / (1 + np.exp(-3 * X))),
        ("tanh", {}, np.tanh(X)),
        ("relu", {}, np.maximum(X, 0)),
        ("leaky_relu", {"negative_slope": 0.1}, np.where(X > 0, X, 0.1 * X)),
        ("prelu", {"init": 0.3}, np.where(X > 0, X, 0.3 * X)),
        ("elu", {}, np.where(X > 0, X, np.exp(X) - 1)),
        ("silu", {}, X / (1 + np.exp(-X))),
        ("gelu", {}, X * np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in X])),
        ("mish", {}, X * np.tanh(np.log1p(np.exp(X)))),
        ("identity", {}, X),
    ],
)
def test_activations(name: str, args: dict[str, float], expected: np.ndarray) -> None:
    result = make_activation(name, **args)(torch.tensor(X, dtype=torch.float32))
    np.testing.assert_allclose(result.detach().numpy(), expected, atol=1e-6)


def test_maxout_takes_the_largest_of_neighbouring_channels() -> None:
    values = torch.tensor([[1.0, 5.0, -3.0, 2.0, 0.0, -1.0]])
    assert Maxout(2)(values).tolist() == [[5.0, 2.0, 0.0]]
    assert Maxout(3)(values).tolist() == [[5.0, 2.0]]
    with pytest.raises(ValueError, match="maxout got 6 channels: expected a multiple of"):
        Maxout(4)(values)


def test_the_step_has_no_gradient() -> None:
    values = torch.randn(5, requires_grad=True)
    make_activation("step")(values).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0] * 5


def test_unknown_names_and_arguments_are_reported() -> None:
    with pytest.raises(ValueError, match=r"activation='rleu': expected one of .*; did you mean 'relu'"):
        make_activation("rleu")
    with pytest.raises(ValueError, match="activation 'tanh' rejects its arguments"):
        make_activation("tanh", slope=2.0)
    for make, kind in (
        (make_pool, "pool"),
        (lambda name: make_norm(name, 4), "norm"),
        (lambda n: make_conv(n, 1, 1), "conv"),
    ):
        with pytest.raises(ValueError, match=f"{kind}='nothing'"):
            make("nothing")


@pytest.mark.parametrize("name", POOLS)
def test_a_pooling_can_be_sent_to_another_process(name: str) -> None:
    values = torch.rand(2, 3, 6, 6)
    pool = make_pool(name).eval()
    assert torch.equal(pickle.loads(pickle.dumps(pool))(values), pool(values))


def normed(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    mean, variance = values.mean(dims, keepdim=True), values.var(dims, correction=0, keepdim=True)
    return (values - mean) / torch.sqrt(variance + 1e-5)


def test_norms() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 16, 5, 5) * 3 + 1
    for name, expected in (
        ("batch", normed(values, (0, 2, 3))),
        ("layer", normed(values, (1, 2, 3))),
        ("instance", normed(values, (2, 3))),
        ("group", normed(values.view(4, 8, 2, 5, 5), (2, 3, 4)).view(4, 16, 5, 5)),
        ("none", values),
    ):
        torch.testing.assert_close(make_norm(name, 16)(values), expected, rtol=1e-4, atol=1e-4)
    vectors = torch.randn(6, 16)
    torch.testing.assert_close(make_norm("layer", 16, dims=0)(vectors), normed(vectors, (1,)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="norm='instance' needs feature maps"):
        make_norm("instance", 16, dims=0)


def test_local_response_is_alexnets() -> None:
    values = torch.arange(1.0, 8.0).view(1, 7, 1, 1) * 10
    result = make_norm("local_response", 7)(values)
    near = [sum((10.0 * (j + 1)) ** 2 for j in range(max(0, i - 2), min(7, i + 3))) for i in range(7)]
    expected = [10.0 * (i + 1) / (2 + 1e-4 * total) ** 0.75 for i, total in enumerate(near)]
    np.testing.assert_allclose(result.flatten().numpy(), expected, rtol=1e-5)


def test_standardised_weights_have_mean_0_and_variance_1() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight.mul_(5).add_(2)
    standardise_weights(layer)
    flat = layer.weight.flatten(1)
    assert flat.mean(dim=1).abs().max() < 1e-5
    assert (flat.var(dim=1, correction=0) - 1).abs().max() < 1e-3


def test_pooling() -> None:
    values = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]]).view(1, 1, 2, 4)
    assert make_pool("max")(values).flatten().tolist() == [4, 0]
    assert make_pool("average")(values).flatten().tolist() == [2.5, 0]
    # (1·1 + 2·2 + 3·3 + 4·4) / 10, and nothing of a window of zeros
    assert StochasticPool().eval()(values).flatten().tolist() == [3, 0]


def test_stochastic_pooling_draws_by_size() -> None:
    torch.manual_seed(0)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(20_000, 1, 2, 2)
    drawn = StochasticPool().train()(values).flatten()
    shares = [float((drawn == value).float().mean()) for value in (1, 2, 3, 4)]
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.015)


def test_generalised_mean_is_the_mean_and_nears_the_maximum() -> None:
    values = torch.rand(2, 3, 4, 4) + 0.1
    torch.testing.assert_close(GeneralisedMean(1.0)(values), values.mean((2, 3)))
    torch.testing.assert_close(GeneralisedMean(3.0)(values), values.pow(3).mean((2, 3)).pow(1 / 3))
    assert (GeneralisedMean(200.0)(values) / values.amax((2, 3)) > 0.98).all()


@pytest.mark.parametrize("name", [name for name in CONVS if name != "3d"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_keep_the_size(name: str, kernel: int) -> None:
    assert make_conv(name, 8, 12, kernel=kernel)(torch.randn(2, 8, 9, 7)).shape == (2, 12, 9, 7)


def test_convolutions_have_the_weights_of_their_kind() -> None:
    def count(name: str) -> int:
        return sum(p.numel() for p in make_conv(name, 16, 32, kernel=5).parameters())

    assert {name: count(name) for name in CONVS} == {
        "plain": 25 * 16 * 32,
        "pointwise": 16 * 32,
        "3d": 125 * 16 * 32,
        "transposed": 25 * 16 * 32,
        "dilated": 25 * 16 * 32,
        "spatially_separable": 5 * 16 * 32 + 5 * 32 * 32,
        "depthwise_separable": 25 * 16 + 16 * 32,
        "grouped": 25 * 16 * 32 // 4,
        "shuffled": 25 * 16 * 32 // 4,
    }


def test_channel_shuffle_interleaves_the_groups() -> None:
    values = torch.arange(6.0).view(1, 6, 1, 1)
    assert ChannelShuffle(2)(values).flatten().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("small_gaussian", 0.01),
        ("large_gaussian", 1.0),
        ("lecun_normal", math.sqrt(1 / 400)),
        ("xavier_normal", math.sqrt(2 / 1000)),
        ("xavier_uniform", math.sqrt(2 / 1000)),
        ("he_normal", math.sqrt(2 / 400)),
        ("he_uniform", math.sqrt(2 / 400)),
    ],
)
def test_initialisation_has_its_deviation(name: str, deviation: float) -> None:
    torch.manual_seed(0)
    layer = initialise(nn.Linear(400, 600), name)
    assert float(layer.weight.std()) == pytest.approx(deviation, rel=0.01)
    assert abs(float(layer.weight.mean())) < 0.01 * deviation + 1e-4
    assert not layer.bias.any()


def test_orthogonal_rows() -> None:
    weight = initialise(nn.Linear(50, 20), "orthogonal").weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(20), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["none", "batch", "weight_standardisation"])
def test_lsuv_gives_every_layer_outputs_of_variance_1(norm: str) -> None:
    torch.manual_seed(0)
    network = build("cnn", 4, image_size=(16, 16), widths=[8, 16], depth=2, norm=norm)
    images = torch.randn(64, 3, 16, 16) * 3
    before = {key: value.clone() for key, value in network.named_buffers()}
    initialise(network, "lsuv", images)
    assert all(torch.equal(value, before[key]) for key, value in network.named_buffers())
    deviations: list[float] = []
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: deviations.append(float(output.std())))
    network.train()(images)
    if norm == "weight_standardisation":  # its scale has no effect, so lsuv leaves the stored weights unchanged
        stored = [layer.parametrizations.weight.original for layer in layers[:-1]]
        assert all(float((weight.flatten(1) ** 2).sum(dim=1).mean()) > 0.1 for weight in stored)
    else:
        assert deviations == pytest.approx([1] * len(layers), abs=0.02)
    with pytest.raises(ValueError, match="lsuv' needs a batch"):
        initialise(network, "lsuv")


def test_contrastive_divergence_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    patterns = (torch.rand(4, 30) > 0.5).float()
    visible = patterns[torch.randint(4, (400,))]
    errors = contrastive_divergence(nn.Linear(30, 16), visible, epochs=15, lr=0.2)
    assert errors[-1] < 0.4 * errors[0]


def test_an_mlp_is_pretrained_layer_by_layer() -> None:
    torch.manual_seed(0)
    network = MLP(3, image_size=(8, 8), hidden=[20, 10], activation="sigmoid", pretrain="rbm", pretrain_epochs=2)
    before = [p.clone() for p in network.parameters()]
    network.prepare(torch.randn(50, 3, 8, 8))
    moved = [not torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True)]
    assert moved == [True, True, True, True, False, False]  # both hidden layers, not the head
    with pytest.raises(ValueError, match="pretrain='rbm' with activation=.*: set activation: sigmoid"):
        MLP(3, image_size=(8, 8), pretrain="rbm")


def test_dropout_with_batch_norm_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    MLP(3, image_size=(8, 8), norm="batch", dropout=0.5)
    assert "dropout before a batch norm" in caplog.text


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_a_network(activation: str) -> None:
    assert build("mlp", 3, image_size=(8, 8), activation=activation)(torch.randn(4, 3, 8, 8)).shape == (4, 3)


@pytest.mark.parametrize(
    "args",
    [{"conv": name} for name in CONVS]
    + [{"norm": name} for name in NORMS]
    + [{"pool": name} for name in POOLS]
    + [{"global_pool": name} for name in GLOBAL_POOLS]
    + [
        {"activation": "maxout"},
        {"residual": True, "depth": 3, "drop_path": 0.5, "dropout": 0.2},
        {"conv": "3d", "norm": "instance"},
    ],
    ids=str,
)
def test_every_layer_in_a_convolutional_network_learns(args: dict) -> None:
    torch.manual_seed(0)
    network = build("cnn", 4, image_size=(16, 16), widths=[8, 16], **args)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(network(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("init", [name for name in INITIALISATIONS if name != "lsuv"])
def test_every_initialisation_on_a_network(init: str) -> None:
    network = initialise(build("resnet20", 3, image_size=(16, 16)), init)
    assert torch.isfinite(network(torch.randn(2, 3, 16, 16))).all()


def test_lsuv_measures_before_an_in_place_activation() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    images = torch.randn(64, 3, 12, 12)
    initialise(network, "lsuv", images)
    assert float(network[0](images).std()) == pytest.approx(1, abs=0.02)


def test_a_transposed_convolution_is_initialised_by_its_fans() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 256, 3)
    initialise(layer, "he_normal")
    assert float(layer.weight.std()) == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.02)
    initialise(layer, "orthogonal")
    rows = layer.weight.transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.T @ rows, torch.eye(72), atol=1e-4, rtol=0)


def test_pretraining_fits_the_inputs_that_the_network_gets() -> None:
    torch.manual_seed(0)
    images = torch.rand(300, 3, 4, 4) * 3 - 1.2
    network = MLP(2, image_size=(4, 4), hidden=(12, 6), activation="sigmoid", pretrain="rbm", pretrain_epochs=2)
    seen = []
    real = mlp_module.contrastive_divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mlp_module, "contrastive_divergence", lambda layer, v, **more: seen.append(v) or real(layer, v, **more)
        )
        network.prepare(images)
    assert seen[0].min() == 0 and seen[0].max() == 1
    first = network.layers[:3](images.flatten(1))
    torch.testing.assert_close(first, seen[1], atol=1e-5, rtol=0)


def test_stochastic_pooling_draws_rare_values_in_bf16_too() -> None:
    torch.manual_seed(0)
    window = torch.tensor([[0.01, 9.97], [0.01, 0.01]], dtype=torch.bfloat16).expand(1, 1, 200_000, 2, 2)
    images = window.reshape(1, 1, 400_000, 2).contiguous()
    drawn = StochasticPool()(images)
    assert drawn.dtype == torch.bfloat16
    assert float((drawn < 1).float().mean()) == pytest.approx(0.003, abs=0.0006)


def test_the_generalised_mean_has_a_gradient_on_a_map_of_zeros() -> None:
    pool = GeneralisedMean(8.0)
    pool(torch.zeros(2, 3, 4, 4)).sum().backward()
    assert pool.p.grad.isfinite()


def test_weight_standardisation_reaches_linear_layers_and_refuses_transposed_ones() -> None:
    network = MLP(2, image_size=(4, 4), hidden=(12,), norm="weight_standardisation")
    assert float(network.layers[0].weight.mean(dim=1).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="does not support conv='transposed'"):
        CNN(2, image_size=(16, 16), conv="transposed", norm="weight_standardisation")
