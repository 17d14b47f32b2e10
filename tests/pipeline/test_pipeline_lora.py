"""`model.mode: lora` from the config to the bundle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from small_data import paint

from refract.models.bundle.bundle import load_bundle
from refract.models.registry import build
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.config.defaults import filled
from refract.pipeline.training.callbacks.checkpoints import newest
from refract.pipeline.training.fit import assemble, fit
from refract.pipeline.training.run import train

pytestmark = pytest.mark.slow

ARGS = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    paint(tmp_path / "images", range(16))
    torch.manual_seed(0)
    network = build("timm/vit_tiny_patch16_224", 5, image_size=(32, 32), args=ARGS)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    return config_from_dict(
        {
            "data": {"source": str(tmp_path / "images"), "image_size": 32, "workers": 0, "batch_size": 8},
            "model": {
                "name": "timm/vit_tiny_patch16_224", "weights": str(tmp_path / "vit.safetensors"), "args": ARGS,
                "mode": "lora", "lora_rank": 4,
            },
            "trainer": {
                "max_epochs": 2, "device": "cpu", "precision": "fp32", "runs_dir": str(tmp_path / "runs"), "ema": 0.9,
                "checkpoint_seconds": 0,
            },
            "evaluation": {"robustness": "none"},
            "tracking": {"enabled": False},
        }
    )  # fmt: skip


def test_the_bundle_of_a_lora_training_is_an_ordinary_one(config: Config, tmp_path: Path) -> None:
    result = train(config)
    assert result is not None
    stored, start = load_file(result.bundle / "weights.safetensors"), load_file(tmp_path / "vit.safetensors")
    assert {key.removeprefix("network.") for key in stored} - {"mean", "std"} == set(start)
    changed = {key for key, value in start.items() if not torch.equal(stored[f"network.{key}"], value)}
    attention = {f"blocks.{block}.attn.{layer}.weight" for block in (0, 1) for layer in ("qkv", "proj")}
    assert changed == attention | {"head.weight", "head.bias"}
    bundle = load_bundle(result.bundle)
    assert bundle.info.network["args"] == ARGS
    rows = json.loads((result.run_dir / "history.json").read_text())
    assert len(rows) == 2 and bundle.golden_samples
    optim = filled(config).optim
    assert (optim.lr, optim.head_lr) == (1e-3, pytest.approx(3.0)), "the new head at 3e-3, as without adapters"


class CutError(Exception):
    pass


class CutsTheSecondEpoch(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 2:
            raise CutError


def test_an_interrupted_lora_training_ends_with_the_same_weights(config: Config, tmp_path: Path) -> None:
    whole = assemble(config)
    fit(whole, tmp_path / "whole", None)
    with pytest.raises(CutError):
        fit(assemble(config), tmp_path / "cut", None, watchers=[CutsTheSecondEpoch()])
    checkpoint = newest(tmp_path / "cut/checkpoints")
    assert checkpoint is not None
    resumed = assemble(config)
    fit(resumed, tmp_path / "cut", None, checkpoint)
    expected = whole.module.classifier.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.module.classifier.state_dict().items())


def test_lora_without_a_transformer_or_weights_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.mode: lora adapts loaded weights; set model\.weights, or model\.mode"
    ):
        assemble(config.changed({"model.weights": "none"}))
    with pytest.raises(
        ConfigError, match="adapts all layers, which model.mode: lora does not train; set model.mode: fine-tune"
    ):
        assemble(config.changed({"trainer.quantization_aware": True}))
    save_file(build("resnet20", 3, image_size=(32, 32)).state_dict(), tmp_path / "resnet.safetensors")
    other = {"model.name": "resnet20", "model.args": {}, "model.weights": str(tmp_path / "resnet.safetensors")}
    with pytest.raises(ConfigError, match="ResNet20 has no attention layers that LoRA can adapt"):
        assemble(config.changed(other))
