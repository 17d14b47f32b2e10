import copy

import pytest
import torch
from torch import nn

from refract.models import registry
from refract.models.training.activation_checkpointing import recompute_activations


def a_step(network, images):
    torch.manual_seed(3)
    network.train()
    network(images).square().mean().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet20", {}),
        ("squeezenet1_1", {"dropout": 0.0}),
        ("timm/vit_tiny_patch16_224", {"img_size": 32}),
        ("densenet121", {}),
        ("cnn", {}),
    ],
)
def test_gradients_keys_and_statistics_do_not_change(name, args):
    torch.manual_seed(0)
    plain = registry.build(name, 3, image_size=(32, 32), **args)
    spared = copy.deepcopy(plain)
    assert recompute_activations(spared) > 1
    images = torch.rand(4, 3, 32, 32)
    wanted, spared_gradients = a_step(plain, images), a_step(spared, images)
    assert wanted.keys() == spared_gradients.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(spared_gradients[key], gradient, rtol=1e-4, atol=1e-6)
    for (key, value), (other, other_value) in zip(plain.state_dict().items(), spared.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, other_value), key
    torch.testing.assert_close(spared.eval()(images), plain.eval()(images))


def test_fewer_activations_are_stored_for_the_backward_pass():
    def kept(network):
        sizes = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (
                sizes.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) and tensor
            ),
            lambda tensor: tensor,
        )
        with hooks:
            network.train()(torch.rand(8, 3, 32, 32))
        return sum(sizes.values())

    network = registry.build("resnet20", 10, image_size=(32, 32))
    before = kept(network)
    recompute_activations(network)
    assert kept(network) < before / 2


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no sequence of blocks"):
        recompute_activations(nn.Linear(2, 2))
