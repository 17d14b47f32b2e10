"""The retraining run as a Metaflow flow.

`refract retrain` starts it on one machine, `python -m refract.pipeline.retraining.flow argo-workflows create` on a cluster.
Metaflow runs each step in a separate process; `refract.pipeline.retraining.steps` implements the steps.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaflow import FlowSpec, Parameter, step

from refract import output
from refract.models.allocator import keep_freed_memory
from refract.models.credentials import hide_credentials
from refract.models.openmp import let_waiting_threads_sleep
from refract.progress import silence_reported

PARENT = "REFRACT_PARENT_PID"
"""The environment variable with the ID of the process that started this one."""


class Retrain(FlowSpec):
    """Snapshot, validate, train (with evaluation and bundle), register as challenger, gate, promote, announce."""

    run_folder = Parameter("run", default="", help="folder of a run that exists; without it --config starts a new run")
    config_file = Parameter("config", default="", help="config file of a new run")

    @step
    def start(self):
        """Snapshot."""
        from refract.pipeline.retraining import steps

        self.folder = str(self.run_folder or _new_run(str(self.config_file)))
        _do(steps.snapshot, self.folder)
        self.next(self.validate)

    @step
    def validate(self):
        from refract.pipeline.retraining import steps

        _do(steps.validate, self.folder)
        self.next(self.train)

    @step
    def train(self):
        from refract.pipeline.retraining import steps

        _do(steps.train, self.folder)
        self.next(self.register)

    @step
    def register(self):
        from refract.pipeline.retraining import steps

        _do(steps.register, self.folder)
        self.next(self.gate)

    @step
    def gate(self):
        from refract.pipeline.retraining import steps

        _do(steps.compare, self.folder)
        self.next(self.promote)

    @step
    def promote(self):
        from refract.pipeline.retraining import steps

        _do(steps.promote, self.folder)
        self.next(self.end)

    @step
    def end(self):
        """Announce."""
        from refract.pipeline.retraining import steps

        _do(steps.announce, self.folder)


def _new_run(config_file: str) -> Path:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.retraining.steps import begin

    return begin(load_config(config_file), force=False)


def _do(work: Callable[[Path], None], folder: str) -> None:
    """Run a step; errors that a user can fix are printed without a traceback."""
    from refract.pipeline.cli import console

    def run_step() -> int:
        work(Path(folder))
        return 0

    with silence_reported("retrain step"):
        code = console.run("retrain", run_step)
    if code:
        sys.exit(code)


def _end_with_parent() -> None:
    """Let Linux kill this process when its parent dies: a step must not outlive its flow, nor a flow its `refract retrain`.

    Otherwise it would run next to the process that resumes it. A parent that died before the call is recognised by its ID.
    """
    if sys.platform == "linux" and PARENT in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[PARENT]):
            sys.exit("refract retrain: the parent process is gone")
        os.environ[PARENT] = str(os.getpid())


def _follow_output_options() -> None:
    """Let Metaflow omit its notices in quiet mode, and its colors if NO_COLOR is set: it has options for neither."""
    if output.is_quiet():
        from metaflow import cli

        log_line = cli.logger

        def log_needed_line(body: str = "", system_msg: bool = False, bad: bool = False, **more: Any) -> None:
            if bad or not system_msg:
                log_line(body, system_msg=system_msg, bad=bad, **more)

        cli.logger = log_needed_line  # type: ignore[assignment]
    if os.environ.get("NO_COLOR"):
        from metaflow._vendor.click import _compat, utils

        _compat.should_strip_ansi = utils.should_strip_ansi = lambda *_, **__: True


if __name__ == "__main__":
    _end_with_parent()
    hide_credentials()
    let_waiting_threads_sleep()
    keep_freed_memory()
    if "step" not in sys.argv:
        # The running step receives the signal too, and writes its checkpoint. Metaflow would exit at once and end the step.
        signal.signal(signal.SIGTERM, lambda *_: None)
    logging.captureWarnings(True)
    _follow_output_options()
    Retrain()
