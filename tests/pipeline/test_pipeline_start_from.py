"""`retrain.start_from`: retraining from the champion's weights, from scratch, or from the better of both."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from small_data import COLORS, make_image, paint, write_image

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.data.manifest import Manifest, load_manifest
from refract.pipeline.retraining.exact_duplicates import contents
from refract.pipeline.retraining.run import begin
from refract.pipeline.retraining.snapshot import read_snapshot
from refract.pipeline.retraining.start_from import checked
from refract.pipeline.retraining.steps import STEPS, run_steps
from refract.pipeline.retraining.workspace import Record, read_run
from refract.pipeline.training.run_directory import read_record, stored_config

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path, new_tracking: Path) -> Config:
    shutil.copy(new_tracking, tmp_path)
    for label in COLORS:
        for number in range(20):  # noisy, so that one epoch from scratch is not perfect
            write_image(tmp_path / "images" / label / f"{number:03}.png", make_image(label, number, side=16))
    return config_from_dict(
        {
            "data": {"source": str(tmp_path / "images"), "image_size": 16, "workers": 0, "val_fraction": 0.25},
            "model": {"name": "lenet5"},
            "optim": {"lr": 0.01},
            "trainer": {"max_epochs": 2, "runs_dir": str(tmp_path / "runs")},
            "evaluation": {"robustness": "none"},
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "model_name": "colors"},
            "gate": {
                "robustness_loss": None, "latency_ratio": None, "calibration_error": None, "margin": -1,
                "lowest_gain": -1, "recall_loss": 1,
            },
            "retrain": {"folder": str(tmp_path / "retrain"), "drift": "none", "start_from": "auto"},
        }
    )  # fmt: skip


def retrained(config: Config) -> Record:
    folder = begin(config, force=False)
    run_steps(folder)
    return read_run(folder)


def table_of(record: Record) -> Manifest:
    return load_manifest(Path(record["snapshot_folder"]) / "manifest.csv")


def split_of(record: Record) -> dict[bytes, str]:
    return {sample.read(): sample.split for sample in table_of(record).samples}


def test_the_validation_set_chooses_between_scratch_and_champion(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = retrained(config)
    assert first["start"] == {
        "champion": None, "candidates": ["scratch"], "why": "no version is champion yet", "won": "scratch",
    }  # fmt: skip
    assert first["why"] == "version 1 is champion"

    paint(tmp_path / "images", range(20, 40))
    folder = begin(config, force=False)

    def killed(*_: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as before:
        before.setattr("refract.pipeline.retraining.start_from.choose", killed)
        with pytest.raises(KeyboardInterrupt):
            run_steps(folder)
    runs = {name: tmp_path / "runs" / f"colors-{folder.name}-{name}" for name in ("scratch", "champion")}
    assert all(read_record(run)["finished"] for run in runs.values())
    with monkeypatch.context() as after:
        after.setattr("refract.pipeline.training.run.fit", killed)  # both are trained already
        run_steps(folder)
    second = read_run(folder)
    start = second["start"]
    assert start["champion"] == "1" and set(start["accuracy"]) == {"scratch", "champion"}
    assert start["won"] == ("champion" if start["accuracy"]["champion"] > start["accuracy"]["scratch"] else "scratch")
    assert second["training_run"] == start["runs"][start["won"]] == str(runs[start["won"]])
    assert stored_config(runs["champion"]).model.weights == "models:/colors/1"
    assert stored_config(runs["scratch"]).model.weights == "none"

    client = MlflowClient(config.tracking.uri, config.tracking.uri)
    assert len(client.search_model_versions("name = 'colors'")) == 2, "the other candidate is not registered"
    version = client.get_model_version("colors", second["version"])
    assert version.tags["start"] == ("champion, version 1" if start["won"] == "champion" else "scratch")
    assert version.run_id == second["mlflow_run"] and second["version"] == "2"

    before_it, now = split_of(first), split_of(second)
    known_contents = [content for content in before_it if content in now]
    assert len(known_contents) == 60 and all(now[content] == before_it[content] for content in known_contents), (
        "no image changes its split"
    )
    new = [split for content, split in now.items() if content not in before_it]
    assert new.count("val") == 15 and new.count("train") == 45, "a quarter of the new images"
    assert start["images"] == list(now.values()).count("val")

    assert retrained(config).get("unchanged"), "the same champion and the same data"


def test_a_champion_that_cannot_be_continued(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = retrained(config.changed({"retrain.start_from": "champion"}))
    assert first["start"]["won"] == "scratch"
    other = config.changed({"model.name": "resnet20", "trainer.max_epochs": 1})
    folder = begin(other.changed({"retrain.start_from": "champion"}), force=False)
    with pytest.raises(ConfigError, match=r"start_from: champion: version 1: .*another network|no key fits") as error:
        run_steps(folder)
    assert "model.name: lenet5" in str(error.value) and "set retrain.start_from: scratch" in str(error.value)

    fallback = begin(other, force=False)
    for step in STEPS[:3]:
        step(fallback)
    start = read_run(fallback)["start"]
    assert start["won"] == "scratch" and "model.name: lenet5" in start["why"]
    assert "the champion's weights do not fit" in caplog.text

    record = read_run(fallback)
    snapshot = read_snapshot(Path(record["snapshot_folder"]), record["snapshot"])
    held = table_of(record).of("test")
    splits = {next(iter(contents(held[0]))): "train"}
    assert checked({"candidates": ["champion"], "champion": "1"}, splits, snapshot) == {
        "candidates": ["scratch"], "champion": "1", "why": "the champion was trained on 1 images of the holdout",
    }  # fmt: skip
