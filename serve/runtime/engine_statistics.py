"""Counts and durations of one engine, for the statistics extension of the Open Inference Protocol. Independent of HTTP."""

import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any


@dataclass
class Total:
    """The number of events, and their total duration in seconds."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count, self.seconds = self.count + 1, self.seconds + seconds

    def to_dict(self) -> dict[str, int]:
        return {"count": self.count, "ns": round(self.seconds * 1e9)}


class Statistics:
    """Counts requests on the event loop, and batches on the threads that compute them."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, Total] = defaultdict(Total)
        self._batches: defaultdict[int, Total] = defaultdict(Total)
        self._inferences, self._last = 0, 0.0
        self._lock = threading.Lock()

    def succeeded(self, images: int, seconds: float, stages: dict[str, float]) -> None:
        """Count a request for `images` predictions, answered in `seconds`. stages: the seconds of `prepare`, `queue` and `compute`; or
        those of `prepare` and `cache`, which are no inferences."""
        self._last = time.time()
        self._totals["success"].add(seconds)
        if "cache" in stages:
            self._totals["cache_hit"].add(stages["cache"])
            return
        self._inferences += images
        durations = {"compute_input": stages["prepare"], "queue": stages["queue"], "compute_infer": stages["compute"]}
        for name, duration in durations.items():
            self._totals[name].add(duration)
        self._totals["compute_output"].add(max(0.0, seconds - sum(durations.values())))

    def missed(self, seconds: float) -> None:
        """Count a request that is not in the response cache, looked up in `seconds`."""
        self._totals["cache_miss"].add(seconds)

    def failed(self, seconds: float) -> None:
        """Count a parsed request that failed after `seconds`."""
        self._last = time.time()
        self._totals["fail"].add(seconds)

    def computed(self, size: int, seconds: float) -> None:
        """Count a batch of `size` inputs, computed in `seconds`."""
        with self._lock:
            self._batches[size].add(seconds)

    def to_dict(self, name: str, version: str) -> dict[str, Any]:
        """Return a `$model_stat` of the extension: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md.

        Deviation: in `batch_stats` only `compute_infer` counts, as inputs are prepared and outputs formatted for each request, not for a
        batch."""
        none = Total().to_dict()
        with self._lock:
            executions = sum(total.count for total in self._batches.values())
            batches = [
                {"batch_size": size, "compute_input": none, "compute_infer": total.to_dict(), "compute_output": none}
                for size, total in sorted(self._batches.items())
            ]
        names = (
            "success",
            "fail",
            "queue",
            "compute_input",
            "compute_infer",
            "compute_output",
            "cache_hit",
            "cache_miss",
        )
        return {
            "name": name,
            "version": version,
            "last_inference": round(self._last * 1000),
            "inference_count": self._inferences,
            "execution_count": executions,
            "inference_stats": {stage: self._totals[stage].to_dict() for stage in names},
            "batch_stats": batches,
        }
