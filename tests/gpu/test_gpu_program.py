"""`python -m benchmarks.gpu` runs from end to end without a GPU, and survives stages that fail or hang."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from warm_process import shared

from benchmarks.gpu.plan import STAGES, Measure
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.record import Record, read_record
from benchmarks.gpu.table import lines, rows
from benchmarks.gpu.wheels import PACKAGES, ROOT, entries

ONLY_ON_A_GPU = ("compil", "model FLOPs", "fp16", "cuda-graphs")
LEFT_OUT = ("vit_b_16", "kornia")
"""Options of the quick form."""

QUICK = ["--device", "cpu", "--quick"]
OF_THE_PROGRAM = ["correctness", "augment"]
"""Stages that the program starts as it does on a GPU. The others import more, and run in processes that have imported it."""


def assert_measured(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Assert that each stage measured all that a CPU and the quick form allow."""
    missing = [
        f"{name}: {measure.name} {why}"
        for name, measure, value, why in rows(stages, judged=False)
        if name in stages and value is None
    ]
    assert [line for line in missing if not any(part in line for part in (*ONLY_ON_A_GPU, *LEFT_OUT))] == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # its stages are processes that import PyTorch while other tests run
def test_the_quick_form_runs_stages_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = [*QUICK, "--seconds", "800", "--stages", *OF_THE_PROGRAM, "--json", str(out)]
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads(out.read_text())["stages"]
    assert {name: stage["code"] for name, stage in stages.items()} == dict.fromkeys(OF_THE_PROGRAM, 0)
    assert_measured(stages)
    assert stages["correctness"]["values"]["tests passed"] > 50


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", [name for name in STAGES if name not in OF_THE_PROGRAM])
def test_a_stage_measures_its_numbers_on_the_cpu(name: str, tmp_path: Path) -> None:
    out, limit = tmp_path / f"{name}.json", 300  # a stage that hangs then prints where
    code = f"import signal, sys; signal.alarm({limit + 60}); from benchmarks.gpu.__main__ import main; sys.exit(main(sys.argv[1:]))"
    options = [*QUICK, "--seconds", str(limit), "--stage", name, "--json", str(out)]
    process = shared().popen(options, cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}, code=code)
    output = process.communicate(timeout=limit + 120)
    assert process.returncode == 0, output
    assert_measured({name: read_record(out)})


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600'], start_new_session=True); print(p.pid, flush=True); p.wait()"
    ending = run_limited([sys.executable, "-c", code], log=tmp_path / "log", limit=3)
    assert ending.code is None
    stat, end = Path(f"/proc/{int(ending.tail)}/stat"), time.monotonic() + 20
    while stat.exists() and stat.read_text().split()[2] != "Z":  # a zombie where nobody asks for orphans
        assert time.monotonic() < end, "the child outlives its parent"


def test_a_command_that_fails_leaves_its_code_and_the_end_of_its_output(tmp_path: Path) -> None:
    ending = run_limited([sys.executable, "-c", "raise SystemExit('no such card')"], log=tmp_path / "log", limit=60)
    assert (ending.code, ending.tail) == (1, "no such card\n")


def test_the_table_says_which_goals_are_reached_and_why_numbers_are_missing(tmp_path: Path) -> None:
    record = Record(tmp_path / "augment.json", "augment")
    record.measure("Refract / kornia", 21.0)
    record.measure("Refract / copy bandwidth", 0.1)
    record.skip("torchvision v2", "it is not installed")
    stage = {**read_record(tmp_path / "augment.json"), "ending": "stopped at its limit of 20 s"}
    text = {line[13:65].strip(): line for line in lines({"augment": stage}, judged=True)}
    assert "21" in text["Refract / kornia"] and text["Refract / kornia"].endswith("goal ≥ 20    reached")
    assert text["Refract / copy bandwidth"].endswith("MISSED")
    assert text["torchvision v2"].endswith("not measured (it is not installed)")
    assert text["kornia"].endswith("not measured (stopped at its limit of 20 s)")
    assert text["tests passed"].endswith("not measured (the stage was not asked for)")
    assert "MISSED" not in "\n".join(lines({"augment": stage}, judged=False))


def test_a_value_that_is_not_in_the_plan_is_rejected(tmp_path: Path) -> None:
    record = Record(tmp_path / "augment.json", "augment")
    with pytest.raises(KeyError, match="'speed' is not in the plan"):
        record.measure("speed", 1.0)
    with pytest.raises(ValueError, match="not finite"):
        record.measure("kornia", float("inf"))


def test_goals_are_bounds_from_above_or_below() -> None:
    assert Measure("a", goal=0.5).met(0.5) and not Measure("a", goal=0.5).met(0.49)
    assert Measure("a", goal=1.1, at_most=True).met(1.1) and not Measure("a", goal=1.1, at_most=True).met(1.2)
    assert Measure("a").met(3) is None


def test_every_package_for_a_gpu_machine_is_locked_with_hashes() -> None:
    requirements = list(entries((ROOT / "requirements.lock").read_text(), PACKAGES))
    assert len(requirements) == len(PACKAGES) and all("--hash=sha256:" in entry for entry in requirements)
    with pytest.raises(KeyError, match="no-such-package"):
        list(entries("kornia==1 \\\n    --hash=sha256:0\n", ["no-such-package"]))
