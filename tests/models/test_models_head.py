"""Heads next to loaded weights: every class starts with the same logit, and the head learns from the first step."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from refract.models.head import CosineHead, head_of, neutralise_head
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import BagOfNgrams
from refract.models.pretrained.weights import load_weights
from refract.models.registry import build
from refract.models.training.objective import classification_loss

FAMILIES = (
    ("resnet20", 32),
    ("resnet18", 32),
    ("squeezenet1_1", 64),
    ("mobilenet_v3_small", 32),
    ("timm/tf_efficientnet_lite0", 32),
    ("timm/deit_tiny_distilled_patch16_224", 32),
    ("timm/convnext_atto", 32),
    ("timm/levit_128s", 64),
)


def loaded(name: str, size: int, folder: Path, classes: int = 3, head: str = "linear") -> tuple[nn.Module, dict]:
    """Return (a network with loaded weights of a network for five classes, these weights)."""
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
    network, _ = loaded("lenet5", 32, tmp_path, head=head)
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


@pytest.mark.parametrize(("name", "size"), [("timm/repvit_m0_9", 64), ("timm/volo_d1_224", 224)])
def test_all_outputs_of_a_network_with_two_heads_start_alike(name: str, size: int) -> None:
    network = neutralise_head(build(name, 3, image_size=(size, size))).eval()
    with torch.inference_mode():
        assert not network(torch.randn(2, 3, size, size)).any()


@pytest.mark.parametrize("fusion", ["concat", "gated", "film"])
def test_the_fusion_layer_learns_below_a_neutral_head(fusion: str) -> None:
    torch.manual_seed(0)
    images, texts = build("lenet5", 3, image_size=(32, 32)), BagOfNgrams(buckets=20, width=8)
    reader = neutralise_head(Reader(images, texts, 3, fusion=fusion, width=16, drop_image=0.0, drop_text=0.0))
    inputs = torch.randn(6, 3, 32, 32), torch.randint(1, 20, (6, 4)), torch.ones(6, dtype=torch.bool)
    targets = torch.arange(6) % 3
    assert not reader(*inputs).any()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=0.01)
    for _ in range(2):  # the first step moves the head, which then passes gradients on
        optimizer.zero_grad()
        classification_loss(reader(*inputs), targets, task="multiclass").backward()
        optimizer.step()
    still = [name for name, p in reader.fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still and any(p.grad.any() for p in reader.texts.parameters())


def test_a_head_that_the_weights_fill_is_loaded(tmp_path: Path) -> None:
    network, state = loaded("resnet18", 32, tmp_path, classes=5)
    assert torch.equal(network.fc.weight, state["fc.weight"])
    again = build("resnet18", 5, image_size=(32, 32))
    assert not load_weights(again, head_of(again), tmp_path / "five.safetensors").reinitialised


def test_random_weights_keep_a_random_head() -> None:
    assert build("resnet18", 3, image_size=(32, 32)).fc.weight.std() > 0


def test_a_neutral_cosine_head_has_one_direction_and_its_scale() -> None:
    head = neutralise_head(nn.Sequential(CosineHead(8, 3)))[0]
    assert torch.equal(head.weight[0], head.weight[2]) and head.weight.norm() > 0 and head.scale.item() == 10
