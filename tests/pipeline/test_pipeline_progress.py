"""Long work shows its progress: a bar on a terminal, else a line every ten seconds."""

import io
import logging
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refract import output, progress
from refract.progress import Progress, silence_reported, tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_appears_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "refract.progress")
    seconds = iter([0.0, *(4.0 * k for k in range(1, 8))])
    with Progress("checking samples", 2000, unit="samples", clock=lambda: next(seconds)) as shown:
        for _ in range(7):
            shown.update(100)
    assert caplog.messages == [
        "checking samples: 300 of 2,000 samples (15%), 25 a second, 1 min 08 s left",
        "checking samples: 600 of 2,000 samples (30%), 25 a second, 56 s left",
    ]


def test_a_resumed_count_does_not_change_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "refract.progress")
    seconds = iter([0.0, 10.0])
    with Progress("scoring", 1000, unit="rows", count=900, clock=lambda: next(seconds)) as shown:
        shown.update(10)
    assert caplog.messages == ["scoring: 910 of 1,000 rows (91%), 1 a second, 1 min 30 s left"]


def test_a_terminal_shows_a_bar_without_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_S", 0.0)
    monkeypatch.setenv("NO_COLOR", "1")
    assert list(tracked(range(3), "evaluating", 3, unit="samples")) == [0, 1, 2]
    bar = terminal.getvalue()
    assert "evaluating" in bar and "samples" in bar and not re.search(r"\x1b\[[\d;]*m", bar)
    monkeypatch.setenv(output.VARIABLE, "quiet")
    list(tracked(range(3), "evaluating", 3))
    assert terminal.getvalue() == bar, "nothing with --quiet"


def test_a_silent_command_reports_that_it_is_in_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BAR_S", 0.01)
    monkeypatch.setattr(progress, "LINE_S", 0.2)
    with silence_reported("doctor"):
        time.sleep(1.0)
    assert "refract doctor: in progress, " in capsys.readouterr().err
    for variable, value in (("LOCAL_RANK", "1"), (output.VARIABLE, "quiet")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with silence_reported("doctor"):
                time.sleep(0.5)
        assert capsys.readouterr().err == "", variable


def test_the_stages_of_a_start_are_lines_or_on_a_terminal_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BAR_S", 0.01)
    monkeypatch.setattr(progress, "LINE_S", 0.2)

    def start() -> None:
        progress.stage("loading shapes")
        time.sleep(0.4)
        progress.stage("timing onnx", 1, 3)
        time.sleep(0.4)
        progress.finish()

    with silence_reported("serve"):
        start()
        lines = capsys.readouterr().err
        time.sleep(0.4)
    assert re.search(r"^refract serve: loading shapes, \d s so far$", lines, re.MULTILINE)
    assert re.search(r"^refract serve: timing onnx \(2 of 3\), \d s so far$", lines, re.MULTILINE)
    assert capsys.readouterr().err == "", "a server that is ready may be silent"

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with silence_reported("serve"):
        start()
    bar = terminal.getvalue()
    assert "\rloading shapes, 00:0" in bar and re.search(r"timing onnx: \S+ +1/3, 00:0\d", bar)
    assert bar.rpartition("\r")[2] == "", "the bar is erased"
    monkeypatch.setenv(output.VARIABLE, "quiet")
    with silence_reported("serve"):
        start()
    assert terminal.getvalue() == bar, "nothing with --quiet"


def test_a_terminal_without_columns_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of `script` in a job: a bar of no width would show nothing."""
    monkeypatch.setattr(progress, "BAR_S", 0.01)
    monkeypatch.setattr(progress, "LINE_S", 0.2)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with silence_reported("serve"), progress.staged("loading shapes"):
            time.sleep(0.5)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "refract serve: loading shapes, " in shown


def test_a_stage_is_named_until_its_end_and_gives_way_to_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BAR_S", 0.01)
    monkeypatch.setattr(progress, "LINE_S", 0.2)
    with silence_reported("train"):
        with progress.staged("training"), progress.staged("writing the report"):
            time.sleep(0.4)
        time.sleep(0.4)
    lines = capsys.readouterr().err
    assert "refract train: writing the report, " in lines and "refract train: in progress, " in lines

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with silence_reported("train"), progress.staged("training"):
        with Progress("epoch 1/2", 10):
            before = terminal.getvalue()
            time.sleep(0.2)
            assert "training" not in terminal.getvalue().removeprefix(before), "one bar at a time"
        time.sleep(0.2)
    assert "\rtraining, 00:0" in terminal.getvalue()
    assert terminal.getvalue().rpartition("\r")[2] == "", "the bar is erased"


def test_a_failed_training_closes_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the error would stand on the bar's line, and logging would still write around the bar."""
    from refract.pipeline.training.callbacks.progress import StepProgress

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_S", 0.0)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(terminal)])
    handlers = logging.getLogger().handlers
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0))))
    trainer: Any = SimpleNamespace(fit_loop=loop, current_epoch=0, max_epochs=2, num_training_batches=3)
    module: Any = None
    steps = StepProgress()
    steps.on_train_epoch_start(trainer, module)
    steps.on_train_batch_end()
    assert "epoch 1/2" in terminal.getvalue() and logging.getLogger().handlers is not handlers
    steps.on_exception(trainer, module, FloatingPointError())
    assert logging.getLogger().handlers is handlers
    assert terminal.getvalue().rpartition("\r")[2] == "", "the bar is erased"


def test_slow_imports_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setattr(progress, "BAR_S", 0.05)
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with silence_reported("train"):
        __import__("slow_to_import")
    assert capsys.readouterr().err == "refract train: loading libraries\n"


def test_each_epoch_counts_its_batches_from_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from refract.pipeline.training.callbacks import progress as callbacks

    shown = []

    class Recorded(Progress):
        def __init__(self, title: str, total: int | None = None, *, count: int = 0, **options: Any) -> None:
            super().__init__(title, total, count=count, **options)
            self.counts = [title, total, count]
            shown.append(self.counts)

        def update(self, count: int = 1) -> None:
            self.counts[2] += count

    monkeypatch.setattr(callbacks, "Progress", Recorded)
    callback = callbacks.StepProgress()
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, limit_train_batches=3, limit_val_batches=2, num_sanity_val_steps=0,
        callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert shown == [["epoch 1/2", 3, 3], ["validating", 2, 2], ["epoch 2/2", 3, 3], ["validating", 2, 2]]
    callback.on_train_batch_start(trainer, trainer.lightning_module, None, 2)
    callback.on_train_batch_end()
    assert shown[-1][1:] == [3, 3], "a resumed epoch counts the batches before"
