"""The nightly run as a Metaflow flow: `refract retrain` starts it on one machine, `python -m
refract.pipeline.retraining.flow argo-workflows create`
on a cluster. Each step is a process of its own; the steps' work is in `refract.pipeline.retraining.steps`."""

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
"""The environment's variable by which a process knows who began it."""


class Retrain(FlowSpec):
    """Snapshot, validate, train (with evaluation and bundle), register as challenger, gate, promote, announce."""

    night_folder = Parameter("night", default="", help="a night that was begun; without it one of --config is")
    config_file = Parameter("config", default="", help="the config's file")

    @step
    def start(self):
        """Snapshot."""
        from refract.pipeline.retraining import steps

        self.folder = str(self.night_folder or _begun(str(self.config_file)))
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


def _begun(config_file: str) -> Path:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.retraining.steps import begin

    return begin(load_config(config_file), force=False)


def _do(work: Callable[[Path], None], folder: str) -> None:
    """A step's work; what a user can mend is told without a traceback."""
    from refract.pipeline.cli import console

    def done() -> int:
        work(Path(folder))
        return 0

    if code := console.run("retrain", done):
        sys.exit(code)


def _end_with_parent() -> None:
    """A step whose flow was killed must not go on beside the one that resumes it, nor a flow without `refract retrain`. Linux alone can
    be asked for that; whose parent died before it asked sees another one."""
    if sys.platform == "linux" and PARENT in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[PARENT]):
            sys.exit("refract retrain: the process that began this one is gone")
        os.environ[PARENT] = str(os.getpid())


if __name__ == "__main__":
    _end_with_parent()
    hide_credentials()
    let_waiting_threads_sleep()
    keep_freed_memory()
    if "step" not in sys.argv:
        # The step under way hears it too, and writes its checkpoint; Metaflow would end at once, and the step with it.
        signal.signal(signal.SIGTERM, lambda *_: None)
    logging.captureWarnings(True)
    Retrain()
