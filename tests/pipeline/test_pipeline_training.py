"""The training loop: the kept weights, the order of the images, options of the recipe, several ranks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_data import Run

from refract.augment import Augmenter, Preprocess
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.models.training.lightning_module import ClassifierModule
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.sections import DataConfig, TrainerConfig
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.data.preprocessing import make_preprocess, with_normalisation
from refract.pipeline.data.train_order import TrainOrder
from refract.pipeline.evaluation.evaluate import measured
from refract.pipeline.training.fit import Assembly, fit
from refract.pipeline.training.ranks import Ranks


def _made(config: Config, manifest: Manifest, module: ClassifierModule, data: ImageDataModule) -> Assembly:
    return Assembly(config, manifest, {}, module, data, "cpu", "32-true", Ranks(0, 1, 1))


@pytest.mark.parametrize(
    ("scores", "kept_epoch"),
    [([0.2, 0.9, 0.9, 0.5], 2), ([0.2, 0.9, 0.8, 0.6], 2), ([0.2, 0.9, 0.8, 0.7], 2), ([0.9, 0.2, 0.5, 0.6], 0)],
)
def test_the_latest_epoch_within_a_standard_error_of_the_best_is_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, scores: list[float], kept_epoch: int
) -> None:
    """Six validation images: the standard error of 0.9 is 0.14, counted from the highest score, not from the kept one."""
    weights = []

    class Told(ClassifierModule):
        def on_validation_epoch_end(self) -> None:
            self.log("val_accuracy", torch.tensor(scores[len(weights)]))
            weights.append({key: value.clone() for key, value in self.classifier.state_dict().items()})

    data_config = DataConfig(source=str(folder), workers=0)
    config = Config(data=data_config, trainer=TrainerConfig(max_epochs=len(scores)))
    manifest, _ = prepare_data(config)
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.2,) * 3)
    module = Told(classifier, task="multiclass", num_classes=3)
    data = ImageDataModule(
        manifest, augmenter=Augmenter("none", size=32), preprocess=Preprocess(32, 32), batch_size=16, workers=0
    )
    assert len(manifest.of("val")) == 6
    with caplog.at_level("INFO", "refract.pipeline"):
        history = fit(_made(config, manifest, module, data), tmp_path / "run", None)
    assert [round(row["val_accuracy"], 3) for row in history] == scores
    final_state = module.classifier.state_dict()
    same = [all(torch.equal(final_state[key], value) for key, value in state.items()) for state in weights]
    assert same == [epoch == kept_epoch for epoch in range(4)]
    assert f"keeping the weights of epoch {kept_epoch + 1}/4: val_accuracy {scores[kept_epoch]:.4f}" in caplog.text
    assert ("within one standard error of 0.9000 in epoch 2" in caplog.text) == (scores[kept_epoch] < 0.9)


def test_top_five_counts_the_five_best() -> None:
    given = np.tile(np.arange(8) / 28, (3, 1))
    samples = [Sample("-", (truth,)) for truth in (7, 6, 1)]
    result = measured(given, samples, task="multiclass", labels=[str(i) for i in range(8)])
    assert result.metrics["top5_accuracy"] == pytest.approx(2 / 3) and result.metrics["accuracy"] == pytest.approx(
        1 / 3
    )


def test_repeats_are_adjacent() -> None:
    order = TrainOrder(10, seed=3, repeats=3)
    keys = list(order)
    assert len(keys) == 10 and [key[2] for key in keys] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len({key[1] for key in keys[:3]}) == 1 and len({key[1] for key in keys}) == 4
    resumed = TrainOrder(10, seed=3, repeats=3)
    resumed.resume(0, 4)
    assert list(resumed) == keys[4:]
    resumed.set_epoch(1)
    assert len(list(resumed)) == 10, "the next epoch is a whole one"


def test_whitening_of_large_images_is_rejected(folder: Path) -> None:
    config = Config(data=DataConfig(source=str(folder), image_size=64, normalize="pca"))
    manifest, _ = prepare_data(config)
    with pytest.raises(ConfigError, match=r"data.normalize: pca whitening is for small images .* got 64×64×3"):
        with_normalisation(make_preprocess(config.data, config.model), manifest, "pca", "none")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_deleted_after_the_check_is_named(folder: Path, workers: int) -> None:
    config = Config(data=DataConfig(source=str(folder), workers=workers))
    manifest, _ = prepare_data(config)
    gone = Path(manifest.of("train")[0].path)
    gone.unlink()
    data = ImageDataModule(
        manifest, augmenter=Augmenter("none", size=32), preprocess=Preprocess(32, 32), batch_size=8, workers=workers
    )
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.5,) * 3)
    module = ClassifierModule(classifier, task="multiclass", num_classes=3)
    with pytest.raises(DataError, match=rf"^{gone}: was readable during the data check, but is not now"):
        fit(_made(config, manifest, module, data), folder.parent, None)


@pytest.mark.slow
def test_find_suggests_a_learning_rate_and_a_batch_size_and_writes_nothing(refract: Run, folder: Path) -> None:
    refract("init", folder, "-o", "images.yaml")
    before = {path.name for path in folder.parent.iterdir()} | {"home"}
    options = ("images.yaml", "--model.name", "lenet5", "--data.workers", 0)
    rate = float(refract("find", "lr", *options).stdout.split()[-1])
    assert 1e-4 < rate < 0.5
    size = int(refract("find", "batch-size", *options).stdout.split()[-1])
    assert size & (size - 1) == 0 and 8 <= size <= 42
    assert {path.name for path in folder.parent.iterdir()} <= before
    assert "usage: refract find" in refract("find", "speed", "x.yaml", code=2).stdout


@pytest.mark.slow
def test_the_recipes_options_train_and_a_bundle_is_distilled(refract: Run, folder: Path) -> None:
    refract("init", folder, "-o", "images.yaml")
    many = {
        "model.name": "cnn", "evaluation.robustness": "none",
        "trainer.ema": 0.9, "trainer.patience": 1, "trainer.start_size": 0.5, "trainer.accumulate": 2, "trainer.tta": "flip",
        "data.sampler": "balanced", "loss.class_weights": "balanced", "loss.name": "focal", "optim.name": "lion",
        "optim.clip_norm": 1, "model.head": "cosine", "model.init": "lsuv", "trainer.run_name": "many", "trainer.max_epochs": 3,
    }  # fmt: skip
    refract("train", "images.yaml", *[part for key, value in many.items() for part in (f"--{key}", value)])
    printed = refract(
        "train", "images.yaml", "--loss.teacher", "runs/many/bundle", "--model.name", "cnn", "--optim.sam", 0.05,
        "--trainer.swa_start", 0.5, "--trainer.max_epochs", 4, "--trainer.run_name", "pupil", "--loss.penalty", 1e-4,
        "--trainer.gradient_checkpointing", "true", "--evaluation.robustness", "none",
    )  # fmt: skip
    assert "epoch 4/4" in printed.stderr
    answer = refract("predict", "runs/pupil/bundle", folder / "red" / "00.jpg", "--json").stdout
    assert json.loads(answer)["label"] in ("red", "green", "blue")
    printed = refract(
        "train", "images.yaml", "--loss.teacher", "runs/many/bundle", "--data.image_size", "[40, 32]", code=2
    ).stderr
    assert "loss.teacher: runs/many/bundle has the image size (32, 32), but this training has (40, 32)" in printed
    printed = refract("train", "images.yaml", "--trainer.ema", 0.9, "--trainer.swa_start", 0.5, code=2).stderr
    assert "both average the weights; remove one" in printed


@pytest.mark.slow
def test_two_ranks_train_like_one(refract: Run, folder: Path) -> None:
    refract("init", folder, "-o", "images.yaml")
    same = (
        "images.yaml", "--model.name", "mlp", "--model.args", "{norm: none}", "--augment.policy", "none", "--trainer.precision", "fp32",
        "--trainer.device", "cpu", "--data.workers", 0, "--data.val_fraction", 0.2, "--trainer.max_epochs", 2, "--data.memory", "never",
        "--evaluation.robustness", "none", "--optim.lr", "2e-3",
    )  # fmt: skip
    refract("train", *same, "--data.batch_size", 8, "--trainer.run_name", "one")
    printed = refract("train", *same, "--data.batch_size", 4, "--trainer.devices", 2, "--trainer.run_name", "two")
    assert len(re.findall(r"^epoch 2/2", printed.stderr, re.M)) == 1 and printed.stdout.count("test:  ") == 1
    one, two = (load_file(folder.parent / "runs" / name / "bundle" / "weights.safetensors") for name in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=1e-5)
    assert sorted(path.name for path in (folder.parent / "runs").iterdir()) == ["one", "two"]
    printed = refract(
        "train", *same, "--data.batch_size", 4, "--trainer.devices", 2, "--trainer.run_name", "g",
        "--model.mode", "gradual", "--model.unfreeze_epochs", 2, "--trainer.max_epochs", 3,
    )  # fmt: skip
    assert len(re.findall(r"^epoch 3/3", printed.stderr, re.M)) == 1, (
        "what is frozen takes no part in the gradients' exchange"
    )
