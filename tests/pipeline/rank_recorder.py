"""A plugin that records the batches of each rank in RECORD.RANK, and makes a rank misbehave in its first attempt.

MISBEHAVE is RANK:STEP:ACTION. ACTION is kill (SIGKILL for the rank), stop:SIGNAL (a signal for torchrun; the rank continues when torchrun
has sent it to the ranks), or break:FILE (empty a file). The ranks then agree after every step, so that the end does not depend on the time.
"""

import json
import os
import signal
import time
from pathlib import Path

from refract.models.training.lightning_module import ClassifierModule
from refract.pipeline.training.callbacks import checkpoints

RANK, ATTEMPT = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
WHO, STEP, ACTION, *VALUE = os.environ.get("MISBEHAVE", "-:0:").split(":")
steps = 0

if ACTION == "stop":
    checkpoints.SYNC_STEPS = 1


def record(name: str) -> None:
    original = getattr(ClassifierModule, name)

    def call(self, batch, index):
        global steps
        if "RECORD" not in os.environ:  # a later test trains in the process that loaded this plugin
            return original(self, batch, index)
        row = {
            "kind": name,
            "epoch": self.current_epoch,
            "step": self.global_step,
            "indices": batch["indices"].tolist(),
        }
        row["repeats"] = batch["repeats"].tolist() if "repeats" in batch else []
        with Path(f"{os.environ['RECORD']}.{RANK}").open("a") as file:
            print(json.dumps(row), file=file)
        steps += name == "training_step"
        if (RANK, str(steps), ATTEMPT, name) == (WHO, STEP, "0", "training_step"):
            misbehave()
        return original(self, batch, index)

    setattr(ClassifierModule, name, call)


def misbehave() -> None:
    if ACTION == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ACTION == "stop":
        number = getattr(signal, VALUE[0])
        stop = signal.getsignal(number).__self__
        os.kill(os.getppid(), number)
        while stop.signal is None:
            time.sleep(0.01)
    elif ACTION == "break":
        Path(VALUE[0]).write_bytes(b"")


record("training_step")
record("validation_step")
