"""The latest predictions of one server process, and the true labels that feedback gives them, in memory of a fixed size."""

import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from refract.models.bundle.bundle import Bundle
from refract.models.bundle.info import BundleInfo
from refract.serve.errors import RequestError
from refract.serve.feedback.decisions import decisions_of
from refract.serve.feedback.live_accuracy import LiveAccuracy, live_accuracy

MOST_MODELS = 3
"""Most models that `live` reports: those whose predictions were judged and are the latest."""


@dataclass(frozen=True)
class Judgement:
    """One prediction with its true labels. predicted: label indices; model: the beginning of the bundle's digest; replaced: whether it had
    been judged before."""

    index: int
    predicted: list[int]
    model: str
    correct: bool
    replaced: bool


class RecentPredictions:
    """Keeps the latest `keep` predictions for at most `hours`, by request id and index of the image.

    Recording a prediction writes one record and replaces the oldest. Feedback searches all ids, which takes a millisecond with a million.
    It may be used from several threads. clock: seconds that never go back.
    """

    def __init__(
        self, info: BundleInfo, *, keep: int, hours: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """info: the description of the served bundle, whose task and labels are those of every later one. keep: at least 1."""
        self.keep, self.hours, self._labels, self._clock = keep, hours, info.labels, clock
        self._decisions = decisions_of(info)
        values = self._decisions
        fields = [("seconds", "<u4"), ("model", "<u4"), ("index", "<u4"), ("images", "<u4"), ("confidence", "<f4")]
        dtype = np.dtype([*fields, ("judged", "?"), ("predicted", values.dtype), ("truth", values.dtype)])
        self._record = struct.Struct(f"<IIIIf?{values.format}{values.format}")
        self._buffer = bytearray(keep * self._record.size)
        self._records = np.frombuffer(self._buffer, dtype)
        self._bytes = np.frombuffer(self._buffer, np.uint8).reshape(keep, -1)  # copied faster than records
        # Apart from the records, so that a search reads contiguous memory. A hash of 64 bits, seeded for each process, stands for the id.
        self._keys = np.zeros(keep, np.int64)
        self._models: dict[str, int] = {}  # grows by one with each new bundle of a hot swap
        self._count, self._started, self._lock = 0, clock(), threading.Lock()

    @property
    def bytes(self) -> int:
        """The memory of all records, in bytes."""
        return len(self._buffer) + self._keys.nbytes

    def record(self, request_id: str, bundle: Bundle, probabilities: np.ndarray) -> None:
        """Record the predictions of one request, float32 (N, C). It waits for no input or output."""
        info, number, decide, none = bundle.info, len(probabilities), self._decisions.decide, self._decisions.none
        with self._lock:
            model = self._models.setdefault(bundle.digest[:16], len(self._models))
            now = self._now()
            for index, row in enumerate(probabilities):
                decision, confidence = decide(info, row)
                slot = self._count % self.keep
                self._keys[slot] = hash((request_id, index))
                values = (now, model, index, number, confidence, False, decision, none)
                self._record.pack_into(self._buffer, slot * self._record.size, *values)
                self._count += 1

    def judge(self, request_id: str, truth: Sequence[int], index: int | None = None) -> Judgement:
        """Set the true labels of a prediction, in place of former ones. index: the index of the image in its request; None for a request
        with one image. If several requests had the id, the latest counts. RequestError 404 if the prediction is not retained, 422 for the
        index."""
        with self._lock:
            slot = self._slot(request_id, index or 0)
            outside = slot is None and index and self._slot(request_id, 0) is not None
            # Python hashes 2**61 - 1 like 0, so that a record may be of another index.
            if outside or (slot is not None and (index or 0) >= self._records[slot]["images"]):
                raise RequestError(422, "invalid_request", f"index {index}: the request has fewer images")
            if slot is None:
                raise RequestError(404, "unknown_prediction", self._unknown(request_id))
            record = self._records[slot]
            if index is None and record["images"] > 1:
                number = record["images"]
                message = f"the request has {number} images; add the member index, 0 … {number - 1}"
                raise RequestError(422, "invalid_request", message)
            replaced = bool(record["judged"])
            fields = list(self._record.unpack_from(self._buffer, slot * self._record.size))
            encoded, predicted = self._decisions.encode(truth), fields[-2]
            self._record.pack_into(self._buffer, slot * self._record.size, *fields[:-3], True, predicted, encoded)
            model = list(self._models)[record["model"]]
            labels = self._decisions.indices(record["predicted"])
            return Judgement(index or 0, labels, model, bool(predicted == encoded), replaced)

    def retained(self) -> int:
        """Return the number of predictions that feedback can judge."""
        with self._lock:
            return int(self._fresh().sum())

    def live(self) -> list[LiveAccuracy]:
        """Estimate the accuracy of each of at most MOST_MODELS models from its judged predictions, the model of the latest one first."""
        with self._lock:
            judged = np.flatnonzero(self._fresh() & self._records["judged"][: self._length])
            copies, count, digests = self._bytes.take(judged, axis=0), self._count, list(self._models)
        # Without the lock, for which predictions wait.
        records = copies.view(self._records.dtype)[:, 0]
        youngest = np.full(len(digests), self.keep)
        np.minimum.at(youngest, records["model"], (count - 1 - judged) % self.keep)
        models = [model for model in youngest.argsort().tolist()[:MOST_MODELS] if youngest[model] < self.keep]
        return [self._estimate(digests[model], records[records["model"] == model]) for model in models]

    @property
    def _length(self) -> int:
        return min(self._count, self.keep)

    def _estimate(self, digest: str, records: np.ndarray) -> LiveAccuracy:
        scores = self._decisions.compare(records["predicted"], records["truth"])
        return live_accuracy(digest, self._labels, scores, records["confidence"])

    def _now(self) -> int:
        return int(self._clock() - self._started)

    def _fresh(self) -> np.ndarray:
        """Return which of the records are younger than the limit. Hold the lock."""
        fresh: np.ndarray = self._records["seconds"][: self._length] > self._now() - 3600 * self.hours
        return fresh

    def _slot(self, request_id: str, index: int) -> int | None:
        """Return the record of a prediction that is retained; the latest if there are several. Hold the lock."""
        slots = np.flatnonzero(self._keys[: self._length] == hash((request_id, index)))
        if not len(slots):
            return None
        slot = int(slots[((self._count - 1 - slots) % self.keep).argmin()])
        expired = self._records["seconds"][slot] <= self._now() - 3600 * self.hours
        return None if expired else slot

    def _unknown(self, request_id: str) -> str:
        limits = f"the latest {self.keep:,} predictions for {self.hours:g} h (--feedback-keep, --feedback-hours)"
        return f"no prediction has the id {request_id[:64]!r}; this server process keeps {limits}"
