"""Heads next to loaded weights: every class starts with the same logit, and the head learns from the first step."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.head import CosineHead, head_of, neutralise_head
from models.losses import classification_loss
from models.networks import build
from models.weights import load_weights

FAMILIES = (
    ("resnet20", 32),
    ("resnet18", 32),
    ("squeezenet1_1", 64),
    ("mobilenet_v3_small", 32),
    ("vgg11", 32),
    ("timm/tf_efficientnet_lite0", 32),
    ("timm/deit_tiny_distilled_patch16_224", 32),
    ("timm/convnext_atto", 32),
    ("timm/levit_128s", 64),
)


def loaded(name: str, size: int, folder: Path, classes: int = 3, head: str = "linear") -> tuple[nn.Module, dict]:
    """(the network with the weights of one for five classes, those weights)."""
    torch.manual_seed(1)
    state = {key: tensor.clone() for key, tensor in build(name, 5, image_size=(size, size)).state_dict().items()}
    save_file(state, folder / "five.safetensors")
    return build(name, classes, image_size=(size, size), weights=str(folder / "five.safetensors"), head=head), state


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_a_new_head_next_to_loaded_weights_starts_with_the_loss_of_a_guess(
    name: str, size: int, tmp_path: Path
) -> None:
    network, state = loaded(name, size, tmp_path)
    logits = network.eval()(torch.randn(4, 3, size, size))
    targets = torch.arange(4) % 3
    loss = classification_loss(logits, targets, task="multiclass")
    assert loss.item() == pytest.approx(math.log(3), abs=1e-6)
    marks = torch.eye(3)[targets]
    assert classification_loss(logits, marks, task="multilabel").item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in head_of(network).parameters() if p.grad is not None)
    inside = {id(parameter) for parameter in head_of(network).parameters()}
    backbone = [name for name, parameter in network.named_parameters() if id(parameter) not in inside]
    assert all(torch.equal(network.get_parameter(name), state[name]) for name in backbone)


@pytest.mark.parametrize("head", ["mlp", "cosine"])
def test_other_heads_start_alike_and_can_learn(head: str, tmp_path: Path) -> None:
    network, _ = loaded("resnet18", 32, tmp_path, head=head)
    images, targets = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    network.requires_grad_(False).eval()
    head_of(network).requires_grad_(True)
    optimizer = torch.optim.AdamW(head_of(network).parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = classification_loss(network(images), targets, task="multiclass")
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(3), abs=1e-5) and losses[-1] < 0.9 * losses[0]


def test_a_head_that_the_weights_fill_is_theirs(tmp_path: Path) -> None:
    network, state = loaded("resnet18", 32, tmp_path, classes=5)
    assert torch.equal(network.fc.weight, state["fc.weight"])
    again = build("resnet18", 5, image_size=(32, 32))
    assert not load_weights(again, head_of(again), tmp_path / "five.safetensors").reinitialised


def test_random_weights_keep_a_random_head() -> None:
    assert build("resnet18", 3, image_size=(32, 32)).fc.weight.std() > 0


def test_a_neutral_cosine_head_has_one_direction_and_its_scale() -> None:
    head = neutralise_head(nn.Sequential(CosineHead(8, 3)))[0]
    assert torch.equal(head.weight[0], head.weight[2]) and head.weight.norm() > 0 and head.scale.item() == 10
