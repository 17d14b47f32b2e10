"""Freed memory is reused, in each kind of process that computes. Page faults are counted, which a busy machine does not change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm_process import shared

from refract.models.allocator import available_memory, configured_by_user

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"),
    reason="the settings are glibc's",
)
ROOT = Path(__file__).parents[2]
FEW, ROUNDS = 2_000, 3  # a page has 4 KiB at least: a round of 96 MiB faults 24,576 times where nothing is kept

PROBE = f"""
import json, resource, sys
def faults(block):
    "Page faults of allocating and freeing 96 MiB in blocks of so many MiB, {ROUNDS} times, a round, after the first."
    for round in range({ROUNDS} + 1):
        if round == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(block << 20) for _ in range(96 // block)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // {ROUNDS}
def attempt(work):
    try: work()
    except (SystemExit, Exception) as error: print(repr(error), file=sys.stderr)
"""


def environment() -> dict[str, str]:
    unset = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_WAIT_POLICY", "GOMP_")
    return {key: value for key, value in os.environ.items() if not key.startswith(unset)}


def run(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROBE + code]
    return subprocess.run(command, cwd=ROOT, env=environment() | more, capture_output=True, text=True, check=True)


def faults_after(code: str, block: int = 48, **more: str) -> int:
    return int(run(f"{code}\nprint(faults({block}))", **more).stdout.splitlines()[-1])


KEEP = "from refract.models.allocator import keep_freed_memory; keep_freed_memory()"


def test_large_blocks_are_faulted_in_once() -> None:
    assert faults_after("") > 10 * FEW
    assert faults_after(KEEP) < FEW


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}],
    ids=str,
)
def test_a_users_setting_wins(variables: dict[str, str]) -> None:
    assert faults_after(KEEP, **variables) > 10 * FEW


def test_freed_memory_can_be_released() -> None:
    code = (
        f"{KEEP}\nblock = bytearray(256 << 20); del block\nfrom refract.models.allocator import release_freed_memory\n"
    )
    resident = "int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20"
    done = run(f"{code}print({resident}); release_freed_memory(); print({resident})")
    peak, released = map(int, done.stdout.split())
    assert peak > 256 > 128 > released


def test_a_bound_is_kept() -> None:
    bounded = "from refract.models.allocator import keep_freed_memory; keep_freed_memory(at_most=128 << 20)"
    assert faults_after(bounded, block=16) < FEW
    freed = "blocks = [bytearray(16 << 20) for _ in range(32)]; del blocks"
    resident = "int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20"
    assert int(run(f"{bounded}\n{freed}\nprint({resident})").stdout) < 256


def test_commands_keep_it() -> None:
    assert faults_after("import refract.cli\nrefract.cli.main(['ops'])") < FEW


def faults_of_a_fork(code: str, block: int) -> int:
    """The same in a process forked from one that has imported what it needs. Work may fail, as there is no data."""
    process = shared().popen([], cwd=ROOT, env=environment(), code=f"{PROBE}\n{code}\nprint(faults({block}))")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return int(out.splitlines()[-1])


def test_without_it_they_fault() -> None:
    assert faults_of_a_fork("", 48) > 10 * FEW and faults_of_a_fork("", 16) > 4 * FEW


WORK = {
    "scoring": """
from pathlib import Path
from refract.pipeline.inference.batch.worker import Job, Scorer
attempt(lambda: Scorer(Job(Path("none"), "", Path("none"), "", {}, "", False, False, 1, "none", "cpu", 1)))
""",
    "train()": """
from refract.pipeline.config.config import load_config
from refract.pipeline.training.run import train
attempt(lambda: train(load_config("configs/digits.yaml", ["--data.source", "none"])))
""",
    "a step of the flow": """
import runpy
sys.argv = ["flow.py", "--help"]
attempt(lambda: runpy.run_path("pipeline/retraining/flow.py", run_name="__main__"))
""",
    "loading": """
from refract.pipeline.data.datasets import init_worker
attempt(lambda: init_worker(0))
""",
    "server": """
import refract.serve.cli.command
attempt(lambda: refract.serve.cli.command.main(["none"]))
""",
}


@pytest.mark.parametrize(
    ("work", "block"), [("scoring", 48), ("train()", 48), ("a step of the flow", 48), ("loading", 16), ("server", 16)]
)
def test_processes_that_compute_keep_it(work: str, block: int) -> None:
    assert faults_of_a_fork(WORK[work], block) < FEW


def test_what_counts_as_configured() -> None:
    assert configured_by_user({"MALLOC_ARENA_MAX": "2"})
    assert configured_by_user({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"})
    assert not configured_by_user({"MALLOC_PERTURB_": "7", "LD_PRELOAD": "libfaketime.so"})
    assert not configured_by_user({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"})


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/\n", "sys/fs/cgroup/memory.max"),  # version 2, in a container
        ("0::/system.slice/a.service\n", "sys/fs/cgroup/system.slice/memory.max"),  # of the parent
        ("9:cpu,memory:/docker/1\n", "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes"),
        ("9:memory:/docker/1\n", "sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1, in a container
    ],
)
def test_available_memory_is_bounded_by_control_groups(tmp_path: Path, groups: str, file: str) -> None:
    meminfo = "MemTotal: 9 kB\nMemAvailable:    4096 kB\n"
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": groups}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == 4096 << 10
    (tmp_path / file).parent.mkdir(parents=True)
    for text, expected in {"max": 4096 << 10, "9223372036854771712": 4096 << 10, "1048576": 1 << 20}.items():
        (tmp_path / file).write_text(f"{text}\n")
        assert available_memory(tmp_path) == expected
