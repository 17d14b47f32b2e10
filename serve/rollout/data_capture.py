"""Capture a random sample of the requests, for drift checks and for labelling uncertain images. Off by default.

The folder holds `inputs-TIME-NAME.jsonl`, a row with statistics for each sampled image, and `images/`, the files of images with a
low-confidence prediction. Capturing never delays or fails a response: samples that the writing thread cannot take are dropped and counted.
"""

import hashlib
import json
import logging
import os
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from refract.augment.decoding.formats import format_of
from refract.augment.image_statistics import measure_image
from refract.models.bundle.bundle import Bundle
from refract.models.prediction import confidences, predicted_labels
from refract.serve.feedback.feedback_log import CapturedImage
from refract.serve.requests.decoding import RequestImages

logger = logging.getLogger(__name__)

WAITING, WAITING_BYTES = 256, 32 * 1024 * 1024
"""Most samples that wait for the writing thread, and most of their bytes. Further samples are dropped."""

ROWS_FRACTION = 0.25
"""Fraction of the disk quota for rows. The rest is for images."""

STEP = 0.1
"""Fraction of a disk quota that is written between two checks of its files, so that the quota is never exceeded."""

QUIET_S = 60.0
"""Seconds between two log lines about failed writes."""


class _Sample(NamedTuple):
    row: dict[str, Any]
    pixels: np.ndarray | None
    encoded: bytes | None
    request_id: str
    position: int

    @property
    def size(self) -> int:
        return (0 if self.pixels is None else self.pixels.nbytes) + len(self.encoded or b"")


class DataCapture:
    """Writes a sample of the images and their predictions to `folder`. fraction: the fraction of the images, in (0, 1]; most_bytes: disk
    quota of the folder; below: the confidence under which an image's file is stored, 0 for none. count: called with `kept`, `dropped` or
    `failed` for each sample; on_image: with the request id and the index of each stored image. OSError if the folder is not writable."""

    def __init__(
        self,
        folder: Path,
        *,
        fraction: float,
        most_bytes: int,
        below: float,
        count: Callable[[str], None] | None = None,
    ) -> None:
        self._fraction, self._below = fraction, below
        self.count: Callable[[str], None] = count or (lambda end: None)
        self.on_image: Callable[[str, int, CapturedImage], None] | None = None
        former, images = folder / "pictures", folder / "images"
        if former.is_dir() and not images.exists():
            former.rename(images)  # the folder of earlier versions, which counts towards the quota
        self._rows = _Rows(_DiskQuota(folder, "inputs-*.jsonl", int(ROWS_FRACTION * most_bytes)))
        self._images = _DiskQuota(images, "[!.]*", most_bytes - int(ROWS_FRACTION * most_bytes))
        self._waiting: queue.Queue[_Sample | None] = queue.Queue(WAITING)
        self._held, self._lock, self._logged_at = 0, threading.Lock(), -QUIET_S
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 2.0) -> None:
        """Write the waiting samples, for at most `seconds`."""
        if self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=seconds)
            except queue.Full:
                return
            self._thread.join(seconds)

    def choose(self, count: int) -> list[int]:
        """Draw which of the `count` images of a request are sampled."""
        return [i for i in range(count) if random.random() < self._fraction]

    def offer(
        self,
        bundle: Bundle,
        images: RequestImages,
        batch: np.ndarray,
        probabilities: np.ndarray,
        request_id: str = "",
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Sample from an answered request. batch: the network's inputs, see `refract.serve.requests.multimodal_samples`; chosen: the
        sampled images, None draws them. Call it on the event loop. It raises no errors: they are logged and counted."""
        chosen = self.choose(len(probabilities)) if chosen is None else chosen
        try:
            for i in chosen:
                self._put(self._sample(bundle, images, batch[i], probabilities[i : i + 1], i, request_id))
        except Exception:
            logger.exception("capturing a sample failed")
            self.count("failed")

    def _sample(
        self, bundle: Bundle, images: RequestImages, record: np.ndarray, row: np.ndarray, index: int, request_id: str
    ) -> _Sample:
        info = bundle.info
        pixels = record if record.dtype.fields is None else record["images"]
        statistics: dict[str, float] = {}
        if images.sides and images.sides[index] != (0, 0):
            height, width = images.sides[index]
            statistics = {"width": width, "height": height, "aspect": width / height}
        if images.texts:
            statistics["characters"] = len(images.texts[index])
        confidence = float(confidences(row, info.task, info.thresholds)[0])
        predicted = np.flatnonzero(predicted_labels(row, info.task, info.thresholds)[0])
        values = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "model": bundle.digest[:16],
            "answered": [info.labels[i] for i in predicted.tolist()],
            "confidence": round(confidence, 6),
            "statistics": statistics,
            "image": None,
        }
        has_image = not images.has_image or images.has_image[index]
        uncertain = confidence < self._below and images.encoded
        # A view of one image would keep its whole batch in memory.
        copied, encoded = pixels.copy() if has_image else None, images.encoded[index] if uncertain else None
        return _Sample(values, copied, encoded, request_id, index)

    def _put(self, sample: _Sample) -> None:
        with self._lock:
            if self._held + sample.size > WAITING_BYTES:
                self.count("dropped")
                return
            self._held += sample.size
        try:
            self._waiting.put_nowait(sample)
        except queue.Full:
            self._release(sample)
            self.count("dropped")

    def _release(self, sample: _Sample) -> None:
        with self._lock:
            self._held -= sample.size

    def _run(self) -> None:
        while (sample := self._waiting.get()) is not None:
            try:
                self._write(sample)
                self.count("kept")
            except Exception as err:  # a full disk, a removed folder
                self.count("failed")
                if time.monotonic() - self._logged_at >= QUIET_S:
                    self._logged_at = time.monotonic()
                    logger.warning("samples cannot be written: %s", err)
            finally:
                self._release(sample)

    def _write(self, sample: _Sample) -> None:
        row = sample.row
        if sample.pixels is not None:
            row["statistics"] |= {
                name: round(value, 6) for name, value in measure_image(sample.pixels)._asdict().items()
            }
        if sample.encoded and (name := self._images.keep(_name() + _suffix(sample.encoded), sample.encoded)):
            row["image"] = f"images/{name}"
            if self.on_image:
                image = CapturedImage(hashlib.sha256(sample.encoded).hexdigest(), row["image"])
                self.on_image(sample.request_id, sample.position, image)
        self._rows.add((json.dumps(row, ensure_ascii=False) + "\n").encode())


class _Rows:
    """Appends lines to a file, and starts a new file after a tenth of the disk quota."""

    def __init__(self, quota: "_DiskQuota") -> None:
        self._quota, self._file, self._size = quota, None, 0  # type: _DiskQuota, Path | None, int

    def add(self, line: bytes) -> None:
        self._quota.evict(len(line))
        if self._file is None or not self._file.exists() or self._size + len(line) > STEP * self._quota.most:
            self._file, self._size = self._quota.folder / f"inputs-{_name()}.jsonl", 0
        # One write for a whole line, so that after a crash only the last line can be incomplete.
        handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
        self._size += len(line)


class _DiskQuota:
    """Limits the files of a folder that match `pattern` to `most` bytes: the oldest, by name, are deleted. Only the owner may read it."""

    def __init__(self, folder: Path, pattern: str, most: int) -> None:
        self.folder, self.most, self._pattern = folder, most, pattern
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for fragment in folder.glob(".*.partial"):
            fragment.unlink(missing_ok=True)
        (probe := folder / f".{secrets.token_hex(4)}.partial").touch()
        probe.unlink()
        self._since = most  # so that the first check counts files of an earlier run
        self.evict(0)

    def keep(self, name: str, data: bytes) -> str | None:
        """Write a file atomically, and return its name. None if it exceeds a tenth of the disk quota."""
        if len(data) > STEP * self.most:
            return None
        self.evict(len(data))
        partial = self.folder / f".{name}.partial"
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            partial.rename(self.folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return name

    def evict(self, size: int) -> None:
        """Remove the oldest files if the quota may not have `size` bytes left."""
        self._since += size
        if self._since <= STEP * self.most:
            return
        self._since = size
        files = sorted(self.folder.glob(self._pattern))
        sizes = {file: file.stat().st_size for file in files if file.is_file() and not file.is_symlink()}
        total = sum(sizes.values())
        for file, bytes_freed in sizes.items():
            if total <= (1 - STEP) * self.most:
                break
            file.unlink(missing_ok=True)
            total -= bytes_freed


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")


def _name() -> str:
    """Return a unique name that sorts by time. It omits the prediction, which would bias the annotator."""
    return f"{_stamp()}-{secrets.token_hex(4)}"


def _suffix(data: bytes) -> str:
    """Return the file suffix of the image format, by the first bytes: the client's file name is unknown."""
    return _SUFFIXES.get(format_of(data) or "", ".img")


_SUFFIXES = MappingProxyType(
    {
        "JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp", "AVIF": ".avif", "HEIC": ".heic",
    }
)  # fmt: skip
