"""The program that imports PyTorch, Lightning, MLflow and most of Refract once, and forks the commands of the tests: see `warm_process`.

It forks a process for each connection to its socket. That process reads one JSON request per line, forks commands, and answers each request
with a line. At the end of the connection it kills the commands that run on.
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
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import charts
from warm_process import Process

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


class ForkedRank(Process):
    """A rank that torchrun's launcher starts, as a fork of the launcher. The arguments are those of `subprocess.Popen`."""

    returncode: int | None = None

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
    ending: Any = threading  # no public name tells the threads of executors to end, and waits for all
    ending._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    _imports(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # without clearing each module, as in `_be_refract`
