"""`refract …` in processes of its own that need not import PyTorch, Lightning and MLflow first, which takes each of them nine seconds of a
core: they are forked from one that did, and are otherwise as new. Tests of starting itself, and of kills, begin a process in the plain way.

Run as a program it is that one: it reads a request a line, JSON, and answers with the command's exit code.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

IMPORTED = (
    "torch", "torchvision", "timm", "lightning.pytorch", "torchmetrics", "mlflow", "mlflow.tracking", "sklearn.metrics", "pandas",
    "pyarrow.parquet", "matplotlib.figure", "jsonargparse", "cv2", "jinja2", "scipy.stats", "tqdm", "httpx",
)  # fmt: skip

# As refract sets them before it imports.
QUIET = dict.fromkeys(("NO_ALBUMENTATIONS_UPDATE", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"), "true")


class WarmProcess:
    """The process that forks, from the side of the tests."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | QUIET
        )

    def run(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], seconds: int
    ) -> subprocess.CompletedProcess[str]:
        """`refract` with the arguments, to its end; SIGALRM ends it after so many seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        files = [cwd / name for name in (".stdout", ".stderr")]
        out, err = (file.read_text("utf-8") for file in files)
        for file in files:
            file.unlink()
        return subprocess.CompletedProcess(["refract", *arguments], code, out, err)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _forks() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _is_refract(**json.loads(line))
        else:
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


def _is_refract(arguments: list[str], cwd: str, env: dict[str, str], seconds: int) -> None:
    """Be `python -m refract …`. SystemExit, with its code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((0, os.devnull), (1, ".stdout"), (2, ".stderr")):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    signal.alarm(seconds)
    sys.argv, sys.path[0] = ["refract", *arguments], cwd
    runpy.run_module("refract", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _forks()
