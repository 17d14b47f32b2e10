"""The tests marked `gpu`, on the device."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.plan import Clock, Options
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]
PROCESSES = 4
"""That share the GPU: most of a test's time is the processor's."""

QUICK = "not test_gpu_training or on_the_device or no_step"
"""The tests of the quick form: without whole training runs, which tests/pipeline repeats on the processor."""


def run(options: Options, record: Record, clock: Clock) -> None:
    """Measure the stage `correctness`."""
    log = options.work / "pytest.log"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "--color=no", "-p", "no:cacheprovider"]
    if options.quick:
        command += ["-k", QUICK]
    if options.device == "cuda" and find_spec("xdist"):
        command += ["-n", str(PROCESSES), "--dist", "load"]
    env = {**os.environ, "REFRACT_TEST_DEVICE": options.device, "PYTHONPATH": _path()}
    os.chdir(ROOT)
    done = run_limited(command, log=log, limit=max(1.0, clock.left - 2), env=env)
    text = log.read_text("utf-8", "replace")
    for name, outcomes in (("passed", ("PASSED",)), ("failed", ("FAILED", "ERROR")), ("skipped", ("SKIPPED",))):
        record.measure(f"tests {name}", len(_tests(text, outcomes)))
    for name in _tests(text, ("FAILED", "ERROR")):
        record.note(f"failed: {name}")
    for line in re.findall(r"^(?:FAILED|ERROR|SKIPPED) .+", text, re.M):
        record.note(line[:300])
    if done.code not in (0, 1):
        print(done.tail)
        how = "did not end within its limit" if done.code is None else f"ended with exit code {done.code}"
        raise SystemExit(f"pytest {how}")
    if done.code == 1:
        print(done.tail)


def _tests(text: str, outcomes: tuple[str, ...]) -> list[str]:
    """The tests with one of the outcomes, by the lines of `pytest -v`, with and without several processes."""
    outcome = "|".join(outcomes)
    alone = re.findall(rf"^(tests/\S+::.+?) (?:{outcome})\b", text, re.M)
    shared = re.findall(rf"^\[gw\d+\] \[ *\d+%\] (?:{outcome}) (tests/\S+::.+?) *$", text, re.M)
    return sorted({*alone, *shared})


def _path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
