"""Processes of `refract …` that start fast: their parent has imported PyTorch, Lightning, MLflow and most of Refract.

An import takes each process nine seconds of a core. Tests of the start itself run a new process.
As a program, this module is the importing process, of which the suite needs one. It forks a process for each connection to its socket.
That process reads one JSON request per line, forks commands, and answers each request with a line. At the end of the connection it kills
the commands that run on. The processes that run the tests are such forks, too: pytest-xdist starts this program with `-c` for each.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import charts

IMPORTED = (
    "torch", "torchvision", "timm", "refract.models.training.lightning_imports", "mlflow", "mlflow.tracking", "sklearn.metrics", "pandas",
    "mlflow.store.tracking.sqlalchemy_workspace_store", "sqlalchemy.dialects.sqlite", "alembic.command",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",  # with the line above, 3 s of each tracked run
    "mlflow.pyfunc", "refract.pipeline.tracking.mlflow_model",
    "pyarrow.parquet", "pyarrow.pandas_compat", "matplotlib.figure", "matplotlib.backends.backend_agg", "jsonargparse", "cv2", "jinja2",
    "scipy.stats", "sklearn.datasets", "tqdm", "httpx",
    "refract.augment", "refract.models.bundle.bundle", "refract.pipeline.training.run", "refract.pipeline.training.build",
    "refract.pipeline.training.fit",
    "refract.models.training.lightning_module", "refract.pipeline.evaluation.assess", "refract.pipeline.data.datamodule",
    "refract.pipeline.doctor.run", "refract.pipeline.drift.measure", "refract.pipeline.preview",
    "refract.serve.http.app", "refract.serve.http.transport.server", "refract.serve.runtime.selection",
)  # fmt: skip

CLONE_NEWNET = 0x40000000  # from <linux/sched.h>

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


class ForkedRank(Process):
    """A rank that torchrun's launcher starts, as a fork of the launcher. The arguments are those of `subprocess.Popen`."""

    def __init__(
        self,
        args: Sequence[str],
        env: dict[str, str],
        stdout: TextIO | None,
        stderr: TextIO | None,
        start_new_session: bool,
    ) -> None:
        assert [*args[:4]] == [sys.executable, "-u", "-m", "refract"] and start_new_session, args
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for number, file in ((1, stdout), (2, stderr)):
                    if file is not None:
                        os.dup2(file.fileno(), number)
                _drop_descriptors()
                _be_refract([*args[4:]], env)
            finally:
                os._exit(1)  # `_be_refract` has ended the process, if nothing failed before

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _drop_descriptors() -> None:
    """Replace the descriptors above 2 by /dev/null, as a new process has none. Closing them would free numbers that objects still own."""
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 — numbers, not paths
        number = int(name)
        if number > 2 and number != null:
            with suppress(OSError):  # that of the listing
                os.fstat(number)
                os.dup2(null, number)


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
            command = [sys.executable, __file__, str(number)]
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


def _imports(listener: socket.socket) -> None:
    """Fork a process for each connection until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the test processes end first, and close what they started
    imported = False
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not imported:
            for name in IMPORTED:
                importlib.import_module(name)
            importlib.import_module("refract.pipeline.config.config").config_from_dict({})  # makes the parser: a second
            charts.skip_drawing()
            gc.freeze()
            imported = True
        if os.fork() == 0:
            listener.close()
            _forks(connection)
            os._exit(0)
        connection.close()
    with suppress(ChildProcessError):
        while True:
            os.wait()  # adds their processor time to this process's


def _forks(connection: socket.socket) -> None:
    """Fork commands until the connection ends, then kill those that run on."""
    requests, answers = connection.makefile("r", encoding="utf-8"), connection.makefile("w", encoding="utf-8")
    running: set[int] = set()
    try:
        for line in requests:
            request = json.loads(line)
            kind = request.pop("do")
            answer: int | None
            if kind == "fork":
                answer = os.fork()
                if answer == 0:
                    try:
                        for stream in (requests, answers, connection):
                            stream.close()
                        _is_refract(**request)
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(1)
                running.add(answer)
            else:
                if kind == "wait" and not _ends_before(request["pid"], connection):
                    return
                pid, status = os.waitpid(request["pid"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
                running.discard(pid)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except OSError:  # the test process has died: the connection is broken
        pass
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _ends_before(pid: int, connection: socket.socket) -> bool:
    """Wait for a process. Returns whether it ended before the connection."""
    ended = os.pidfd_open(pid)
    try:
        return ended in select.select([ended, connection.fileno()], [], [])[0]
    finally:
        os.close(ended)


def _is_refract(
    arguments: list[str], cwd: str, env: dict[str, str], files: list[str], seconds: int = 0, largest_file: int | None = None,
    code: str = "", new_session: bool = False, network: str | None = None, stdin: str = os.devnull,
) -> None:  # fmt: skip
    """Be `python -m refract …`, or `python -c code …`, to its end."""
    if new_session:
        os.setsid()
    written = os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if stdin == os.devnull else os.O_APPEND)
    for number, name in enumerate((stdin, *files)):
        try:
            file = os.open(name, os.O_RDONLY if number == 0 else written)
        except OSError:
            if stdin == os.devnull or number != 2:
                raise
            file = os.open(os.devnull, os.O_WRONLY)  # the terminal's stderr is a socket, which /proc cannot open
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    if network is not None:
        _enter(network)
    signal.alarm(seconds)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if arguments[:1] == ["torchrun"]:
        starts_ranks = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
        module: Any = importlib.import_module(starts_ranks)
        module.Popen = ForkedRank
    _be_refract(arguments, env, code)


def _enter(network: str) -> None:
    """Enter a network namespace."""
    with Path("/run/netns", network).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns: {network}")


def _be_refract(arguments: list[str], env: dict[str, str], code: str = "") -> None:
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with SIGINT ignored
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun's launcher has handlers for them
        signal.signal(number, signal.SIG_DFL)
    sys.argv, sys.path[0] = ["refract", *arguments], str(Path.cwd())
    status: object = 0
    try:
        if code:
            sys.modules["__main__"] = types.ModuleType("__main__")  # without a file, as that of `python -c`
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module("refract", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # As Python ends, without clearing each module: that takes time, and libraries that the program did not import complain.
    threading._shutdown()  # type: ignore[attr-defined]  # Python's own end calls it; typeshed lists public names
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    if "-c" in sys.argv:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the fork ends first
        sys.exit(WarmProcess().be(sys.argv[-1]))
    _imports(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # without clearing each module, as in `_be_refract`
