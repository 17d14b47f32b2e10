"""The retraining run as a Metaflow flow, for a cluster: `python -m refract.pipeline.retraining.flow argo-workflows create`.

Metaflow runs each step in a separate pod or process; `refract.pipeline.retraining.steps` implements the steps. `refract retrain` runs the
same steps in one process, without Metaflow.
"""

import logging
import os
import sys
from pathlib import Path

from metaflow import FlowSpec, Parameter, step

from refract.cli import prepare_to_compute
from refract.models.credentials import hide_credentials
from refract.progress import silence_reported


class Retrain(FlowSpec):
    """Snapshot, validate, train (with evaluation and bundle), register as challenger, gate, promote, announce."""

    run_folder = Parameter("run", default="", help="folder of a run that exists; without it --config starts a new run")
    config_file = Parameter("config", default="", help="config file of a new run")

    @step
    def start(self):
        """Take the snapshot."""
        self.folder = str(self.run_folder or _new_run(str(self.config_file)))
        _do("snapshot", self.folder)
        self.next(self.validate)

    @step
    def validate(self):
        _do("validate", self.folder)
        self.next(self.train)

    @step
    def train(self):
        _do("train", self.folder)
        self.next(self.register)

    @step
    def register(self):
        _do("register", self.folder)
        self.next(self.gate)

    @step
    def gate(self):
        _do("gate", self.folder)
        self.next(self.promote)

    @step
    def promote(self):
        _do("promote", self.folder)
        self.next(self.end)

    @step
    def end(self):
        """Announce the outcome."""
        _do("announce", self.folder)


def _new_run(config_file: str) -> Path:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.retraining.run import begin

    return begin(load_config(config_file), force=False)


def _do(name: str, folder: str) -> None:
    """Run a step; errors that a user can fix are printed without a traceback."""
    from refract.pipeline import console
    from refract.pipeline.retraining.steps import STEPS

    def run_step() -> int:
        next(step for step in STEPS if step.name == name)(Path(folder))
        return 0

    with silence_reported("retrain step"):
        code = console.run("retrain", run_step)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    os.environ["PYTHONSAFEPATH"] = (
        "1"  # Metaflow starts this file by its path, and Python must not import from its folder
    )
    hide_credentials()
    prepare_to_compute()
    logging.captureWarnings(True)
    Retrain()
