"""One attempt of the ranks that torchrun started, which may have failed and restarted before.

torchrun keeps one store for all attempts, so that the values of an attempt need a prefix. Its counter TORCHELASTIC_RESTART_COUNT differs
between machines: a machine does not count restarts that another machine causes. The ranks therefore agree on the attempt by themselves.
"""

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from refract.errors import ServiceError

if TYPE_CHECKING:
    from torch.distributed import Store

WAIT = timedelta(days=7)
"""The longest time that a rank waits for rank 0, which may check large data first. torchrun ends all ranks if rank 0 ends."""

START = timedelta(minutes=10)
"""The longest time between the first and the last start of a rank."""

POLL_S = 0.02


@dataclass(frozen=True)
class Attempt:
    """store: for values of this attempt; restarted: whether the ranks of an earlier attempt failed."""

    store: "Store"
    restarted: bool


@cache
def current_attempt() -> Attempt | None:
    """Return the attempt of this process and its peers, None without torchrun, its store, or peers. Waits for all ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from torch.distributed import PrefixStore, TCPStore

    server = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore("refract", TCPStore(*server, timeout=WAIT, wait_for_workers=False))
    rank, restarts = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    name, restarted = agree(store, rank, int(os.environ["WORLD_SIZE"]), restarts)
    return Attempt(PrefixStore(name, store), restarted)


def restarted() -> bool:
    """Whether torchrun started this process after a failure, by --max-restarts. Waits for all ranks."""
    attempt = current_attempt()
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 if attempt is None else attempt.restarted


def agree(store: "Store", rank: int, count: int, restarts: int) -> tuple[str, bool]:
    """Return (the name of the attempt, whether it is a restart), equal on all ranks. store: may hold the values of earlier attempts.

    Rank 0 proposes a name with the processes that it has seen. Each of them confirms it. A process that replaced another one since then
    makes rank 0 propose again.
    """
    process = uuid.uuid4().hex
    store.set(f"process/{rank}", json.dumps([process, restarts]))
    if rank == 0:
        return _propose(store, count)
    while True:
        proposal = json.loads(store.get("proposal"))
        if [process, restarts] in proposal["processes"]:
            store.set(f"{proposal['name']}/confirmed/{rank}", "")
            while json.loads(store.get("proposal")) == proposal:
                if store.check([f"{proposal['name']}/restarted"]):
                    return proposal["name"], json.loads(store.get(f"{proposal['name']}/restarted"))
                time.sleep(POLL_S)
        time.sleep(POLL_S)


def _propose(store: "Store", count: int) -> tuple[str, bool]:
    while True:
        processes, name = _processes(store, count), uuid.uuid4().hex
        store.set("proposal", json.dumps({"name": name, "processes": processes}))
        confirmed = [f"{name}/confirmed/{rank}" for rank in range(1, count)]
        while _processes(store, count) == processes:
            if store.check(confirmed):
                restarted = store.add("attempts", 1) > 1 or any(restarts for _, restarts in processes)
                store.set(f"{name}/restarted", json.dumps(restarted))
                return name, restarted
            time.sleep(POLL_S)


def _processes(store: "Store", count: int) -> Sequence[Any]:
    """Return the latest process of each rank. Waits for ranks that have never started; ServiceError after START."""
    from torch.distributed import DistError

    try:
        store.wait([f"process/{rank}" for rank in range(count)], START)
    except (DistError, RuntimeError) as error:
        minutes = START.total_seconds() / 60
        raise ServiceError(
            f"not all of the {count} ranks started within {minutes:.0f} minutes; read the other ranks' output"
        ) from error
    return [json.loads(store.get(f"process/{rank}")) for rank in range(count)]
