"""Training on a GPU: precisions, equal runs, resuming after a kill, and the options of the recipe."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from gpu_data import write_folder
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from refract.augment import Augmenter, Preprocess
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.models.training.lightning_module import ClassifierModule
from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.training.run import Result, train
from refract.pipeline.training.run_directory import stored_config

pytestmark = pytest.mark.gpu

# Dropout draws from PyTorch's generator, EMA averages, MixUp mixes: a resumed run must restore all of it. Average pooling, as the backward
# pass of max pooling has no deterministic algorithm on a GPU.
CONFIG = {
    "data": {"image_size": 32, "batch_size": 8, "workers": 0, "memory": "always"},
    "augment": {"policy": ["HorizontalFlip", {"PadAndCrop": {"padding": 2}}, {"MixUp": {"p": 0.5}}]},
    "model": {"name": "cnn", "args": {"widths": [8, 16], "dropout": 0.3, "pool": "average"}},
    "optim": {"name": "sgd", "lr": 0.02},
    "trainer": {"max_epochs": 3, "precision": "fp32", "ema": 0.9, "checkpoint_seconds": 0},
    "evaluation": {"robustness": "none"},
    "tracking": {"enabled": False},
}

DRIVER = "import torch; torch.use_deterministic_algorithms(True); import refract.cli, sys; sys.exit(refract.cli.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def options(images: Path, tmp_path_factory: pytest.TempPathFactory, device: str) -> list[str]:
    """The options that depend on where the tests run."""
    runs = tmp_path_factory.mktemp("runs")
    return ["--data.source", str(images), "--trainer.runs_dir", str(runs), "--trainer.device", device]


@pytest.fixture(scope="module")
def calm(options: list[str]) -> Result:
    """An undisturbed run with deterministic algorithms."""
    with deterministic():
        return trained(options, "calm")


@contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms. PyTorch raises an error for operations without one."""
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


def config(options: list[str], *more: str) -> Config:
    return config_from_dict(CONFIG, [*options, *more])


def trained(options: list[str], name: str, *more: str) -> Result:
    result = train(config(options, "--trainer.run_name", name, *more))
    assert result is not None
    return result


def weights(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.bundle / "weights.safetensors")


def assert_equal(one: Result, other: Result) -> None:
    expected, other_weights = weights(one), weights(other)
    assert expected.keys() == other_weights.keys()
    assert [key for key in expected if not torch.equal(expected[key], other_weights[key])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_precision_learns_the_colours(precision: str, options: list[str], device: str) -> None:
    if precision == "fp16" and device == "cpu":
        pytest.skip("trainer.precision fp16 is refused without a GPU, see tests/pipeline/test_pipeline_device.py")
    more = ("--optim.lr", "0.1", "--augment.policy", "[HorizontalFlip]", "--trainer.max_epochs", "5")
    result = trained(options, precision, "--trainer.precision", precision, *more)
    assert result.metrics["accuracy"] >= 0.8
    assert all(value.isfinite().all() for value in weights(result).values())


def test_a_second_deterministic_run_ends_with_equal_weights(calm: Result, options: list[str]) -> None:
    with deterministic():
        assert_equal(calm, trained(options, "again"))


def test_runs_that_decode_on_the_device_are_equal(options: list[str]) -> None:
    device = ("--data.memory", "never", "--data.decode_on", "device", "--trainer.max_epochs", "2")
    with deterministic():
        assert_equal(*(trained(options, name, *device) for name in ("decodes", "decodes-again")))


def test_a_run_that_was_killed_within_an_epoch_resumes_to_equal_weights(
    calm: Result, options: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-c", DRIVER, "train", str(file), *options, "--trainer.run_name", "killed"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    run = calm.run_dir.parent / "killed"
    steps = -(-len(prepare_data(config(options))[0].of("train")) // 8)  # of an epoch
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not [step for step in _steps(run) if step > steps and step % steps]:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (run / "bundle").exists()
    with deterministic():
        resumed = train(stored_config(run), resume=run)
    assert resumed is not None
    assert_equal(calm, resumed)


def _steps(run: Path) -> list[int]:
    """Return the steps of the existing checkpoints."""
    return [int(path.stem.partition("-")[2]) for path in run.glob("checkpoints/resume-*.ckpt")]


@pytest.mark.parametrize(
    "more",
    [
        ("--trainer.ema", "0", "--trainer.swa_start", "0.4"),
        ("--trainer.compile", "true"),
    ],
    ids=["swa", "compile"],
)
def test_an_option_of_the_recipe_trains(more: tuple[str, ...], options: list[str], device: str) -> None:
    if "--trainer.compile" in more and device == "cpu":
        pytest.skip("tests/pipeline/test_pipeline_build.py compiles on the processor, which takes a minute")
    result = trained(options, "option", "--trainer.max_epochs", "2", *more)
    assert result.metrics["accuracy"] > 0 and (result.bundle / "manifest.json").exists()


def test_recomputed_activations_give_the_same_weights(options: list[str]) -> None:
    same = ("--model.args", "{widths: [8, 16], depth: 2, pool: average}", "--trainer.max_epochs", "1")
    with deterministic():
        baseline = trained(options, "kept", *same)
        recomputed = trained(options, "recomputed", *same, "--trainer.gradient_checkpointing", "true")
    expected = weights(baseline)
    for key, value in weights(recomputed).items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-4)


def test_images_on_the_device_are_augmented_as_on_the_cpu(images: Path, device: str) -> None:
    source = Config().changed({"data.source": str(images)})
    manifest, _ = prepare_data(source)
    policy = ["HorizontalFlip", {"PadAndCrop": {"padding": 3}}, {"Rotate": {"degrees": 15}}]
    same = {"preprocess": Preprocess(32, 32), "batch_size": 8, "memory": "always", "workers": 0}
    augmenter = Augmenter(policy, seed=1, size=32)
    plain = ImageDataModule(manifest, augmenter=augmenter, **same)
    resident = ImageDataModule(manifest, augmenter=augmenter, on_device=True, **same)
    for expected, batch in zip(plain.train_dataloader(), resident.train_dataloader(), strict=True):
        device_batch = resident.on_after_batch_transfer(
            resident.transfer_batch_to_device(batch, torch.device(device), 0), 0
        )
        assert device_batch["images"].device.type == device and "keys" not in device_batch
        assert torch.equal(device_batch["targets"].cpu(), expected["targets"])
        difference = (device_batch["images"].cpu().int() - expected["images"].int()).abs().float()
        assert difference.mean() <= 1.0


class Watched(Callback):
    """Raise an error if a step after the first two synchronises with the device."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx > 1:
            _forbid_waiting(True)
            self.steps += 1

    def on_train_batch_end(self, *_: object) -> None:
        _forbid_waiting(False)


def _forbid_waiting(forbidden: bool) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_waits_for_the_device(precision: str, images: Path, device: str) -> None:
    """Neither the copy of a batch, nor its augmentation on the device, nor the step."""
    source = Config().changed({"data.source": str(images)})
    manifest, _ = prepare_data(source)
    policy = [
        "HorizontalFlip", {"RandomResizedCrop": {"scale": [0.5, 1]}}, {"Rotate": {"degrees": 15}},
        {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}}, {"Cutout": {"length": 8}},
        {"RandomErasing": {"value": "mean"}}, {"OneOf": {"ops": ["MixUp", "CutMix"]}},
    ]  # fmt: skip
    augmenter = Augmenter(policy, seed=1, size=32)
    data = ImageDataModule(
        manifest, augmenter=augmenter, preprocess=Preprocess(32, 32), batch_size=4, memory="always", workers=0, on_device=True,
    )  # fmt: skip
    network = build("cnn", 3, image_size=(32, 32), widths=[8, 16])
    classifier = Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3)
    module = ClassifierModule(classifier, task="multiclass", num_classes=3, mix=augmenter.mix)
    watched = Watched()
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, precision=precision, max_epochs=2, callbacks=[watched],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    assert watched.steps > 10
    for number, batch in enumerate(data.train_dataloader()):
        _forbid_waiting(number > 1)
        try:
            data.on_after_batch_transfer(data.transfer_batch_to_device(batch, torch.device(device), 0), 0)
        finally:
            _forbid_waiting(False)
