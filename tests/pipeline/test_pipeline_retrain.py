"""Retraining: fifteen runs in one process, and a run that is killed in each of its steps."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from small_data import COLORS, Run, make_image, paint, to_former_layout, write_image
from warm_process import Started, WarmProcess

from refract.pipeline.config.config import Config, ConfigError, config_from_dict, load_config
from refract.pipeline.data.manifest import DataError, load_manifest
from refract.pipeline.retraining.run import ATTEMPTS, begin, note_stop, unfinished, worth_resuming
from refract.pipeline.retraining.snapshot import Snapshot, accept, take
from refract.pipeline.retraining.steps import STEPS, Outcome, RetrainingError, run_steps
from refract.pipeline.retraining.stored_snapshots import trained_before
from refract.pipeline.retraining.workspace import WorkspaceLocked, read_run, workspace_of, write_run
from refract.pipeline.tracking.aliases import aliases, rollback

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two


def values_of(root: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(root / "images"), "image_size": 16, "workers": 0},
        "augment": {"policy": "none"},
        "model": {"name": "lenet5"},
        "optim": {"lr": 0.01},
        "trainer": {"max_epochs": 4, "runs_dir": str(root / "runs")},
        "evaluation": {"robustness": "none"},
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db", "model_name": "colors"},
        "gate": {"robustness_loss": None, "latency_ratio": None, "calibration_error": None},
        "retrain": {"folder": str(root / "retrain")},
    }


@pytest.fixture
def config(tmp_path: Path, new_tracking: Path) -> Config:
    shutil.copy(new_tracking, tmp_path)
    paint(tmp_path / "images", range(30))
    return config_from_dict(values_of(tmp_path))


def taken(config: Config) -> Snapshot:
    """Take and accept a snapshot."""
    snapshot = take(config, workspace_of(config))
    accept(workspace_of(config), snapshot)
    return snapshot


def test_the_holdout_is_frozen_and_never_trained_on(config: Config, tmp_path: Path) -> None:
    workspace = workspace_of(config)
    first = taken(config)
    held = load_manifest(workspace.holdout / "holdout.csv")
    assert len(held.samples) == 18, "a fifth"
    contents = {sample.read() for sample in held.samples}

    paint(tmp_path / "images", range(30, 60))
    copy = held.samples[0]
    label = held.labels[copy.labels[0]]
    shutil.copy(copy.path, tmp_path / "images" / label / "another_name.png")
    second = taken(config)
    assert second.holdout == first.holdout
    assert second.digest != first.digest
    table = load_manifest(second.manifest)
    assert {s.read() for s in table.of("test")} == contents
    assert not contents & {s.read() for s in table.samples if s.split != "test"}
    assert len(table.samples) == 180, "all others train or validate"

    again = taken(config)
    assert again == second
    write_image(tmp_path / "images" / "yellow" / "0.png", np.full((16, 16, 3), (250, 240, 0), np.uint8))
    for number in range(1, 10):
        shade = np.full((16, 16, 3), (250, 240, number * 5), np.uint8)
        write_image(tmp_path / "images" / "yellow" / f"{number}.png", shade)
    third = taken(config)
    assert third.holdout != first.holdout, "a new class gets its share"
    assert third.counts["test"] == {"blue": 6, "green": 6, "red": 6, "yellow": 2}

    shutil.rmtree(tmp_path / "images" / "red")
    with pytest.raises(DataError, match="have images in val or test, but none in train"):
        taken(config)

    Path(held.samples[3].path).write_bytes(b"other")
    with pytest.raises(DataError, match="1 images of the frozen holdout are gone or have changed"):
        taken(config)


@pytest.mark.parametrize("folder", ["own", "own/test"])
def test_gate_holdout_is_frozen_as_it_is(config: Config, tmp_path: Path, folder: str) -> None:
    """It may be the test part of a data set alone."""
    paint(tmp_path / folder, range(100, 104))
    shutil.copy(tmp_path / folder / "red/100.png", tmp_path / "images/red/copy.png")
    config = config.changed({"gate.holdout": str(tmp_path / "own")})
    table = load_manifest(taken(config).manifest)
    assert len(table.of("test")) == 12
    assert len(table.of("train")) + len(table.of("val")) == 90, "its copy is not trained on"


def test_a_missing_or_wrong_config_value_is_named(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.model_name"):
        workspace_of(config.changed({"tracking.model_name": None}))
    for section, key, value in (("gate", "recall", 1.5), ("retrain", "largest_loss", -1), ("gate", "size_mb", 0)):
        with pytest.raises(ConfigError, match=rf"{section}\.{key}"):
            config_from_dict({section: {key: value}})


class Retraining:
    """Runs the steps of `refract retrain` in this process."""

    def __init__(self, root: Path) -> None:
        self.root, self.values = root, values_of(root)
        paint(root / "images", range(40))
        self.client = MlflowClient(self.values["tracking"]["uri"], self.values["tracking"]["uri"])
        self.champions: list[str] = []

    def config(self, **changes: Any) -> Config:
        merged = {name: section | changes.get(name, {}) for name, section in self.values.items()}
        return config_from_dict(merged)

    def run(self, *, force: bool = False, **changes: Any) -> dict[str, Any]:
        folder = begin(self.config(**changes), force=force)
        run_steps(folder)
        return self.ended(folder)

    def ended(self, folder: Path) -> dict[str, Any]:
        record = read_run(folder)
        champion = aliases(self.client, "colors")["champion"]
        self.client.get_model_version("colors", champion)
        self.champions.append(champion)
        return record

    def spoil(self, share: float) -> None:
        """Move this fraction of the images of each class to another class's folder."""
        names = sorted(COLORS)
        moved = []
        for label, other in zip(names, names[1:] + names[:1], strict=True):
            files = sorted((self.root / "images" / label).glob("*.png"))
            moved += [
                (file, self.root / "images" / other / f"{label}-{file.name}")
                for file in files[: int(share * len(files))]
            ]
        for file, target in moved:
            file.rename(target)


@pytest.mark.timeout(1200)
def test_fifteen_runs(tmp_path: Path, new_tracking: Path) -> None:
    shutil.copy(new_tracking, tmp_path)
    retraining = Retraining(tmp_path)
    images, backup = tmp_path / "images", tmp_path / "backup"
    workspace = workspace_of(retraining.config())

    first = retraining.run()
    assert (first["outcome"], first["champion"], first["version"]) == (Outcome.PROMOTED, None, "1"), first["why"]

    second = retraining.run()
    assert second["unchanged"]
    assert "version" not in second
    assert second["outcome"] == Outcome.PROMOTED

    paint(images, range(40, 60))
    third = retraining.run()
    assert (third["outcome"], third["version"], third["champion"]) == (Outcome.PROMOTED, "2", "1"), third["why"]
    assert third["drift"]["level"] != "stop"
    assert "of 60 new images" in third["drift"]["summary"]

    shutil.copytree(images, backup)
    retraining.spoil(0.7)  # somebody mixed the folders up
    refused = retraining.run()
    assert refused["outcome"] == Outcome.REFUSED
    assert "known samples changed label: " in refused["why"] and "blue → green " in refused["why"]
    on_purpose = {"relabelled_stop": None}
    fourth = retraining.run(retrain=on_purpose)
    assert fourth["outcome"] == Outcome.NOT_PROMOTED
    assert {"margin", "interval"} <= {line["name"] for line in fourth["gate"]["lines"] if not line["passed"]}
    assert retraining.client.get_model_version("colors", fourth["version"]).tags["gate"] == "failed"
    assert "failed at margin" in fourth["why"]
    described = retraining.client.get_model_version("colors", fourth["version"])
    champion = retraining.client.get_model_version("colors", third["version"])
    assert "The promotion gate failed against version 2, on " in described.description, described.description
    assert "The promotion gate passed against version 1, on " in champion.description
    assert described.tags["metric.accuracy"].startswith("0.")
    card = Path(retraining.client.download_artifacts(described.run_id, "model_card.md")).read_text("utf-8")
    assert "The promotion gate failed against version 2" in card and "| margin | failed | " in card

    shutil.rmtree(images)
    shutil.copytree(backup, images)
    fifth = retraining.run(retrain=on_purpose)  # restored: as in the third run, but for the records since
    assert fifth["outcome"] == Outcome.PROMOTED

    (images / "red" / "000.png").write_bytes(b"\x89PNG damaged")
    sixth = retraining.run()
    assert sixth["outcome"] == Outcome.REFUSED
    assert "000.png" in sixth["why"]
    seventh = retraining.run(data={"on_bad_file": "skip"})
    assert seventh["outcome"] == Outcome.PROMOTED, "one image of sixty may be skipped"

    for number in range(40):  # somebody's lens cap
        write_image(images / "red" / f"dark{number}.png", (make_image("red", number, side=16) * 0.2).astype(np.uint8))
    drifted = retraining.run(data={"on_bad_file": "skip"}, retrain={"drift": "stop"})
    assert drifted["outcome"] == Outcome.REFUSED
    assert "the new data drifted: " in drifted["why"]
    assert "brightness" in drifted["why"]
    report = tmp_path / "retrain/colors/runs" / drifted["run"] / "drift" / "report.html"
    assert report.stat().st_size > 1000
    for file in images.glob("red/dark*.png"):
        file.unlink()

    for file in sorted((images / "green").glob("*.png"))[:30]:
        file.unlink()
    eighth = retraining.run(data={"on_bad_file": "skip"})
    assert eighth["outcome"] == Outcome.REFUSED
    assert "green: " in eighth["why"]
    ninth = retraining.run(data={"on_bad_file": "skip"}, retrain={"largest_loss": 0.9})
    assert ninth["outcome"] in (Outcome.PROMOTED, Outcome.NOT_PROMOTED), "the config allows the loss"

    for number in range(30):
        noise = np.random.default_rng(number).normal(0, 20, (16, 16, 3))
        yellow = np.clip(np.array((230, 220, 30)) + noise, 0, 255).astype(np.uint8)
        write_image(images / "yellow" / f"{number}.png", yellow)
    tenth = retraining.run(data={"on_bad_file": "skip"})
    assert tenth["outcome"] == Outcome.PROMOTED, tenth["why"]
    assert tenth["snapshot"]["holdout"] != first["snapshot"]["holdout"], "the holdout gets the new class"

    before = aliases(retraining.client, "colors")
    back, left = rollback(retraining.client, "colors")
    assert (back, left) == (before["previous"], before["champion"])
    eleventh = retraining.run(force=True, data={"on_bad_file": "skip"})
    assert eleventh["champion"] == back, "the challenger is compared with the restored champion"

    shutil.rmtree(images / "yellow")
    twelfth = retraining.run(data={"on_bad_file": "skip"})
    assert twelfth["outcome"] == Outcome.REFUSED

    shutil.copytree(backup, images, dirs_exist_ok=True)
    shutil.rmtree(workspace.holdout)
    trained = trained_before(workspace)
    fourteenth = retraining.run(gate={"size_mb": 1e-6}, retrain={"largest_loss": 1.0, "keep_snapshots": 1})
    assert fourteenth["outcome"] == Outcome.NOT_PROMOTED
    assert [line["name"] for line in fourteenth["gate"]["lines"] if not line["passed"]][-1] == "size"
    holdout = next(line for line in fourteenth["gate"]["lines"] if line["name"] == "holdout")
    assert not holdout["passed"], "the champion was trained on images of a holdout that is drawn anew"
    named = [retraining.client.get_model_version("colors", v) for v in aliases(retraining.client, "colors").values()]
    in_use = {workspace.snapshot(version.tags["snapshot"]) for version in named}
    assert len(in_use) == 3 and {path for path in (workspace.root / "snapshots").iterdir() if path.is_dir()} == in_use
    assert trained_before(workspace) >= trained, "images of removed snapshots count, too"
    assert len(retraining.champions) == 15
    assert unfinished(workspace) is None


def test_a_run_resumes_once_mlflow_responds(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refract.pipeline.tracking.store import Store

    folder = begin(config, force=False)
    with monkeypatch.context() as away:

        def unreachable(*_: Any) -> dict[str, Any]:
            raise ConnectionError("nobody is there")

        away.setattr(Store, "deliver", unreachable)
        away.setattr("refract.pipeline.tracking.tracker.FIRST_ANSWER", 0.1)
        with pytest.raises(RetrainingError, match="nobody is there"):
            run_steps(folder)
    workspace = workspace_of(config)
    assert unfinished(workspace) == folder and "training_run" in read_run(folder)
    run_steps(folder)
    assert read_run(folder)["outcome"] == Outcome.PROMOTED
    assert unfinished(workspace) is None


def test_one_run_at_a_time(config: Config) -> None:
    workspace = workspace_of(config)
    with workspace.held(), pytest.raises(WorkspaceLocked, match="one at a time"), workspace.held():
        pass
    with workspace.held():
        pass


def fails(*_: object) -> None:
    raise OSError("no space left on device")


def test_an_unfinished_run_is_resumed_with_its_config_until_it_failed_too_often(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(config, force=False)
    monkeypatch.setattr("refract.pipeline.retraining.snapshot.take", fails)
    for _ in range(ATTEMPTS):
        assert worth_resuming(folder, config)
        with pytest.raises(OSError, match="no space"):
            run_steps(folder)
    assert not worth_resuming(folder, config)
    note_stop(folder)
    assert worth_resuming(folder, config), "a signal is no failure"
    folder = begin(config, force=False)
    config = config.changed({"gate.margin": 0.1})
    assert not worth_resuming(folder, config), "a changed config starts a new run"


def test_data_that_change_during_a_run_are_refused(config: Config, tmp_path: Path) -> None:
    folder = begin(config, force=False)
    STEPS[0](folder)
    write_image(tmp_path / "images" / "red" / "003.png", make_image("red", 903, side=16))
    for step in STEPS[2:]:
        step(folder)
    record = read_run(folder)
    assert record["outcome"] == Outcome.REFUSED and "1 images changed since the run started" in record["why"]
    assert not list((tmp_path / "runs").glob("*")) and unfinished(workspace_of(config)) is None


def test_a_model_name_that_mlflow_refuses_is_named(config: Config) -> None:
    config = config.changed({"tracking.model_name": "team/colors"})
    with pytest.raises(ConfigError, match=r"tracking\.model_name: 'team/colors'"):
        workspace_of(config)


def test_a_slow_notify_command_is_killed(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("refract.pipeline.retraining.steps.NOTIFY_SECONDS", 0.05)
    config = config.changed({"retrain.notify": "sleep 5"})
    folder = begin(config, force=False)
    write_run(folder, read_run(folder) | {"ends": int(Outcome.REFUSED), "why": "-"})
    STEPS[-1](folder)
    assert read_run(folder)["outcome"] == Outcome.REFUSED and "the command was killed after" in caplog.text


def test_metaflow_runs_the_same_steps(config: Config, tmp_path: Path) -> None:
    """On refused data, whose later steps have nothing to do."""
    (tmp_path / "images/red/000.png").write_bytes(b"no image")
    folder = begin(config, force=False)
    command = [sys.executable, "-m", "refract.pipeline.retraining.flow", "--no-pylint", "run", "--run", folder]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"USER": "refract"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    between = [step.name for step in STEPS[1:-1]]
    assert re.findall(r"/(\w+)/\d+ .*Task is starting", done.stdout) == ["start", *between, "end"]
    record = read_run(folder)
    assert record["outcome"] == Outcome.REFUSED and "000.png" in record["why"]


def test_sigterm_leaves_a_checkpoint(workplace: Path, warm: WarmProcess) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    run = warm.start(
        ["retrain", "colors.yaml", "--trainer.max_epochs", "300", "--trainer.checkpoint_seconds", "900"],
        cwd=workplace, env=environment,
    )  # fmt: skip
    with run.output:
        assert any("epoch 1/300" in line for line in run.output)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == Outcome.FAILED
        assert "with a checkpoint to resume from" in run.output.read()
    (folder,) = (workplace / "retrain/colors/runs").iterdir()
    assert read_run(folder)["attempts"] == 0, "it did not fail"
    assert list((workplace / "runs").glob("*/checkpoints/resume-*"))


def _until(started: Started, step: str) -> None:
    """Read the output until the step starts, and kill the process."""
    lines = []
    for line in started.output:
        lines.append(line)
        if f": {step}\n" in line:
            started.kill()
            started.wait(20)
            return
    pytest.fail(f"{step} never started: {''.join(lines)}")


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    paint(tmp_path / "images", range(20))
    values = values_of(tmp_path)
    values["data"]["source"] = "images"
    values["retrain"]["notify"] = "cat > record.json"
    (tmp_path / "colors.yaml").write_text(yaml.safe_dump(values))
    yield tmp_path


@pytest.mark.timeout(600)
def test_a_run_killed_in_each_step_ends_as_one_undisturbed(
    refract: Run, workplace: Path, warm: WarmProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    for number, step in enumerate(step.name for step in STEPS):
        arguments = ["colors.yaml"] if number == 0 else ["--resume", "colors.yaml"]
        run = warm.start(["retrain", *arguments], cwd=workplace, env=environment)
        with run.output:
            _until(run, step)
        if step == "register":
            to_former_layout(workplace / "retrain/colors")  # the next run is of a version that renames it back
    done = refract("retrain", "--resume", "colors.yaml")
    assert "promoted: version 1 is champion" in done.stdout
    assert re.findall(r"^step . of 7: (.*)", done.stderr, re.M) == ["announce"], "what had ended is not repeated"

    client = MlflowClient(f"sqlite:///{workplace}/mlflow.db", f"sqlite:///{workplace}/mlflow.db")
    assert aliases(client, "colors") == {"champion": "1", "challenger": "1"}
    assert [v.version for v in client.search_model_versions("name = 'colors'")] in (["1"], [1])
    runs = list((workplace / "retrain/colors/runs").iterdir())
    assert len(runs) == 1
    assert json.loads((workplace / "record.json").read_text())["why"] == "version 1 is champion"

    assert "unchanged" in refract("retrain", "colors.yaml").stdout
    assert "has no interrupted run" in refract("retrain", "--resume", "colors.yaml", code=2).stderr
    monkeypatch.chdir(workplace)
    undisturbed = begin(load_config("colors.yaml"), force=True)
    run_steps(undisturbed)
    assert read_run(undisturbed)["why"] == "version 2 is champion"
    runs = sorted((workplace / "runs").iterdir())
    one, other = ((run / "bundle/weights.safetensors").read_bytes() for run in runs)
    assert one == other, "the same result, bit for bit"
    (workplace / "images/red/000.png").write_bytes(b"no image")
    assert "000.png" in refract("retrain", "colors.yaml", code=20).stdout
