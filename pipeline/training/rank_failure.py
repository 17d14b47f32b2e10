"""The failure of one rank: how the other ranks notice it, and how torchrun learns its cause."""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from refract.errors import ServiceError
from refract.models.credentials import masked
from refract.pipeline.files import write_atomically
from refract.pipeline.stopping import ASKED_TO_STOP, Stop, stop_requests
from refract.pipeline.training.ranks import by_torchrun

CODES = "REFRACT_TORCHRUN_CODES"
"""Environment variable of the ranks of `refract torchrun`: the folder where a rank stores an exit code that is not a failure."""

NOT_FAILED = (3, ASKED_TO_STOP, 130)
"""Exit codes of a rank that did its work: trained but not registered, stopped by SIGTERM, stopped by Ctrl-C."""

PATIENCE_S = 10.0
"""Seconds that a rank waits for torchrun to end it, so that torchrun first notices the rank that caused the failure."""

_LOST = re.compile(
    r"connection (?:closed|reset|refused)|broken pipe|socket (?:closed|timeout)|timed out|ncclRemoteError|ncclSystemError|NCCL watchdog",
    re.IGNORECASE,
)


class RankLost(ServiceError):
    """The connection to another rank broke, because that rank or its machine failed."""


def rank_lost(error: RuntimeError) -> RankLost | None:
    """Return the error of a rank that lost the connection to another one, None for another kind of error."""
    from torch.distributed import DistError

    text = str(error)
    if not isinstance(error, DistError) and "gloo" not in text and "NCCL" not in text:
        return None
    if (match := _LOST.search(text)) is None:
        return None
    address = re.search(r"\[(\d+\.\d+\.\d+\.\d+|[0-9a-f:]+)\]:\d+", text)
    where = "" if address is None else f" at {address.group(1)}"
    return RankLost(
        f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} lost the connection to another rank{where} "
        f"({match.group().lower()}), whose output names the cause"
    )


def wait_for_torchrun(stop: Stop) -> None:
    """Wait until torchrun asks this rank to end, at most PATIENCE_S, as its own end must not be taken for the cause."""
    if not by_torchrun() or threading.current_thread() is not threading.main_thread():
        return
    stop.install()
    logging.getLogger(stop_requests.__module__).setLevel(logging.ERROR)  # there is no step to finish
    end = time.monotonic() + PATIENCE_S
    while stop.signal is None and time.monotonic() < end:
        time.sleep(0.05)


def stop_without_launcher() -> None:
    """Let Linux send SIGTERM to this rank if its launcher ends, also by SIGKILL, so that no rank keeps its device for ever."""
    if by_torchrun() and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def launched() -> bool:
    """Whether `refract torchrun` started this process: it prints the errors of its ranks."""
    return by_torchrun() and CODES in os.environ


def store_error(error: object) -> None:
    """Store a rank's error as one sentence, without credentials, where torchrun reads it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not by_torchrun() or path is None:
        return
    text = masked(str(error))
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    message = {"message": text, "extraInfo": details, "elsewhere": isinstance(error, RankLost)}
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123 — torchrun's folder exists
        json.dump({"message": message}, file)


def code_of_rank(code: int) -> int:
    """Return the code with which a rank ends. torchrun takes each code but 0 for a failure, which it answers with a restart."""
    if not by_torchrun() or code not in NOT_FAILED:
        return code
    if launched():
        write_atomically(Path(os.environ[CODES]) / f"{os.environ['RANK']}.code", str(code).encode())
        return 0
    return 0 if code == 3 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" else code
