"""`data.decode_on: auto` times both input paths, takes the faster, and leaves the training as it was."""

import gc
import json
import os
import random
import signal
import threading
import weakref
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from safetensors.torch import load_file
from small_data import descendants

from refract.augment import ImageError
from refract.augment.executors import jpeg_batch
from refract.models.training.lightning_module import ClassifierModule
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.stopping import Stopped
from refract.pipeline.training import input_path
from refract.pipeline.training.fit import Assembly, assemble
from refract.pipeline.training.folds import train_folds
from refract.pipeline.training.input_path import choose_input_path, faster, timed_paths, why_not_timed
from refract.pipeline.training.ranks import Ranks
from refract.pipeline.training.run import Result, train
from refract.pipeline.training.run_directory import stored_config, unfinished

# Dropout draws from PyTorch's generator, and batch norms have statistics: timing the paths must change neither.
CONFIG = {
    "data": {"image_size": 16, "batch_size": 8, "workers": 0, "memory": "never"},
    "augment": {"policy": ["HorizontalFlip", {"PadAndCrop": {"padding": 2}}]},
    "model": {"name": "cnn", "args": {"widths": [8], "dropout": 0.3}},
    "trainer": {"max_epochs": 2, "device": "cpu", "precision": "fp32", "runs_dir": "runs"},
    "evaluation": {"robustness": "none"},
    "tracking": {"enabled": False},
}


def config(folder: Path, *more: str) -> Config:
    return config_from_dict(CONFIG, ["--data.source", str(folder), *more])


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the paths of short trainings without a GPU, too, by few steps."""
    monkeypatch.setattr(input_path, "why_not_timed", lambda _: None)
    monkeypatch.setattr(input_path, "timed_paths", lambda assembly: timed_paths(assembly, steps=2))


def trained(config: Config, name: str) -> Result:
    result = train(config.changed({"trainer.run_name": name}))
    assert result is not None
    return result


def assert_equal(one: Result, other: Result) -> None:
    expected, weights = (load_file(result.bundle / "weights.safetensors") for result in (one, other))
    assert [name for name in expected if not torch.equal(expected[name], weights[name])] == []


@pytest.mark.parametrize("place", ["workers", "device"])
def test_timing_changes_nothing_of_the_training(
    place: str, folder: Path, timed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_path, "faster", lambda rates: place if rates.keys() == {"workers", "device"} else rates)
    explicit = trained(config(folder, "--data.decode_on", place), "explicit")
    auto = trained(config(folder), "auto")
    assert yaml.safe_load((auto.run_dir / "config.yaml").read_text())["data"]["decode_on"] == place
    assert_equal(explicit, auto)


def test_the_timed_networks_and_workers_end_before_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    def copied(module: ClassifierModule) -> ClassifierModule:
        module = deepcopy(module)
        copies.append(weakref.ref(module))
        return module

    monkeypatch.setattr(input_path, "deepcopy", copied)
    assembly = assemble(config(folder, "--data.workers", "1"))
    before = {name: value.clone() for name, value in assembly.module.state_dict().items()}
    state = torch.random.get_rng_state()
    children = set(descendants(os.getpid()))
    gc.disable()
    try:
        rates = timed_paths(assembly, steps=2)
        assert [copy() for copy in copies] == [None, None], "the copies of the network hold memory"
    finally:
        gc.enable()
    assert rates.keys() == {"workers", "device"} and min(rates.values()) > 0
    started = set(descendants(os.getpid())) - children
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started if Path(f"/proc/{pid}").exists()]
    assert [name for name in names if b"forkserver" not in name and b"resource_tracker" not in name] == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in assembly.module.state_dict().items())
    assert assembly.data.trainer is None and assembly.data.order.epoch == 0 and not assembly.data.train_set.encoded


def on_a_gpu(assembly: Assembly) -> Assembly:
    return replace(assembly, device="cuda")


def test_reasons_for_workers(folder: Path, paint_png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble(config(folder))
    assert why_not_timed(assembly) == "there is no GPU"
    assert why_not_timed(on_a_gpu(assembly)) == "the training reads fewer than 1,000,000 images"
    monkeypatch.setattr(input_path, "LONG", 1)
    assert why_not_timed(on_a_gpu(assembly)) is None
    assert why_not_timed(replace(on_a_gpu(assembly), ranks=Ranks(0, 2, 1))) == "several ranks train"
    torch.use_deterministic_algorithms(True)
    try:
        assert why_not_timed(on_a_gpu(assembly)) == "a choice by time is not deterministic"
    finally:
        torch.use_deterministic_algorithms(False)
    in_memory = assemble(config(folder, "--data.memory", "always"))
    assert why_not_timed(on_a_gpu(in_memory)) == "no single images are read from files in each epoch"
    assert why_not_timed(on_a_gpu(assemble(config(paint_png)))) == "the device decodes none of the files"


@pytest.fixture
def paint_png(folder: Path, tmp_path: Path) -> Path:
    """The folder's images as PNG."""
    from PIL import Image

    for file in folder.rglob("*.jpg"):
        target = tmp_path / "png" / file.relative_to(folder).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(target)
    return tmp_path / "png"


def test_without_timing_the_config_keeps_auto_and_workers_decode(folder: Path) -> None:
    assembly = assemble(config(folder))
    assert choose_input_path(assembly) is assembly and not assembly.data.train_set.encoded
    assert assemble(config(folder, "--data.decode_on", "device")).data.train_set.encoded


def test_a_device_without_effect_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for options, message in (
        (
            ("--data.memory", "always"),
            "data.decode_on: device has no effect on images in memory; set data.memory: never",
        ),
        (("--model.mode", "probe"), "data.decode_on: device has no effect, as no image is augmented"),
        ((), "data.decode_on: device, but there is no GPU"),
    ):
        caplog.clear()
        choose_input_path(assemble(config(folder, "--data.decode_on", "device", *options)))
        assert message in caplog.text


def test_rates_are_images_per_second_of_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.04, 0.01])
    monkeypatch.setattr(input_path, "_step_seconds", lambda *_: next(seconds))
    assert timed_paths(assemble(config(folder))) == {"workers": 200.0, "device": 800.0}


def test_timed_steps_compile_and_accumulate_as_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, forgotten, accumulated = [], [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    monkeypatch.setattr(torch._dynamo, "reset", lambda: forgotten.append(1))
    monkeypatch.setattr(input_path, "why_not_timed", lambda _: None)
    monkeypatch.setattr(input_path, "timed_paths", lambda assembly: timed_paths(assembly, steps=1))
    fit = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, *a, **k: accumulated.append(self.accumulate_grad_batches) or fit(self, *a, **k)
    )
    choose_input_path(assemble(config(folder, "--trainer.compile", "true", "--trainer.accumulate", "2")))
    assert len(compiled) == 2, "the network of each path"
    assert forgotten == [1] and accumulated == [2, 2]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("moment", ["difference", "_step_seconds"])
def test_a_stop_request_outside_the_steps_is_not_lost(
    moment: str, fails: bool, folder: Path, timed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it, the device's images differ, or the comparison fails."""
    before = getattr(input_path, moment)

    def interrupted(*args: object) -> float:
        if moment == "_step_seconds":
            before(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        if fails:
            raise RuntimeError("out of memory")
        return 99.0

    monkeypatch.setattr(input_path, moment, interrupted)
    with pytest.raises(Stopped, match="SIGTERM"):
        choose_input_path(assemble(config(folder)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_ends_the_timing(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = ClassifierModule.training_step, []

    def interrupted(module: ClassifierModule, *args: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return step(module, *args)

    monkeypatch.setattr(ClassifierModule, "training_step", interrupted)
    monkeypatch.setattr(input_path, "why_not_timed", lambda _: None)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=signal.Signals(number).name):
        choose_input_path(assemble(config(folder)))
    assert len(steps) == 2 and (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_device_must_be_clearly_faster() -> None:
    assert faster({"workers": 100.0, "device": 111.0}) == "device"
    assert faster({"workers": 100.0, "device": 109.0}) == "workers"
    assert faster({"workers": 100.0}) == "workers", "the device's images differ"


def cannot_decode(*_: object) -> torch.Tensor:
    raise ImageError("the cuda device cannot decode a JPEG: not compiled with nvJPEG support")


RUN = jpeg_batch.run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda *args: 255 - RUN(*args), "the device's images differ from those of the CPU by up to"),
        (cannot_decode, "the input paths could not be compared (the cuda device cannot decode a JPEG: not compiled"),
    ],
    ids=["other pixels", "no decoder"],
)
def test_a_device_that_decodes_wrongly_or_not_at_all_is_not_chosen(
    run: Any, message: str, folder: Path, timed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jpeg_batch, "run", run)
    chosen = choose_input_path(assemble(config(folder)))
    assert chosen.config.data.decode_on == "workers" and not chosen.data.train_set.encoded
    assert message in caplog.text


def test_a_comparison_that_fails_changes_nothing(
    folder: Path, timed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies = []

    def fails(module: ClassifierModule, *_: object) -> None:
        copies.append(weakref.ref(module))
        torch.rand(1), np.random.rand(), random.random()
        raise torch.OutOfMemoryError("CUDA out of memory")

    assembly = assemble(config(folder))
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    monkeypatch.setattr(ClassifierModule, "training_step", fails)
    chosen = choose_input_path(assembly)
    assert chosen.config.data.decode_on == "workers" and chosen.timed_input, "resumed runs and folds do not try again"
    assert "workers decode the images: the input paths could not be compared (CUDA out of memory" in caplog.text
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert assembly.data.trainer is None and not assembly.data.train_set.encoded
    assert copies[0]() is None, "the copy of the network holds memory"


def test_a_network_without_copies_trains_by_workers(
    folder: Path, timed: None, caplog: pytest.LogCaptureFixture
) -> None:
    assembly = assemble(config(folder))
    assembly.module.classifier.network.lock = threading.Lock()
    assert choose_input_path(assembly).config.data.decode_on == "workers"
    assert "could not be compared (cannot pickle '_thread.lock' object" in caplog.text


def test_the_timed_steps_train_all_layers_on_whole_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    step = ClassifierModule.training_step

    def watched(module: ClassifierModule, batch: dict, batch_idx: int) -> torch.Tensor:
        trains = all(parameter.requires_grad for parameter in module.classifier.parameters())
        seen.add((trains, module._sized(batch["images"]).shape[-1]))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(ClassifierModule, "training_step", watched)
    later = ("--trainer.start_size", "0.5", "--model.mode", "gradual", "--model.unfreeze_epochs", "1")
    timed_paths(assemble(config(folder, *later)), steps=1)
    assert seen == {(True, 16)}


def test_folds_measure_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = []
    monkeypatch.setattr(input_path, "why_not_timed", lambda _: None)
    monkeypatch.setattr(input_path, "timed_paths", lambda _: timings.append(1) or {"workers": 1.0, "device": 2.0})
    done = train_folds(config(folder, "--trainer.folds", "2", "--trainer.max_epochs", "1"), name="folds")
    places = [stored_config(done.run_dir / f"fold-{fold}").data.decode_on for fold in (1, 2)]
    assert places == ["device", "device"] and len(timings) == 1


def test_a_run_with_a_chosen_path_is_found_and_resumed_on_that_path(
    folder: Path, timed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_path, "faster", lambda _: "device")
    auto = config(folder)
    done = trained(auto, "run-whole")
    record = json.loads((done.run_dir / "run.json").read_text())
    (done.run_dir / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "finished"}))
    assert unfinished(auto.changed({"trainer.run_name": "run-whole"}), "run") == done.run_dir
    assert stored_config(done.run_dir).data.decode_on == "device"
    other = auto.changed({"trainer.run_name": "run-whole", "data.decode_on": "workers"})
    assert unfinished(other, "run") is None
    explicit = {k: v for k, v in record.items() if k not in ("finished", "timed_input")}
    (done.run_dir / "run.json").write_text(json.dumps(explicit))
    assert unfinished(auto.changed({"trainer.run_name": "run-whole"}), "run") is None, "the run asked for the device"


def test_a_resumed_run_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = trained(config(folder), "whole")
    record = json.loads((done.run_dir / "run.json").read_text())
    (done.run_dir / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "finished"}))
    timings = []
    monkeypatch.setattr(input_path, "why_not_timed", lambda _: timings.append(1))
    resumed = train(stored_config(done.run_dir), resume=done.run_dir)
    assert resumed is not None and resumed.run_dir == done.run_dir and timings == []


def test_a_name_that_is_taken_is_refused_before_the_timing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = []
    monkeypatch.setattr(input_path, "why_not_timed", lambda _: timings.append(1))
    Path("runs/taken").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"trainer\.run_name: runs/taken exists already; choose another name"):
        train(config(folder, "--trainer.run_name", "taken"))
    assert timings == []


def test_several_views_exclude_the_device(folder: Path) -> None:
    views = ("--loss.consistency", "1", "--augment.policy", "[AugMix]", "--data.decode_on", "device")
    with pytest.raises(ConfigError, match=r"data\.decode_on: device makes one view .*; set data\.decode_on: workers"):
        assemble(config(folder, *views))
