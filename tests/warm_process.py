"""Processes of `refract …` that start fast: forks of a process that has imported PyTorch, Lightning, MLflow and most of Refract.

An import takes each process nine seconds of a core. Tests of the start itself run a new process. `importing_process` is the program that
imports and forks, of which the suite needs one. The processes that run the tests are its forks, too: pytest-xdist starts this module for
each.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TextIO

# As refract sets them before it imports.
QUIET = dict.fromkeys(("NO_ALBUMENTATIONS_UPDATE", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"), "true")


class Process:
    """A running process, with the methods of `subprocess.Popen`."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        raise NotImplementedError

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("refract", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Started(Process):
    """A process that `WarmProcess` started. output: the streams that are read while it runs."""

    def __init__(self, warm: "WarmProcess", pid: int, *output: TextIO) -> None:
        self._warm, self.pid, self.output = warm, pid, output[0]
        self.stdout, self.stderr = output[0], output[-1]

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Read both streams to their end and wait for the process."""
        with ThreadPoolExecutor(2) as pool:
            out, err = (pool.submit(stream.read) for stream in (self.stdout, self.stderr))
            self.wait(timeout)
            return out.result(timeout), err.result(timeout)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._warm.ask(do="poll", pid=self.pid)
        return self.returncode


PROGRAM = Path(__file__).with_name("importing_process.py")

SOCKET = "REFRACT_TESTS_WARM_PROCESS"
"""Environment variable: the path of the importing process's socket."""


class Importer:
    """The importing process, which imports at the first connection. It ends with `close`, or with the process that started it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp())
        path = str(self._folder / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            number = listener.fileno()
            command = [sys.executable, str(PROGRAM), str(number)]
            environment = os.environ | QUIET | {"HOME": str(self._folder)}  # libraries read it when they are imported
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, pass_fds=[number]
            )
        os.environ[SOCKET] = path

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


class WarmProcess:
    """The process that forks commands, from the side of the tests."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ[SOCKET])
        self._stream = self._socket.makefile("rw", encoding="utf-8")
        self._numbers = count()
        self._pipes = Path(tempfile.mkdtemp())
        self._lock = threading.Lock()

    def run(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], seconds: int
    ) -> subprocess.CompletedProcess[str]:
        """Run `refract` with the arguments to its end. SIGALRM ends it after `seconds`."""
        files = [cwd / name for name in (".stdout", ".stderr")]
        pid = self._fork(arguments, cwd, env, files, seconds=seconds)
        code = self.ask(do="wait", pid=pid)
        out, err = (file.read_text("utf-8") for file in files)
        for file in files:
            file.unlink()
        return subprocess.CompletedProcess(["refract", *arguments], code, out, err)

    def start(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], largest_file: int | None = None,
        new_session: bool = False,
    ) -> Started:  # fmt: skip
        """Start `refract` with the arguments and return while it runs. largest_file: the most bytes that it may write to one file, as if
        the disk were full. new_session: as for `popen`."""
        pipe = cwd / f".output-{next(self._numbers)}"
        os.mkfifo(pipe)
        options = {"largest_file": largest_file, "new_session": new_session}
        pid = self._fork(arguments, cwd, env, [pipe, pipe], **options)
        output = pipe.open(encoding="utf-8")
        return Started(self, pid, output)

    def popen(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, code: str = "",
        new_session: bool = False, network: str | None = None,
    ) -> Started:  # fmt: skip
        """Start `refract` with the arguments, or Python code with them in `sys.argv[1:]`. Both streams are pipes. new_session: lead a
        process group, as a terminal's command does. network: the name of a network namespace."""
        pipes = [self._pipes / f"{next(self._numbers)}" for _ in range(2)]
        for pipe in pipes:
            os.mkfifo(pipe)
        options = {"code": code, "new_session": new_session, "network": network}
        pid = self._fork(arguments, cwd, os.environ if env is None else env, pipes, **options)
        streams = [pipe.open(encoding="utf-8") for pipe in pipes]
        for pipe in pipes:
            pipe.unlink()
        return Started(self, pid, *streams)

    def ask(self, **request: Any) -> Any:
        with self._lock:
            self._stream.write(json.dumps(request) + "\n")
            self._stream.flush()
            answer = self._stream.readline()
        if not answer:
            raise RuntimeError(
                "the process that forks commands has ended; its error is above, in the output of pytest -s"
            )
        return json.loads(answer)

    def be(self, code: str) -> int:
        """Run Python code on this process's streams in a fork, and return its exit code."""
        stdin, *files = (Path("/proc", str(os.getpid()), "fd", str(number)) for number in range(3))
        pid = self._fork([], Path.cwd(), os.environ, files, code=code, stdin=str(stdin))
        code_of_end: int = self.ask(do="wait", pid=pid)
        return code_of_end

    def close(self) -> None:
        with suppress(OSError):  # the other process has ended
            self._stream.close()
        self._socket.close()
        shutil.rmtree(self._pipes, ignore_errors=True)

    def _fork(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], files: Sequence[Path], **options: Any
    ) -> int:
        request = {"arguments": [*arguments], "cwd": str(cwd), "env": dict(env), "files": [*map(str, files)]}
        pid: int = self.ask(do="fork", **request, **options)
        return pid


@cache
def shared() -> WarmProcess:
    """The one warm process of this test process."""
    return WarmProcess()


def close_shared() -> None:
    """Close the warm process of this test process, if there is one."""
    if shared.cache_info().currsize:
        shared().close()


if __name__ == "__main__":  # as pytest-xdist starts a process that runs tests
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the fork ends first
    sys.exit(WarmProcess().be(sys.argv[-1]))
