"""`refract profile` names planted bottlenecks, and proposes settings that the config accepts."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from small_data import COLORS, Run, make_image, write_image

from refract.pipeline.config.config import ConfigError, config_from_dict
from refract.pipeline.data import storage
from refract.pipeline.doctor.watch import Doctor
from refract.pipeline.training.bottleneck import explanation, proposals
from refract.pipeline.training.profile import STEP_STAGES, Profile, profile

STEPS = 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of 18 images: `small` of 24 pixels, `large` of 1,200 pixels."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("small", "large")}
    for label in COLORS:
        for number in range(6):
            image = make_image(label, number)
            write_image(folders["small"] / label / f"{number}.png", image)
            write_image(folders["large"] / label / f"{number}.png", cv2.resize(image, (1200, 1200)))
    return folders


def profiled(folder: Path, config: dict[str, Any]) -> Profile:
    base: dict[str, dict[str, Any]] = {
        "data": {"source": str(folder), "image_size": 32, "batch_size": 6, "workers": 0, "memory": "never"},
        "augment": {"policy": "none"},
        "model": {"name": "lenet5"},
        "trainer": {"device": "cpu", "precision": "fp32"},
    }
    for section, values in config.items():
        base[section] = base.get(section, {}) | values
    return profile(config_from_dict(base), steps=STEPS)


def test_large_files_make_decoding_the_bottleneck(photos: dict[str, Path]) -> None:
    measured = profiled(photos["large"], {})
    assert measured.bottleneck == "decode", explanation(measured)
    assert measured.decoded_bytes == pytest.approx(3 * 1200 * 1200 * 12, rel=0.2)


def test_a_slow_disk_makes_reading_the_bottleneck(photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = storage.LocalFiles.open

    def slow(self: storage.LocalFiles, path: str) -> Any:
        time.sleep(0.02)
        return opened(self, path)

    monkeypatch.setattr(storage.LocalFiles, "open", slow)
    measured = profiled(photos["small"], {})
    assert measured.bottleneck == "read", explanation(measured)


def test_slow_ops_make_augmentation_the_bottleneck(photos: dict[str, Path]) -> None:
    ops = [{"Resize": {"size": 300}}, *({"ElasticDeform": {"p": 1.0}} for _ in range(3))]
    measured = profiled(photos["small"], {"augment": {"policy": ops}})
    assert measured.bottleneck == "augment", explanation(measured)
    assert measured.slowest is not None and "ElasticDeform" in measured.slowest[0]


def test_a_large_network_makes_the_computation_the_bottleneck(photos: dict[str, Path]) -> None:
    measured = profiled(
        photos["small"], {"model": {"name": "resnet18"}, "data": {"image_size": 96, "memory": "always"}}
    )
    assert measured.bottleneck in ("forward", "backward"), explanation(measured)


def test_an_expensive_optimiser_is_the_bottleneck(photos: dict[str, Path]) -> None:
    network = {"name": "mlp", "args": {"hidden": [384, 384, 384]}}
    measured = profiled(photos["small"], {"model": network, "optim": {"name": "muon"}, "data": {"memory": "always"}})
    assert measured.bottleneck == "optimiser", explanation(measured)


def test_a_slow_callback_is_the_bottleneck(photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doctor, "on_train_batch_end", lambda *_: time.sleep(0.2))
    measured = profiled(photos["small"], {"data": {"memory": "always"}})
    assert measured.bottleneck == "callbacks", explanation(measured)


def with_stages(workers: int = 1, **stages: float) -> Profile:
    times = dict.fromkeys((*STEP_STAGES, "read", "decode", "augment", "collate"), 1.0) | stages
    return Profile(sum(times[name] for name in STEP_STAGES), times, workers, 4, 32, 10**6)


@pytest.mark.parametrize(
    "measured, setting",
    [
        (with_stages(wait=50, decode=90), {"data.memory": "always"}),
        (with_stages(wait=50, augment=90), {"data.workers": 4}),
        (with_stages(wait=50, collate=90), {"data.workers": 4}),
        (with_stages(backward=90), {"trainer.precision": "auto"}),
        (with_stages(optimiser=90), {"optim.name": "adamw"}),
        (with_stages(callbacks=90), {"data.batch_size": 64}),
    ],
)
def test_the_first_proposal_lifts_the_bottleneck(measured: Profile, setting: dict[str, Any]) -> None:
    config = config_from_dict({"data": {"batch_size": 32}, "trainer": {"precision": "fp32"}, "optim": {"name": "muon"}})
    first = proposals(measured, config)[0]
    assert first.setting == setting
    config.changed(first.setting)  # is accepted


def test_images_that_do_not_fit_the_memory_are_not_proposed_for_it() -> None:
    measured = with_stages(workers=4, wait=50, decode=90)
    large = Profile(measured.step, measured.stages, 4, 4, 32, 10**15)
    (proposal,) = proposals(large, config_from_dict({}))
    assert not proposal.setting and "FOLDER --resize" in proposal.reason


def test_a_gpu_that_waits_for_the_decoder_is_to_decode_itself() -> None:
    config = config_from_dict({"data": {"memory": "always"}})
    for stage in ("decode", "augment"):
        measured = with_stages(workers=4, wait=50, **{stage: 90})
        settings = {
            place: [proposal.setting for proposal in proposals(replace(measured, decodes_on=place), config)]
            for place in ("workers", "device", None)
        }
        assert settings["workers"][0] == {"data.decode_on": "device"}
        assert {"data.decode_on": "device"} not in settings["device"] + settings[None]
    slow = replace(with_stages(images=90), decodes_on="device")
    assert [proposal.setting for proposal in proposals(slow, config)] == [{"data.decode_on": "workers"}]
    config.changed({"data.decode_on": "device"})  # is accepted


def test_decoding_in_the_training_process_is_a_stage(photos: dict[str, Path]) -> None:
    for label in COLORS:
        for file in (photos["large"] / label).glob("*.png"):
            write_image(photos["large"] / "jpeg" / label / f"{file.stem}.jpg", cv2.imread(str(file))[:, :, ::-1])
    measured = profiled(photos["large"] / "jpeg", {"data": {"decode_on": "device"}})
    assert measured.bottleneck == "images" and measured.decodes_on == "device", explanation(measured)
    assert sum(measured.stages[name] for name in STEP_STAGES) > 0.8 * measured.step
    assert measured.stages["decode"] == 0, "workers do not decode"


def test_modes_without_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="probe fits a head on embeddings"):
        profile(config_from_dict({"model": {"mode": "probe"}}), steps=1)


@pytest.mark.slow
def test_the_command_tries_its_proposal_and_writes_a_trace(
    refract: Run, photos: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(
        f"data: {{source: {photos['large']}, image_size: 32, batch_size: 6, workers: 1, memory: never}}\n"
        "augment: {policy: none}\nmodel: {name: lenet5}\n"
    )
    done = refract("profile", "config.yaml", "--steps", STEPS, "--trace", "trace.json", "--json")
    result = json.loads(done.stdout)
    assert result["bottleneck"] == "decode" and result["tried"]["setting"] == {"data.memory": "always"}
    assert result["tried"]["images_per_second"] > result["images_per_second"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"wait", "forward", "backward", "optimiser"}
    assert not (tmp_path / "runs").exists()
    assert np.isfinite([event["dur"] for event in events]).all()
