"""Data sets for the tests of loader workers. Each worker process imports this module, so it imports neither Lightning nor MLflow."""

import os
import signal

import numpy as np
import torch

from refract.pipeline.data.datasets import init_worker
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.loader import Loader
from refract.pipeline.processes import worker_context


class Numbered(torch.utils.data.Dataset):
    """A data set whose index selects the worker's action."""

    def __init__(self, side: int = 4, dies: int | None = None, signal: int = signal.SIGKILL) -> None:
        self.side, self.dies, self.signal = side, dies, signal

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, object]:
        if index == self.dies:
            os.kill(os.getpid(), self.signal)
        return {"images": np.full((self.side, self.side, 3), index, np.uint8), "indices": index}


class Unreadable(torch.utils.data.Dataset):
    """Raises an error with a message for the user."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, object]:
        raise DataError("a.png: was readable\nand is not now")


def loader_of(dataset: Numbered, **options: bool) -> Loader:
    return Loader(
        dataset, workers=2, batch_size=4, persistent_workers=True, worker_init_fn=init_worker,
        multiprocessing_context=worker_context(init_worker.__module__), **options,
    )  # fmt: skip
