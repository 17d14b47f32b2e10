"""A command with a time limit, its descendants included."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TAIL = 3000
"""Characters of the log that are kept of a command that failed."""


@dataclass(frozen=True)
class Ending:
    """code: None where the limit ended the command; seconds: that it took; tail: the end of its output."""

    code: int | None
    seconds: float
    tail: str


def run_limited(command: Sequence[str], *, log: Path, limit: float, env: Mapping[str, str] | None = None) -> Ending:
    """Run a command, both output streams to `log`, and kill it with all that it started after `limit` seconds."""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command], stdout=output, stderr=subprocess.STDOUT, env=None if env is None else {**env}
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                _kill(process)
    return Ending(code, time.monotonic() - started, log.read_text("utf-8", "replace")[-TAIL:])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its descendants. A stage starts servers in separate sessions, which a signal to the group does not reach."""
    pids = [process.pid, *_descendants(process.pid)]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    pids: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                pids += [child, *_descendants(child)]
    return pids
