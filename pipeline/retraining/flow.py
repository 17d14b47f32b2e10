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

from metaflow import FlowSpec, Parameter, step

from refract.models.allocator import keep_freed_memory
from refract.models.credentials import hide_credentials
from refract.models.openmp import let_waiting_threads_sleep

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

    if code := console.run("retrain", run_step):
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


if __name__ == "__main__":
    _end_with_parent()
    hide_credentials()
    let_waiting_threads_sleep()
    keep_freed_memory()
    if "step" not in sys.argv:
        # The running step receives the signal too, and writes its checkpoint. Metaflow would exit at once and end the step.
        signal.signal(signal.SIGTERM, lambda *_: None)
    logging.captureWarnings(True)
    Retrain()
