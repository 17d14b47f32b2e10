"""Optimisers and schedules: weight decay, and the learning rate at each step."""

import pytest
import torch
from torch import nn

from refract.models.registry import build
from refract.models.training.optimizers import OPTIMIZERS
from refract.models.training.parameter_groups import parameter_groups
from refract.models.training.schedules import SCHEDULES, warmup_schedule
from refract.models.training.specs import OptimSpec


def test_norms_and_biases_do_not_decay() -> None:
    network = build("resnet20", 3, image_size=(32, 32))
    decayed, biases, norms = parameter_groups(network, OptimSpec(lr=0.1, norm_lr=3.0, weight_decay=0.05))
    assert (decayed["weight_decay"], biases["weight_decay"], norms["weight_decay"]) == (0.05, 0.0, 0.0)
    assert (decayed["lr"], biases["lr"], norms["lr"]) == pytest.approx((0.1, 0.1, 0.3))
    kinds = {id(p): type(m) for m in network.modules() for p in m.parameters(recurse=False)}
    assert {kinds[id(p)] for p in decayed["params"]} == {nn.Conv2d, nn.Linear}
    assert {kinds[id(p)] for p in biases["params"]} == {nn.Linear}
    assert {kinds[id(p)] for p in norms["params"]} == {nn.BatchNorm2d}
    assert sum(len(group["params"]) for group in (decayed, biases, norms)) == len(list(network.parameters()))


def test_only_what_requires_a_gradient_is_in_a_group() -> None:
    network = build("resnet20", 3, image_size=(32, 32)).requires_grad_(False)
    network.head.weight.requires_grad_(True)
    (group,) = parameter_groups(network, OptimSpec(lr=1e-3))
    assert [id(p) for p in group["params"]] == [id(network.head.weight)]
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        parameter_groups(network.requires_grad_(False), OptimSpec(lr=1e-3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    optimizer = OptimSpec(name=name, lr=50.0 if name == "adadelta" else 0.05, weight_decay=0.0).make(layer)
    images, targets = torch.randn(16, 4), torch.randn(16, 1)
    losses = []
    for _ in range(20):
        loss = (layer(images) - targets).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_sgd_is_nesterov_with_momentum_and_plain_without() -> None:
    for momentum, nesterov in ((0.9, True), (0.0, False)):
        optimizer = OptimSpec(name="sgd", lr=0.1, weight_decay=0.0, momentum=momentum).make(nn.Linear(2, 2))
        assert optimizer.defaults["nesterov"] is nesterov
        assert optimizer.defaults["momentum"] == momentum


def test_bad_optimizer_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"name='adan': expected one of sgd, .*; did you mean 'adam'\?"):
        OptimSpec(name="adan")
    changes = {
        "lr": 0.0,
        "momentum": 1.0,
        "weight_decay": -0.1,
        "lr_end": 2,
        "norm_lr": 0,
        "layer_decay": 0,
        "clip_norm": 0.0,
    }
    for name, value in [*changes.items(), ("lr", float("nan")), ("sam", -1), ("clip_value", -1.0)]:
        with pytest.raises(ValueError, match=f"{name}="):
            OptimSpec(**{name: value})


def test_cosine_with_warmup() -> None:
    factors = [warmup_schedule("cosine", step, 10, 0.2) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)  # half of the eight steps after the warm-up
    assert factors[9] == pytest.approx(0.038060, abs=1e-6)  # (1 + cos(7π/8)) / 2
    assert factors[10] == pytest.approx(0.0, abs=1e-12)
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_constant_with_warmup() -> None:
    assert [warmup_schedule("constant", step, 8, 0.5) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_every_step_moves_and_some_step_is_whole(name: str, total: int, warmup: float) -> None:
    factors = [warmup_schedule(name, step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    # Lightning asks once more after the last step.
    assert 0 <= warmup_schedule(name, total, total, warmup) <= 1
    assert 0 <= warmup_schedule(name, total + 5, total, warmup) <= 1


def test_bad_schedule_parameters_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"schedule='cosin': expected one of constant, linear, cosine, .*; did you mean 'cosine'\?"
    ):
        warmup_schedule("cosin", 0, 10, 0.1)
    with pytest.raises(ValueError, match=r"warmup=1\.5"):
        warmup_schedule("cosine", 0, 10, 1.5)
    with pytest.raises(ValueError, match="total_steps=0"):
        warmup_schedule("cosine", 0, 0, 0.1)


def test_schedules_by_hand() -> None:
    def course(name: str, end: float = 0.0, warmup: float = 0.0) -> list[float]:
        return [warmup_schedule(name, step, 20, warmup, end) for step in range(20)]

    assert course("linear")[::5] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert course("linear", end=0.2)[::5] == pytest.approx([1, 0.8, 0.6, 0.4])
    assert [course("step")[k] for k in (0, 9, 10, 14, 15, 19)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    # √(w / t): after 4 steps of warm-up, at step 16 a half.
    assert course("inverse_sqrt", warmup=0.2)[16 - 4 + 4] == pytest.approx(0.5)
    assert course("one_cycle")[18] == pytest.approx(0.04)
    assert warmup_schedule("one_cycle", 20, 20, 0.0) == pytest.approx(0)


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("swin_t", "relative_position_bias_table"),
        ("convnext_tiny", "layer_scale"),
        ("timm/vit_tiny_patch16_224", "pos_embed"),
        ("timm/vit_tiny_patch16_224", "cls_token"),
        ("timm/resmlp_12_224", "norm1.alpha"),
    ],
)
def test_tokens_positions_and_scales_do_not_decay(name: str, spared: str) -> None:
    network = build(name, 3, image_size=(224, 224))
    groups = parameter_groups(network, OptimSpec(lr=1e-3, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    rates = {key: decay[id(p)] for key, p in network.named_parameters()}
    assert {rate for key, rate in rates.items() if spared in key} == {0.0}
    kernels = [m.weight for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(decay[id(weight)] == 0.1 for weight in kernels)


def test_standardised_weights_decay() -> None:
    network = build("cnn", 3, image_size=(16, 16), norm="weight_standardisation")
    decayed = [g for g in parameter_groups(network, OptimSpec(lr=1e-3, weight_decay=0.1)) if g["weight_decay"]]
    assert len(decayed[0]["params"]) == 4, "three convolutions and the head"


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_goes_below_lr_end(name: str) -> None:
    factors = [warmup_schedule(name, step, 200, 0.1, 0.05) for step in range(201)]
    assert min(factors[20:]) >= 0.05 - 1e-12
    if name in ("linear", "cosine", "one_cycle", "step"):
        assert factors[-1] == pytest.approx(0.05)
    if name == "step":
        assert factors[20 + 100] == pytest.approx(0.1), "as in the paper"


def test_the_steps_of_the_head_have_a_separate_schedule() -> None:
    spec = OptimSpec(lr=1e-3, warmup=0.2)
    factors = [spec.factor(step, 30, head_steps=10) for step in range(30)]
    assert factors[:2] == [0.5, 1.0] and factors[:10] == [spec.factor(step, 10) for step in range(10)]
    assert factors[10:] == [spec.factor(step, 20) for step in range(20)]
    assert [spec.factor(step, 10, head_steps=10) for step in range(12)][10:] == [1.0, 0.0]


def test_the_head_has_its_own_learning_rate() -> None:
    network = build("resnet20", 3, image_size=(32, 32))
    groups = parameter_groups(network, OptimSpec(lr=1e-3, head_lr=4.0))
    head = {id(network.head.weight), id(network.head.bias)}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rate for key, rate in rates.items() if key in head} == {4e-3}
    assert {rate for key, rate in rates.items() if key not in head} == {1e-3}
    assert len(rates) == len(list(network.parameters()))
    assert len(parameter_groups(network, OptimSpec(lr=1e-3, head_lr=1.0))) == 3, "the groups of former checkpoints"
    with pytest.raises(ValueError, match=r"head_lr=0\.0: expected a number above 0"):
        OptimSpec(head_lr=0.0)
