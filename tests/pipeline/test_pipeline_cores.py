"""Work in threads: results in order, a bounded number ahead, errors, and work that nobody wants any more. The CPU quota of a container."""

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refract.cores import AHEAD, TASK, cores, limit_threads, mapped, quota


@given(st.integers(0, 300), st.integers(1, 5), st.booleans())
def test_results_come_in_order_for_any_number_of_items_and_threads(count: int, threads: int, sized: bool) -> None:
    items = range(count) if sized else iter(range(count))
    assert list(mapped(lambda item: item * item, items, threads=threads)) == [item * item for item in range(count)]


def test_few_items_are_taken_ahead_of_the_results() -> None:
    taken: list[int] = []

    def source():
        for item in range(10_000):
            taken.append(item)
            yield item

    results = mapped(lambda item: item, source(), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= (AHEAD * 2 + 1) * TASK
    results.close()


def test_few_large_items_are_divided_among_the_threads() -> None:
    together = threading.Barrier(2, timeout=20)  # broken if one thread gets both items
    assert list(mapped(lambda item: (together.wait(), item)[1], [1, 2], threads=2)) == [1, 2]


def test_an_error_is_raised_in_place_of_its_result_and_no_further_work_starts() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 40:
            raise ValueError("item 40")
        time.sleep(0)
        done.append(item)
        return item

    with pytest.raises(ValueError, match="item 40"):
        list(mapped(work, range(100_000), threads=2))
    assert len(done) <= (AHEAD * 2 + 4) * TASK


def test_the_memory_does_not_grow_with_the_number_of_items() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        total = sum(mapped(lambda item: 1, range(count), threads=2))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == count
        return size

    peak(100)
    assert peak(50_000) < 2 * peak(5_000)


@pytest.mark.parametrize(
    ("text", "wanted"), [("50000 100000", 1), ("250000 100000", 3), ("max 100000", None), ("", None), (None, None)]
)
def test_the_cpu_quota_of_a_container_is_read(text: str | None, wanted: int | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert quota(tmp_path, tmp_path / "none") == wanted and cores() >= 1


def test_the_smallest_quota_of_a_control_group_and_its_parents_counts(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("12:cpu:/other\n0::/batch.slice/job.service\n")
    for folder, allowed in (("", "max"), ("batch.slice", "150000"), ("batch.slice/job.service", "400000")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(f"{allowed} 100000")
    assert quota(tmp_path, tmp_path / "cgroup") == 2


@pytest.mark.parametrize("name", ["/docker/4f0c", "/"])
def test_the_quota_of_an_older_host_is_read(name: str, tmp_path: Path) -> None:
    """cgroup v1, from the host and in a container, which sees its group as the root."""
    (tmp_path / "cgroup").write_text(f"4:memory:/other\n3:cpu,cpuacct:{name}\n0::/\n")
    group = tmp_path / "cpu" / name.lstrip("/")
    group.mkdir(parents=True)
    (group / "cpu.cfs_period_us").write_text("100000\n")
    for allowed, wanted in (("-1", None), ("150000", 2), ("300000", 3)):
        (group / "cpu.cfs_quota_us").write_text(f"{allowed}\n")
        assert quota(tmp_path, tmp_path / "cgroup") == wanted


@pytest.fixture
def one_core() -> Iterator[Path]:
    """A control group of the kernel with a quota of one core."""
    for root, files in (
        ("cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}), ("", {"cpu.max": "100000 100000"})
    ):  # fmt: skip
        group = Path("/sys/fs/cgroup") / root / f"refract-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in files.items():
                (group / name).write_text(value)
            yield group
            return
        except OSError:  # the other version, or a group without this controller
            continue
        finally:
            while (group / "cgroup.procs").read_text():  # a process that has ended may still be listed
                time.sleep(0.01)
            group.rmdir()
    pytest.skip("this process may not create control groups with a CPU quota")


def in_group(group: Path, code: str, environment: Mapping[str, str] = MappingProxyType({})) -> str:
    """Run Python code in the control group and return its output."""
    joined = f"open('{group}/cgroup.procs', 'w').write('0')\n{code}"
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | environment
    done = subprocess.run([sys.executable, "-c", joined], capture_output=True, text=True, env=environ, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_a_process_with_a_quota_computes_with_as_many_threads(one_core: Path) -> None:
    threads = "import torch; print(torch.get_num_threads())"
    start = "import refract.cli; refract.cli.prepare_to_compute()"
    assert in_group(one_core, f"{start}; {threads}") == "1"
    assert in_group(one_core, f"import torch; {start}; {threads}") == "1", "a program has imported PyTorch before"
    assert in_group(one_core, f"{start}; {threads}", {"OMP_NUM_THREADS": "2"}) == "2", "the user decides"


@pytest.mark.parametrize(("imported", "wanted"), [("os", "4 2"), ("torch", "None 2")])
def test_ranks_share_the_quota(imported: str, wanted: str) -> None:
    """Lightning divides the cores by the ranks only without OMP_NUM_THREADS. A program that has PyTorch keeps its environment."""
    code = (
        f"import os, {imported}, refract.cores as cores\n"
        "cores.quota = cores.cores = lambda: 4\n"
        "cores.limit_threads(); print(os.environ.get('OMP_NUM_THREADS'), end=' ')\n"
        "cores.limit_threads(2); print(os.environ['OMP_NUM_THREADS'])"
    )
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.strip() == wanted


def test_without_a_quota_the_threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("refract.cores.quota", lambda: None)
    limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ
