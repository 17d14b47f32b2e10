"""Dead loader workers and too little shared memory: training ends with one message, or uses slower transfers with equal batches."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small_data import Training, descendants, until
from warm_process import shared

from refract.augment import Augmenter, Preprocess
from refract.pipeline.data import loader
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.loader import Loader, LoaderError, exit_message, plan_workers
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.inference.batch.local_workers import score_in_processes
from refract.pipeline.stopping import Stop
from tests.pipeline.numbered_images import Numbered, Unreadable, loader_of
from tests.pipeline.small_data import config_of

MANY = "data: {source: images, image_size: 24, batch_size: 4, workers: 2, memory: never}\nmodel: {name: linear}\n"
MANY += (
    "trainer: {max_epochs: 500, checkpoint_seconds: 0}\ntracking: {enabled: false}\nevaluation: {robustness: none}\n"
)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_ends_the_epoch_with_an_error(number: int) -> None:
    loader = loader_of(Numbered(dies=40, signal=number))
    with pytest.raises(LoaderError, match=rf"a loader worker (was killed|crashed) \({signal.Signals(number).name}\)"):
        list(loader)
    workers = loader._iterator._workers
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers), "the other workers ended, too"


def test_an_error_of_a_worker_has_its_message_without_a_traceback() -> None:
    with pytest.raises(DataError) as raised:
        list(Loader(Unreadable(), batch_size=2, workers=1, shared=True))
    assert str(raised.value) == "a.png: was readable\nand is not now"


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_worker_that_dies_between_epochs_or_within_a_message_does_not_block() -> None:
    loader = loader_of(Numbered(side=600), shared=False)  # 4 MiB through a pipe that holds 64 KiB
    assert [int(batch["indices"][0]) for batch in loader] == list(range(0, 64, 4))
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match="reduce --data.workers \\(now 2\\)"):
        list(loader)


class Part(NamedTuple):
    number: int = 0
    start: int = 0
    rows: tuple[()] = ()


class Report(NamedTuple):
    number: int
    blocked: frozenset[int]


@dataclass(frozen=True)
class ReportsBlocked:
    """A job that reports which signals its process blocks."""

    device: str = "cpu"

    def worker(self) -> Callable[[Iterable[Part]], Iterator[Report]]:
        return lambda parts: (
            Report(part.number, frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ()))) for part in parts
        )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_scoring_after_a_training_leaves_signals_to_the_parent_process() -> None:
    """The loader's fork server blocks none, and the worker processes of the scoring come from it too."""
    iterator = iter(loader_of(Numbered()))
    next(iterator)
    done = list(score_in_processes([Part()], ReportsBlocked(), ["cpu"], Stop("")))
    assert done[-1] is not None and {signal.SIGINT, signal.SIGTERM} <= done[-1].blocked


UNFINISHED = """
import numpy as np
from tests.pipeline.numbered_images import Numbered, loader_of

if __name__ == "__main__":
    batches = iter(loader_of(Numbered()))
    print(*(int(next(batches)["indices"][0]) for worker in range(2)))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_process_that_exits_within_an_epoch_ends_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "unfinished.py"
    script.write_text(UNFINISHED)
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests"), str(root / "tests" / "pipeline"))),
    }
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=220)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 4\n", "")


@pytest.mark.slow
def test_batches_are_equal_with_and_without_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = prepare_data(config_of(folder))

    def batches(free: int | None) -> list[dict[str, torch.Tensor]]:
        monkeypatch.setattr("refract.pipeline.data.datamodule.shared_memory_free", lambda: free)
        data = ImageDataModule(
            manifest, augmenter=Augmenter("imagenet", seed=11, size=16), preprocess=Preprocess(16, 16), batch_size=8, workers=2
        )  # fmt: skip
        assert (data.workers, data.shared) == ((0, True) if free == 0 else (2, free is None))
        return list(data.train_dataloader())

    expected = batches(None)
    for free in (200_000, 0):
        for mine, other in zip(batches(free), expected, strict=True):
            assert (
                all(torch.equal(mine[name], tensor) for name, tensor in other.items()) and mine.keys() == other.keys()
            )
            assert mine["images"].dtype == torch.uint8 and mine["images"].is_contiguous()


def test_the_shared_memory_check_logs_its_changes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    mib = 1 << 20
    assert plan_workers(4, 9 * mib, 24 << 30) == plan_workers(4, 9 * mib, None) == (4, True) and not caplog.text
    assert plan_workers(0, 9 * mib, 0) == (0, True) and not caplog.text
    assert plan_workers(4, 9 * mib, 64 * mib) == (4, False)
    assert "64 MiB free, 4 workers need 90 MiB; batches use slower pipes" in caplog.text
    assert "docker run --shm-size 1g" in caplog.text
    assert plan_workers(4, 9 * mib, 4096) == (0, True) and "4 KiB free; the training process loads" in caplog.text


def test_the_message_of_each_exit_code_names_a_remedy() -> None:
    assert "SIGBUS, probably because /dev/shm is full" in exit_message(
        -signal.SIGBUS, 2
    ) and "--shm-size 2g" in exit_message(-7, 2)
    assert "ulimit -n" in exit_message(loader.NOT_SENT, 2) and "exit code 3" in exit_message(3, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_while_the_workers_start_ends_with_a_checkpoint(
    number: int, code: int, folder: Path, tmp_path: Path, training: Training
) -> None:
    (tmp_path / "c.yaml").write_text(MANY)
    with training("c.yaml", "--trainer.run_name", "r", new_session=True) as process:
        until(process, "run runs/r on")
        started = False
        while not started:
            assert process.poll() is None
            with suppress(OSError):  # a process has ended meanwhile
                commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)]
                started = any(b"forkserver" in command for command in commands)
        os.killpg(process.pid, number)
        output = process.output.read()
        assert (process.wait(60), "Traceback" in output) == (code, False), output
    assert list((tmp_path / "runs" / "r" / "checkpoints").glob("resume-*.ckpt"))


@pytest.mark.slow
def test_a_training_whose_worker_is_killed_ends_and_can_be_resumed(
    folder: Path, tmp_path: Path, training: Training
) -> None:
    (tmp_path / "c.yaml").write_text(MANY)
    with training("c.yaml", "--trainer.run_name", "r") as process:
        until(process, "epoch 2/")
        workers = [
            pid for pid in descendants(process.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(workers[-1], signal.SIGKILL)
        process.send_signal(signal.SIGTERM)  # which waits for a step that may never come
        output = process.output.read()
        code = process.wait(60)
    if code != 75:  # the step had its batch, and its checkpoint was written
        assert code == 1 and "Traceback" not in output
        assert re.search(
            r"^refract train: a loader worker was killed .*`refract train --resume runs/r` resumes", output, re.M
        )
    assert list((tmp_path / "runs" / "r" / "checkpoints").glob("resume-*.ckpt"))


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0
    or shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs to mount a small /dev/shm, as root",
)
def test_full_shared_memory_within_an_epoch_only_slows_training() -> None:
    """The free space was enough at the check, and another program has used it since."""
    root = Path(__file__).parents[2]
    code = (
        "import ctypes, subprocess, sys\n"
        f"sys.path[:0] = ['{root}', '{root}/tests', '{root}/tests/pipeline']\n"
        "assert ctypes.CDLL(None).unshare(0x00020000) == 0, 'CLONE_NEWNS: mounts that other processes do not see'\n"
        "subprocess.run(['mount', '--make-rprivate', '/'], check=True)\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', '/dev/shm'], check=True)\n"
        "from tests.pipeline.numbered_images import Numbered, loader_of\n"
        "batches = list(loader_of(Numbered(side=300)))\n"
        "assert [int(b['images'][0, 0, 0, 0]) for b in batches] == list(range(0, 64, 4))\n"
        "print('all', len(batches), flush=True)\n"
    )
    process = shared().popen([], cwd=root, code=code)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "all 16" in printed and "Traceback" not in errors, errors
