"""Time the actions of Lightning's training loop."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from refract.models.training.lightning_imports import Callback, Profiler
from refract.pipeline.stopping import Stop


class StepTimer(Profiler):
    """Sum the time of each stage.

    totals: stage → milliseconds; step_ms: milliseconds of a step; events: the actions in Chrome's trace format. The time of an action
    excludes that of the actions within it. On a GPU, each start and end waits for the device, so that a step takes longer than usual.
    """

    def __init__(self, device: str, actions: Sequence[tuple[str, str]]) -> None:
        """actions: part of an action's name → its stage; the first match counts."""
        super().__init__()
        self.device, self.actions = device, actions
        self.totals: dict[str, float] = defaultdict(float)
        self.events: list[dict[str, Any]] = []
        self.step_ms = 0.0
        self._open: list[tuple[str, float, list[float]]] = []  # action, its start, the seconds of the actions within it
        self._since = time.perf_counter()

    def start(self, action_name: str) -> None:
        self._open.append((action_name, self._now(), []))

    def stop(self, action_name: str) -> None:
        name, started, within = self._open.pop()
        duration = self._now() - started
        if self._open:
            self._open[-1][2].append(duration)
        stage = next((stage for part, stage in self.actions if part in name), None)
        if stage is not None:
            self.totals[stage] += 1000 * (duration - sum(within))
            span = {"ph": "X", "pid": 0, "tid": 0, "ts": 1e6 * started, "dur": 1e6 * duration}
            self.events.append({"name": stage, **span, "args": {"action": name}})

    def restart(self) -> None:
        """Forget the times of the finished actions."""
        self.totals.clear()
        self.events.clear()
        self._since = self._now()

    def finish(self, steps: int) -> None:
        """Set `step_ms` to the mean of `steps` steps since `restart`."""
        self.step_ms = 1000 * (self._now() - self._since) / steps

    def _now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


class CountSteps(Callback):
    """Restart the timer after the warm-up, and end the training after `steps` further steps or a stop request. The last callback."""

    def __init__(
        self, timer: StepTimer, warm_up: int, steps: int, update: Callable[[], None], stop: Stop | None = None
    ) -> None:
        self.timer, self.warm_up, self.steps, self.update, self.stop, self.done = timer, warm_up, steps, update, stop, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.stop is not None:
            self.stop.install()  # Lightning has replaced the handlers

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.done += 1
        self.update()
        if self.done == self.warm_up:
            self.timer.restart()
        elif self.done == self.warm_up + self.steps:
            self.timer.finish(self.steps)
            trainer.should_stop = True
        if self.stop is not None and self.stop.signal is not None:
            trainer.should_stop = True
