"""The inputs of the last layer: the features of any network."""

import pytest
import torch
from torch import nn

from refract.models.head import head_inputs
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import BagOfNgrams
from refract.models.registry import build


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet20", 64), ("lenet5", 84), ("fastnet", None), ("mlp", None), ("cnn", None), ("linear", None), ("resnet18", 512),
     ("squeezenet1_1", 512), ("densenet121", 1024), ("timm/vit_tiny_patch16_224", 192), ("timm/deit_tiny_distilled_patch16_224", 192)],
)  # fmt: skip
def test_features_are_one_row_for_each_image(name: str, width: int | None) -> None:
    size = (224, 224) if "224" in name else (64, 64)
    network = build(name, 5, image_size=size).eval()
    images = torch.randn(3, 3, *size)
    with torch.inference_mode(), head_inputs(network) as features:
        alone = network(images)
        network(images[:1])
    assert [len(rows) for rows in features] == [3, 1] and features[0].ndim == 2 and features[0].dtype == torch.float32
    assert width is None or features[0].shape[1] == width
    assert torch.allclose(features[0][:1], features[1], atol=1e-3)
    with torch.inference_mode():
        assert torch.allclose(network(images), alone)
    assert len(features) == 2, "the hooks are gone"


def test_a_linear_head_computes_its_logits_from_the_features() -> None:
    network = build("resnet20", 5, image_size=(32, 32)).eval()
    with torch.inference_mode(), head_inputs(network) as features:
        logits = network(torch.randn(4, 3, 32, 32))
        head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        assert torch.allclose(head(features[0]), logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "cosine"])
def test_a_head_of_several_layers_counts_as_one(kind: str) -> None:
    network = build("resnet20", 5, image_size=(32, 32), head=kind).eval()
    with torch.inference_mode(), head_inputs(network) as features:
        network(torch.randn(4, 3, 32, 32))
    assert features[0].shape == (4, 64)


def test_the_features_of_a_multimodal_network_are_the_fused_ones() -> None:
    reader = Reader(build("lenet5", 5, image_size=(32, 32)), BagOfNgrams(100, width=16), 5, width=24).eval()
    with torch.inference_mode(), head_inputs(reader) as features:
        logits = reader(torch.randn(2, 3, 32, 32), torch.ones(2, 7, dtype=torch.int32), torch.tensor([True, False]))
        assert features[0].shape == (2, 24) and torch.allclose(reader.head(features[0]), logits, atol=1e-5)


class Backwards(nn.Module):
    """A network that registers its layers in another order than it calls them, and never calls one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused = nn.Linear(12, 3), nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


def test_the_output_replaces_the_inputs_of_a_head_that_is_never_called() -> None:
    network = Backwards()
    with torch.inference_mode(), head_inputs(network) as features:
        logits = network(torch.randn(2, 3, 2, 2))
    assert torch.equal(features[0], logits)
