"""LoRA adapters: an unchanged start, trained alone with the head, and merged into the network's former layers."""

import pytest
import torch
from torch import nn

from refract.models.head import head_of
from refract.models.multimodal.fusion import Reader
from refract.models.registry import build
from refract.models.training.lora import ADAPTER, add_adapters, merge_adapters, merged_state

TRANSFORMERS = {
    "timm/vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
    "timm/deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
    "timm/swin_tiny_patch4_window7_224": {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2], "window_size": 4},
    "timm/beit_base_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name, 3, image_size=(32, 32), args=TRANSFORMERS[name]).eval()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_adapters_are_trained_alone_and_merge_into_the_network(name: str) -> None:
    network = made(name)
    before, keys = network(IMAGES), list(network.state_dict())
    add_adapters(network, (IMAGES,), rank=4, alpha=8)
    # Not bit for bit: MKL's sums depend on the alignment of the memory.
    torch.testing.assert_close(network(IMAGES), before, rtol=1e-5, atol=1e-7)
    head = {id(parameter) for parameter in head_of(network).parameters()}
    for key, parameter in network.named_parameters():
        assert parameter.requires_grad == (ADAPTER in key or id(parameter) in head), key
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=0.5)
    adapted = network(IMAGES)
    assert (adapted - before).norm() > 1e-3 * before.norm()
    adapted.square().sum().backward()
    unused = [key for key, parameter in network.named_parameters() if ADAPTER in key and not parameter.grad.any()]
    assert not unused, "an attention that reads only the weight of a layer skips its adapter"
    state = merged_state(network)
    assert list(state) == keys and any(ADAPTER in key for key in network.state_dict())
    assert merge_adapters(network) is network
    torch.testing.assert_close(network(IMAGES), adapted, rtol=1e-4, atol=1e-6)
    again = made(name)
    again.load_state_dict(state)
    torch.testing.assert_close(again(IMAGES), adapted, rtol=1e-4, atol=1e-6)
    assert merged_state(again).keys() == again.state_dict().keys()


def test_a_network_without_attention_is_named() -> None:
    network = build("resnet20", 3, image_size=(32, 32))
    with pytest.raises(
        ValueError, match=r"ResNet20 has no attention layers that LoRA can adapt; use a transformer of timm"
    ):
        add_adapters(network, (IMAGES,), rank=4, alpha=8)
    assert all(parameter.requires_grad for parameter in network.parameters())


class Texts(nn.Module):
    """A tiny BERT, averaged over its tokens."""

    width = 16

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        self.bert = BertModel(BertConfig(vocab_size=20, **sizes))

    def forward(self, texts: torch.Tensor) -> torch.Tensor:
        return self.bert(texts).last_hidden_state.mean(dim=1)


def test_every_branch_of_a_multimodal_network_gets_adapters() -> None:
    images = made("timm/vit_tiny_patch16_224")
    inputs = (IMAGES, torch.ones(2, 4, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    network = Reader(images, Texts(), 3, width=8).eval()
    keys, before = list(network.state_dict()), network(*inputs)
    add_adapters(network, inputs, rank=2, alpha=4)
    torch.testing.assert_close(network(*inputs), before, rtol=0, atol=0)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert {"no_text", "no_image", "head.weight"} <= trained, "the layers that are new"
    for part in ("images.blocks.0.attn.qkv", "texts.bert.encoder.layer.0.attention.self.query"):
        assert any(key.startswith(f"{part}{ADAPTER}") for key in trained), part
    assert "texts.bert.embeddings.word_embeddings.weight" not in trained
    assert list(merged_state(network)) == keys
    convolutions = Reader(build("resnet20", 3, image_size=(32, 32)), Texts(), 3, width=8)
    with pytest.raises(ValueError, match="ResNet20 has no attention layers"):
        add_adapters(convolutions, inputs, rank=2, alpha=4)
