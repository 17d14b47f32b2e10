"""A training that is killed, stopped or cannot write resumes to the weights of an undisturbed one."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run as TrackedRun
from safetensors.torch import load_file
from small_data import Run, Training, descendants, make_image, until, until_gone, write_image
from warm_process import shared

from refract.pipeline.config.config import Config
from refract.pipeline.config.defaults import filled
from refract.pipeline.data.manifest import DataError
from refract.pipeline.stopping import Stop, Stopped
from refract.pipeline.tracking.journal import Journal
from refract.pipeline.training.callbacks.checkpoints import ResumeCheckpoint, newest
from refract.pipeline.training.provenance import inputs
from refract.pipeline.training.run_directory import new_run, resume_run, run_lock, stored_config, unfinished

# What draws from PyTorch's generator, averages, and mixes: all that a restart could lose.
CONFIG = """
data: {source: images, image_size: 24, batch_size: 8, workers: 0}
augment: {policy: [HorizontalFlip, {MixUp: {p: 0.5}}]}
model: {name: cnn, args: {widths: [8, 16], dropout: 0.3}}
optim: {name: sgd, lr: 0.02}
trainer: {max_epochs: %d, precision: fp32, device: cpu, ema: 0.9, checkpoint_seconds: 0}
evaluation: {robustness: none}
"""


@pytest.fixture
def work(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG % 4)
    return tmp_path


def client_of(work: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{work}/mlflow.db")


def tracked(work: Path, name: str) -> TrackedRun:
    """Return the only MLflow run of this name."""
    client = client_of(work)
    experiment = client.get_experiment_by_name("refract").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    return run


def history(work: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """Return metric → (step, value) of the only MLflow run of this name, without times."""
    client, run = client_of(work), tracked(work, name)
    assert run.info.status == "FINISHED"
    metrics = [metric for metric in run.data.metrics if metric != "epoch_seconds" and not metric.startswith("cost_")]
    return {
        metric: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
        for metric in metrics
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers_wanted", [0, 1])
def test_a_killed_training_resumes_to_the_same_weights_in_the_same_run(
    refract: Run, work: Path, workers_wanted: int, training: Training
) -> None:
    memory = "never" if workers_wanted else "auto"
    rounded = str(bool(workers_wanted)).lower()
    more = ("--data.workers", str(workers_wanted), "--data.memory", memory, "--trainer.quantization_aware", rounded)
    refract("train", "c.yaml", *more, "--trainer.run_name", "calm")
    with training("c.yaml", *more, "--trainer.run_name", "killed") as process:
        until(process, "epoch 2/")
        workers = descendants(process.pid)
        process.kill()
    assert bool(workers) == bool(workers_wanted)
    until_gone(workers)
    with training("--resume", "runs/killed") as process:
        until(process, "epoch ")
        process.kill()
    refract("train", "--resume", "runs/killed")
    calm, killed = (load_file(work / "runs" / name / "bundle" / "weights.safetensors") for name in ("calm", "killed"))
    assert all((killed[key] == weight).all() for key, weight in calm.items())
    assert history(work, "killed") == history(work, "calm")
    assert sorted(path.name for path in (work / "runs" / "killed" / "checkpoints").iterdir()) == ["best.ckpt"]
    assert "is finished already; its bundle is" in refract("train", "--resume", "runs/killed", code=2).stderr


@pytest.mark.slow
def test_each_signal_stops_with_a_checkpoint_and_its_exit_code(refract: Run, work: Path, training: Training) -> None:
    (work / "c.yaml").write_text(CONFIG % 400)
    with training("c.yaml", "--trainer.run_name", "r") as process:
        until(process, "epoch 2/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
        assert "Traceback" not in process.output.read()
    assert tracked(work, "r").info.status == "KILLED"
    with training("--resume", "runs/r") as process:
        assert "resuming from runs/r/checkpoints/resume-" in until(process, "epoch ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "stopped by SIGINT" in process.output.read()
    # The newest unfinished run of a config is found by itself; another config begins a new one.
    with training("c.yaml", "--trainer.run_name", "r", "--resume", "auto") as process:
        assert "resuming from runs/r/checkpoints/resume-" in until(process, "epoch ")
        printed = refract("train", "--resume", "runs/r", code=2).stderr
        assert "runs/r is being trained by another process" in printed
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    assert tracked(work, "r").info.status == "KILLED"


@pytest.mark.slow
def test_a_stopped_demo_names_the_command_that_resumes_it(work: Path) -> None:
    process = shared().popen(["demo"], cwd=work)
    assert any(line.startswith("epoch 2/") for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[1]
    assert process.returncode == 75 and "Traceback" not in printed
    assert "refract demo: stopped by SIGTERM; `refract train --resume runs/digits-" in printed


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(refract: Run, work: Path, training: Training) -> None:
    quiet = ("--tracking.enabled", "false", "--trainer.run_name", "full")
    with training("c.yaml", *quiet) as process:
        until(process, "epoch 2/")
        process.kill()
    checkpoint = newest(work / "runs" / "full" / "checkpoints")
    assert checkpoint is not None

    with training("--resume", "runs/full", largest_file=10_000) as process:
        printed = process.output.read()
        assert process.wait(timeout=60) == 1
    assert (
        "cannot be written (File too large); earlier checkpoints are intact" in printed and "Traceback" not in printed
    )
    assert newest(work / "runs" / "full" / "checkpoints") == checkpoint
    refract("train", "--resume", "runs/full")


@pytest.fixture
def stopped(work: Path, training: Training) -> Path:
    """A run without MLflow that was killed after two epochs."""
    with training("c.yaml", "--tracking.enabled", "false", "--trainer.run_name", "r") as process:
        until(process, "epoch 2/")
        process.kill()
    return work / "runs" / "r"


@pytest.mark.slow
def test_runs_that_cannot_resume_are_rejected(refract: Run, work: Path, stopped: Path) -> None:
    checkpoints = stopped / "checkpoints"
    last = newest(checkpoints)
    assert last is not None
    last.write_bytes(last.read_bytes()[:-100])
    fallback = newest(checkpoints)
    assert fallback is not None and fallback < last
    write_image(work / "images" / "red" / "new.jpg", make_image("red", 77))
    printed = refract("train", "--resume", "runs/r", code=2).stderr
    assert "the data of runs/r have changed since it started" in printed
    (work / "images" / "red" / "new.jpg").unlink()
    assert "runs/none is not a run: there is no such folder" in refract("train", "--resume", "runs/none", code=2).stderr
    assert "uses the run's config; remove" in refract("train", "c.yaml", "--resume", "runs/r", code=2).stderr
    assert "needs the config file first" in refract("train", "--resume", "auto", code=2).stderr
    printed = refract("train", "c.yaml", "--trainer.run_name", "r", code=2).stderr
    assert "runs/r exists already" in printed and "`refract train --resume runs/r` resumes it" in printed
    # A moved run resumes.
    shutil.move(stopped, work / "elsewhere")
    printed = refract("train", "--resume", "elsewhere").stderr
    assert (
        f"{last.name} is damaged; an older one is used" in printed
        and f"resuming from elsewhere/checkpoints/{fallback.name}" in printed
    )
    assert (work / "elsewhere" / "bundle").is_dir() and not (work / "runs" / "r").exists()


@pytest.mark.parametrize("former", [False, True])
def test_each_random_generator_is_restored(tmp_path: Path, former: bool) -> None:
    """Checkpoints of earlier versions hold lists of numbers."""

    def drawn() -> tuple[object, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(1))

    def callback() -> ResumeCheckpoint:
        return ResumeCheckpoint(tmp_path, seconds=0, stop=Stop("soon"))

    random.gauss(0, 1), np.random.randn()  # of each, a second one is kept for the next call
    state = callback().state_dict()
    if former:
        for kind in ("python", "numpy"):
            state[kind] = tuple(v.tolist() if isinstance(v, torch.Tensor) else v for v in state[kind])
    torch.save(state, tmp_path / "state")
    wanted = drawn()
    assert drawn() != wanted
    again = callback()
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    again.on_train_start(SimpleNamespace(should_stop=False, global_rank=0), None)
    assert drawn() == wanted


def test_a_run_whose_weights_or_teacher_changed_cannot_resume(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "weights.bin").write_bytes(b"1")
    (tmp_path / "w.pt").write_bytes(b"2")
    files = {"loss.teacher": str(tmp_path / "teacher"), "model.weights": str(tmp_path / "w.pt")}
    config = Config().changed({**files, "trainer.runs_dir": str(tmp_path / "runs")})
    record = {"fingerprint": "f", "versions": {}, "inputs": inputs(config)}
    assert set(record["inputs"]) == {"model.weights", "loss.teacher"}
    run = new_run(config, "r", record)
    assert resume_run(run.path, {"fingerprint": "f", "inputs": inputs(config)}).resumed
    (tmp_path / "teacher" / "weights.bin").write_bytes(b"3")
    with pytest.raises(DataError, match=r"the file of loss\.teacher has changed since .*/r-.* started"):
        resume_run(run.path, {"fingerprint": "f", "inputs": inputs(config)})


def test_the_weights_of_a_package_are_an_input_and_a_download_is_not() -> None:
    default = Config().changed({"model.weights": "default"})
    assert set(inputs(default.changed({"model.name": "timm/tf_efficientnet_lite0"}))) == {"model.weights"}
    assert inputs(default.changed({"model.name": "resnet18"})) == {}


def test_files_that_a_policy_names_are_inputs_and_other_words_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("small,little\n")
    (tmp_path / "brands.txt").write_text("Canon\n")
    for name in ("no", "constant"):
        (tmp_path / name).mkdir()
    os.mkfifo("mean")
    long = "please note that " * 40
    policy = [
        {"WordSubstitute": {"table": "t.csv", "keep": ["brands.txt", "no", long]}},
        {"Rotate": {"degrees": 10, "border": "constant"}},
        {"HideAndSeek": {"fill": "mean"}},
    ]
    config = Config().changed({"augment.policy": policy, "text.name": long})
    assert set(inputs(config)) == {"augment.policy: t.csv", "augment.policy: brands.txt"}


def test_a_run_is_locked_by_one_process_and_found_by_its_config(tmp_path: Path) -> None:
    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.training.run_directory import new_run

    config = Config().changed({"trainer.runs_dir": str(tmp_path)})
    run = new_run(filled(config), "digits", {"fingerprint": "f", "versions": {}})  # as `assemble` fills the config
    assert unfinished(config, "digits") == run.path and unfinished(config, "mnist") is None
    other = config.changed({"optim.lr": 0.5})
    assert unfinished(other, "digits") is None
    with (
        run_lock(run.path),
        pytest.raises(ConfigError, match="is being trained by another process"),
        run_lock(run.path),
    ):
        pass
    run.finish()
    assert unfinished(config, "digits") is None


def test_a_run_from_before_head_lr_keeps_its_one_learning_rate(tmp_path: Path) -> None:
    text = "model: {weights: default, frozen_norms: false}\noptim: {lr: 0.002}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = filled(stored_config(tmp_path))
    assert (config.optim.lr, config.optim.head_lr, config.model.frozen_norms) == (0.002, 1.0, False)


def test_a_truncated_line_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(3):
        journal.append({"do": "metrics", "step": step, "time": 1, "values": {"loss": float("nan")}})
    journal.mark(run_id="x")
    with journal.path.open("ab") as file:
        file.write(b'{"do": "metr')
    again = Journal(tmp_path)
    assert [entry["step"] for entry in again.waiting()] == [1, 2] and again.delivered["run_id"] == "x"
    again.append({"do": "status", "status": "FINISHED", "time": 2})
    assert [json.loads(line)["do"] for line in journal.path.read_text().splitlines()] == ["metrics"] * 3 + ["status"]


def killed_in_evaluation(work: Path, name: str, *arguments: str) -> None:
    """Train, and die after all epochs, before the evaluation on the test set."""
    code = (
        "import os, signal, sys, refract.pipeline.evaluation.assess as a\n"
        "a.assess = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import refract.cli; refract.cli.main(sys.argv[1:])"
    )
    process = shared().popen(["train", "c.yaml", "--trainer.run_name", name, *arguments], cwd=work, code=code)
    process.communicate()
    assert process.returncode == -9


@pytest.mark.slow
def test_a_training_that_finished_its_epochs_does_not_train_again_and_costs_the_time_of_all_processes(
    refract: Run, work: Path
) -> None:
    early = ("--trainer.patience", "1", "--optim.lr", "1e-9")
    refract("train", "c.yaml", *early, "--trainer.run_name", "calm")
    killed_in_evaluation(work, "killed", *early)
    last = newest(work / "runs" / "killed" / "checkpoints")
    assert last is not None
    state = torch.load(last, weights_only=True)
    state["callbacks"]["Cost"]["minutes"] = 90.0
    torch.save(state, last)
    assert not re.search(r"^epoch \d", refract("train", "--resume", "runs/killed").stderr, re.M)
    assert history(work, "killed") == history(work, "calm")
    assert 90 < tracked(work, "killed").data.metrics["cost_minutes"] < 92


@pytest.mark.slow
def test_weight_averages_are_resumed_exactly(refract: Run, work: Path, training: Training) -> None:
    swa = ("--trainer.ema", "0", "--trainer.swa_start", "0.3", "--trainer.max_epochs", "6")
    quiet = ("--tracking.enabled", "false")
    refract("train", "c.yaml", *swa, *quiet, "--trainer.run_name", "calm")
    with training("c.yaml", *swa, *quiet, "--trainer.run_name", "killed") as process:
        until(process, "epoch 4/")
        process.kill()
    refract("train", "--resume", "runs/killed")
    calm, killed = (load_file(work / "runs" / name / "bundle" / "weights.safetensors") for name in ("calm", "killed"))
    assert all((killed[key] == weight).all() for key, weight in calm.items())


@pytest.mark.slow
def test_auto_starts_a_new_run_if_the_data_changed(refract: Run, work: Path, training: Training) -> None:
    with training("c.yaml", "--tracking.enabled", "false") as process:
        until(process, "epoch 1/")
        process.kill()
    (broken,) = (work / "runs").iterdir()
    shutil.copytree(broken, work / "runs" / "c-0")
    (work / "runs" / "c-0" / "config.yaml").unlink()
    write_image(work / "images" / "red" / "new.jpg", make_image("red", 77))
    printed = refract(
        "train", "c.yaml", "--tracking.enabled", "false", "--resume", "auto", "--trainer.max_epochs", 4
    ).stderr
    assert "starting a new run: --resume: the data of" in printed
    assert len([path for path in (work / "runs").iterdir() if (path / "bundle").is_dir()]) == 1


def test_a_training_that_is_stopped_in_its_first_validation_keeps_the_epoch(tmp_path: Path) -> None:
    """Without a checkpoint the epoch was once lost. With one, the validation stops at once."""
    import lightning
    from lightning.pytorch.demos.boring_classes import BoringModel

    validated: list[int] = []

    class Asked(lightning.Callback):
        def on_validation_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
            validated.append(trainer.current_epoch)
            stop.signal = signal.SIGTERM

    for times in (1, 2):
        stop, keeper = Stop("soon"), Asked()
        callback = ResumeCheckpoint(tmp_path, seconds=900, stop=stop)
        options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_model_summary": False}
        options |= {"enable_progress_bar": False, "limit_train_batches": 2, "limit_val_batches": 4}
        trainer = lightning.Trainer(callbacks=[callback, keeper], num_sanity_val_steps=0, **options)
        with pytest.raises(Stopped):
            trainer.fit(BoringModel())
        assert [path.name for path in tmp_path.glob("*.ckpt")] == ["resume-00000002.ckpt"]
        assert validated == [0] * (4 if times == 1 else 5)


def test_a_training_that_is_stopped_with_whole_epoch_checkpoints_keeps_its_first_epoch(tmp_path: Path) -> None:
    """With SWA from the first epoch, no checkpoint is written between steps."""
    import lightning
    from lightning.pytorch.demos.boring_classes import BoringModel

    stop = Stop("soon")

    class Asked(lightning.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            stop.signal = signal.SIGTERM

    callback = ResumeCheckpoint(tmp_path, seconds=900, stop=stop, whole_from=0)
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_model_summary": False}
    options |= {"enable_progress_bar": False, "limit_train_batches": 3, "limit_val_batches": 2}
    with pytest.raises(Stopped):
        lightning.Trainer(callbacks=[callback, Asked()], num_sanity_val_steps=0, **options).fit(BoringModel())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["resume-00000003.ckpt"]
