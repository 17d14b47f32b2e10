"""The loss of each task against numbers worked out by hand."""

import math
from collections.abc import Iterator

import pytest
import torch

from refract.models.tasks import SINGLE_LABEL, TASKS
from refract.models.training import losses
from refract.models.training.losses import LOSSES, Loss, losses_of, register_loss
from refract.models.training.objective import (
    balanced_weights,
    classification_loss,
    consistency_loss,
    distillation_loss,
    elastic_net,
    soft_targets,
)

# softmax of (0, log 2, log 5) is (1/8, 2/8, 5/8).
LOGITS = torch.tensor([[0.0, math.log(2), math.log(5)]])


def test_soft_targets() -> None:
    one_hot = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert torch.equal(soft_targets(torch.tensor([2, 0]), 3, "multiclass"), one_hot)
    mixed = torch.tensor([[0.3, 0.7]])
    assert torch.equal(soft_targets(mixed, 2, "binary"), mixed)
    assert soft_targets(torch.tensor([[1, 1, 0]]), 3, "multilabel").dtype == torch.float32


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_index_out_of_range_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"class index {wrong}: expected 0…2"):
        soft_targets(torch.tensor([0, wrong]), 3, "multiclass")
    with pytest.raises(ValueError, match=rf"class index {wrong}: expected 0…2"):
        classification_loss(torch.zeros(2, 3), torch.tensor([0, wrong]), task="multiclass")


@pytest.mark.parametrize(
    ("targets", "task"),
    [
        (torch.zeros(2, 4), "multiclass"),
        (torch.zeros(2), "multiclass"),
        (torch.zeros(2, dtype=torch.int64), "multilabel"),
    ],
)
def test_targets_of_another_form_are_refused(targets: torch.Tensor, task: str) -> None:
    with pytest.raises(ValueError, match="targets of shape"):
        soft_targets(targets, 3, task)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_cross_entropy(task: str) -> None:
    loss = classification_loss(LOGITS, torch.tensor([1]), task=task)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    soft = classification_loss(LOGITS, torch.tensor([[0.5, 0.0, 0.5]]), task=task)
    assert soft.item() == pytest.approx(0.5 * math.log(8) + 0.5 * math.log(8 / 5), abs=1e-6)


def test_label_smoothing() -> None:
    # Szegedy et al. 2016: q' = (1 - ε) q + ε / 3 = (0.1, 0.8, 0.1) with ε = 0.3.
    expected = 0.1 * math.log(8) + 0.8 * math.log(4) + 0.1 * math.log(8 / 5)
    loss = classification_loss(LOGITS, torch.tensor([1]), task="multiclass", label_smoothing=0.3)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_multilabel() -> None:
    logits, targets = torch.tensor([[0.0, math.log(3), 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])  # p = 1/2, 3/4, 1/2
    loss = classification_loss(logits, targets, task="multilabel")
    assert loss.item() == pytest.approx((math.log(2) + math.log(4) + math.log(2)) / 3, abs=1e-6)
    # Three labels, but each is a decision between two: q' = 0.8 q + 0.1 = (0.9, 0.1, 0.1).
    smooth = classification_loss(logits, targets, task="multilabel", label_smoothing=0.2)
    expected = (math.log(2) + 0.1 * math.log(4 / 3) + 0.9 * math.log(4) + math.log(2)) / 3
    assert smooth.item() == pytest.approx(expected, abs=1e-6)


def test_class_weights() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0])
    logits, targets = torch.cat([LOGITS, LOGITS]), torch.tensor([0, 1])
    loss = classification_loss(logits, targets, task="multiclass", class_weights=weights)
    assert loss.item() == pytest.approx((1 * math.log(8) + 2 * math.log(4)) / 3, abs=1e-6)
    reference = torch.nn.functional.cross_entropy(logits, targets, weight=weights)
    assert loss.item() == pytest.approx(reference.item(), abs=1e-6)
    multi = classification_loss(
        torch.zeros(1, 2), torch.ones(1, 2), task="multilabel", class_weights=torch.tensor([1.0, 3.0])
    )
    assert multi.item() == pytest.approx(2 * math.log(2), abs=1e-6)


def test_half_precision_logits_give_a_float32_loss() -> None:
    for task in ("multiclass", "multilabel"):
        loss = classification_loss(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3), task=task)
        assert loss.dtype == torch.float32


def test_bad_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0"):
        classification_loss(LOGITS, torch.tensor([1]), task="multiclass", label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"class_weights of shape \(2,\): expected \(3,\)"):
        classification_loss(LOGITS, torch.tensor([1]), task="multiclass", class_weights=torch.ones(2))
    with pytest.raises(ValueError, match="task='multi'"):
        classification_loss(LOGITS, torch.tensor([1]), task="multi")


def test_consistency_is_the_jensen_shannon_divergence() -> None:
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1).double()
    middle = p.mean(0)
    expected = (p * (p / middle).log()).sum(-1).mean()
    assert float(consistency_loss(logits, task="multiclass")) == pytest.approx(float(expected), rel=1e-5)
    assert float(consistency_loss(logits[:1].expand(3, 5, 4), task="multiclass")) == pytest.approx(0, abs=1e-6)
    apart = torch.eye(3).unsqueeze(1) * 1000
    assert float(consistency_loss(apart, task="multiclass")) == pytest.approx(math.log(3), rel=1e-5)
    yes_no = torch.stack([logits.sigmoid(), 1 - logits.sigmoid()], -1).double()
    expected = (yes_no * (yes_no / yes_no.mean(0)).log()).sum(-1).mean()
    assert float(consistency_loss(logits, task="multilabel")) == pytest.approx(float(expected), rel=1e-4)


def test_each_loss_by_hand() -> None:
    given, targets = torch.softmax(LOGITS, 1)[0], torch.tensor([1])
    p = [float(v) for v in given]
    rows = {
        "cross_entropy": -math.log(p[1]),
        "focal": -((1 - p[1]) ** 2) * math.log(p[1]),
        "mse": sum((v - (i == 1)) ** 2 for i, v in enumerate(p)) / len(p),
        "perceptron": float(LOGITS[0].max() - LOGITS[0, 1]),
        "bce": sum(math.log1p(math.exp(-z if i == 1 else z)) for i, z in enumerate(LOGITS[0].tolist())) / len(p),
    }
    assert set(rows) == set(LOSSES)
    for name, expected in rows.items():
        loss = classification_loss(LOGITS, targets, task="multiclass", name=name)
        assert float(loss) == pytest.approx(expected, rel=1e-5), name


def test_focal_without_gamma_is_the_plain_loss() -> None:
    logits, targets = torch.randn(5, 3), torch.randint(2, (5, 3)).float()
    for task, task_targets in (("multilabel", targets), ("multiclass", targets.argmax(1))):
        plain = classification_loss(logits, task_targets, task=task)
        torch.testing.assert_close(classification_loss(logits, task_targets, task=task, name="focal", gamma=0.0), plain)


def test_losses_that_a_task_does_not_support_are_refused() -> None:
    message = "loss='cross_entropy' does not support the task multilabel; expected one of auto, bce, focal, mse"
    with pytest.raises(ValueError, match=message):
        classification_loss(torch.zeros(2, 3), torch.zeros(2, 3), task="multilabel", name="cross_entropy")
    with pytest.raises(ValueError, match="loss='focla'.*did you mean 'focal'"):
        classification_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), task="multiclass", name="focla")


def test_balanced_class_weights_make_every_class_weigh_the_same() -> None:
    weights = balanced_weights([30, 10, 0])
    assert weights.tolist() == pytest.approx([40 / (2 * 30), 40 / (2 * 10), 0])
    assert 30 * weights[0] == pytest.approx(10 * weights[1])


def test_distillation_is_the_divergence_at_its_temperature() -> None:
    teacher, student = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = torch.softmax(teacher / 4, 1), torch.softmax(student / 4, 1)
    expected = 16 * (p * (p / q).log()).sum()
    loss = distillation_loss(student, teacher, task="multiclass", temperature=4.0)
    torch.testing.assert_close(loss, expected)
    assert float(distillation_loss(teacher, teacher, task="multilabel", temperature=2.0)) == pytest.approx(0, abs=1e-6)


def test_the_elastic_net_excludes_biases() -> None:
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -4.0]]))
        layer.bias.fill_(100.0)
    assert float(elastic_net(layer, 1.0)) == 7
    assert float(elastic_net(layer, 0.0)) == 12.5
    assert float(elastic_net(layer, 0.5)) == 9.75


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_gradient_for_a_certain_prediction(task: str, gamma: float) -> None:
    logits = torch.tensor([[30.0, 0.0, -30.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 0.0]]) if task == "multilabel" else torch.tensor([0])
    classification_loss(logits, targets, task=task, name="focal", gamma=gamma).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() < 10


@pytest.fixture
def logit_adjusted() -> Iterator[str]:
    """Register the loss of Menon et al. 2021, arXiv:2007.07314, which needs the class counts."""

    def terms(logits: torch.Tensor, targets: torch.Tensor, *, class_counts: torch.Tensor) -> torch.Tensor:
        return -targets * (logits + (class_counts / class_counts.sum()).log()).log_softmax(dim=1)

    register_loss("logit_adjusted", Loss(terms=terms, tasks=SINGLE_LABEL))
    yield "logit_adjusted"
    losses._LOSSES.pop("logit_adjusted")


def test_a_registered_loss_gets_what_it_needs(logit_adjusted: str) -> None:
    counts = torch.tensor([1.0, 2.0, 5.0])
    # The logits equal the log counts plus a constant, so that the adjusted ones are twice as far apart: p is (1, 4, 25) / 30.
    loss = classification_loss(LOGITS, torch.tensor([1]), task="multiclass", name=logit_adjusted, class_counts=counts)
    assert float(loss) == pytest.approx(math.log(30 / 4), rel=1e-5)
    with pytest.raises(ValueError, match="loss='logit_adjusted' needs the number of training images of each class"):
        classification_loss(LOGITS, torch.tensor([1]), task="multiclass", name=logit_adjusted)
    assert [logit_adjusted in losses_of(task) for task in TASKS] == [True, True, False]


def test_a_loss_with_a_registered_name_or_an_unknown_need_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the loss 'focal' exists already, in refract.models.training.losses"):
        register_loss("focal", LOSSES["mse"])
    with pytest.raises(ValueError, match="loss 'auto': the name is reserved"):
        register_loss("auto", LOSSES["mse"])
    with pytest.raises(
        ValueError, match="the keyword-only arguments epoch: expected some of gamma, multilabel, class_counts"
    ):
        Loss(terms=lambda logits, targets, *, epoch: logits)
