"""A sample of what is asked, kept for those who look for drift or label what was unsure. Off unless asked for. Knows nothing of HTTP.

A folder of `inputs-TIME-NAME.jsonl`, a row for each sampled image with its numbers, and `images/`, the files of those whose answer was
of low confidence. Whatever happens here, answers neither wait nor fail: what the writing thread cannot take is dropped, and counted.
"""

import json
import logging
import os
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from refract.augment.decoding.formats import format_of
from refract.augment.image_statistics import measure_image
from refract.models.bundle.bundle import Bundle
from refract.models.prediction import confidences, given_labels
from refract.serve.requests.decoding import RequestImages

logger = logging.getLogger(__name__)

WAITING, WAITING_BYTES = 256, 32 * 1024 * 1024
"""Samples, and their bytes, that may wait for the thread; more are dropped."""

ROWS_SHARE = 0.25
"""Of the megabytes, for rows; the rest is for images."""

STEP = 0.1
"""The share of a shelf that is written between two looks at what lies there: it is never fuller than whole."""

QUIET_S = 60.0
"""Between two lines in the log about writes that fail."""


class _Sample(NamedTuple):
    row: dict[str, Any]
    pixels: np.ndarray | None
    encoded: bytes | None

    @property
    def size(self) -> int:
        return (0 if self.pixels is None else self.pixels.nbytes) + len(self.encoded or b"")


class DataCapture:
    """share: of the images, in (0, 1]; most_bytes: of all that lies in `folder`; below: the confidence under which an image's file is
    kept, 0 for none. count: is told `kept`, `dropped` or `failed` for each. OSError where the folder cannot be written to."""

    def __init__(
        self, folder: Path, *, share: float, most_bytes: int, below: float, count: Callable[[str], None] | None = None
    ) -> None:
        self._share, self._below = share, below
        self.count: Callable[[str], None] = count or (lambda end: None)
        self._rows = _Rows(_DiskQuota(folder, "inputs-*.jsonl", int(ROWS_SHARE * most_bytes)))
        self._images = _DiskQuota(folder / "images", "[!.]*", most_bytes - int(ROWS_SHARE * most_bytes))
        self._waiting: queue.Queue[_Sample | None] = queue.Queue(WAITING)
        self._held, self._lock, self._told = 0, threading.Lock(), -QUIET_S
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 2.0) -> None:
        """Write what waits, for so long at most."""
        if self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=seconds)
            except queue.Full:
                return
            self._thread.join(seconds)

    def offer(self, bundle: Bundle, images: RequestImages, batch: np.ndarray, probabilities: np.ndarray) -> None:
        """Draw from what was answered. batch: the network's inputs, see `refract.serve.requests.multimodal_samples`.
        Called on the event loop; raises nothing."""
        chosen = [i for i in range(len(probabilities)) if random.random() < self._share]
        if not chosen:
            return
        try:
            for i in chosen:
                self._put(self._sample(bundle, images, batch[i], probabilities[i : i + 1], i))
        except Exception:
            logger.exception("a sample was lost")
            self.count("failed")

    def _sample(self, bundle: Bundle, images: RequestImages, given: np.ndarray, row: np.ndarray, place: int) -> _Sample:
        info = bundle.info
        pixels = given if given.dtype.fields is None else given["images"]
        statistics: dict[str, float] = {}
        if images.sides and images.sides[place] != (0, 0):
            height, width = images.sides[place]
            statistics = {"width": width, "height": height, "aspect": width / height}
        if images.texts:
            statistics["characters"] = len(images.texts[place])
        confidence = float(confidences(row, info.task, info.thresholds)[0])
        answered = np.flatnonzero(given_labels(row, info.task, info.thresholds)[0])
        found = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "model": bundle.digest[:16],
            "answered": [info.labels[i] for i in answered.tolist()],
            "confidence": round(confidence, 6),
            "statistics": statistics,
            "image": None,
        }
        there = not images.has_image or images.has_image[place]
        unsure = confidence < self._below and images.encoded
        # A copy, else one image would keep its whole batch.
        return _Sample(found, pixels.copy() if there else None, images.encoded[place] if unsure else None)

    def _put(self, sample: _Sample) -> None:
        with self._lock:
            if self._held + sample.size > WAITING_BYTES:
                self.count("dropped")
                return
            self._held += sample.size
        try:
            self._waiting.put_nowait(sample)
        except queue.Full:
            self._let_go(sample)
            self.count("dropped")

    def _let_go(self, sample: _Sample) -> None:
        with self._lock:
            self._held -= sample.size

    def _run(self) -> None:
        while (sample := self._waiting.get()) is not None:
            try:
                self._write(sample)
                self.count("kept")
            except Exception as err:  # a full disk, a folder that was taken away
                self.count("failed")
                if time.monotonic() - self._told >= QUIET_S:
                    self._told = time.monotonic()
                    logger.warning("samples cannot be kept: %s", err)
            finally:
                self._let_go(sample)

    def _write(self, sample: _Sample) -> None:
        row = sample.row
        if sample.pixels is not None:
            row["statistics"] |= {name: round(value, 6) for name, value in measure_image(sample.pixels)._asdict().items()}
        if sample.encoded and (name := self._images.keep(_name() + _suffix(sample.encoded), sample.encoded)):
            row["image"] = f"images/{name}"
        self._rows.add((json.dumps(row, ensure_ascii=False) + "\n").encode())


class _Rows:
    """Lines, appended to a file of their own until it is a tenth of the shelf."""

    def __init__(self, shelf: "_DiskQuota") -> None:
        self._shelf, self._file, self._size = shelf, None, 0  # type: _DiskQuota, Path | None, int

    def add(self, line: bytes) -> None:
        self._shelf.make_room(len(line))
        if self._file is None or not self._file.exists() or self._size + len(line) > STEP * self._shelf.most:
            self._file, self._size = self._shelf.folder / f"inputs-{_name()}.jsonl", 0
        # One write of a whole line: a reader, or a crash, finds it whole or not at all but for the last.
        handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
        self._size += len(line)


class _DiskQuota:
    """The files of a folder that match, at most so many bytes of them: the oldest, by their names, give way. It is its owner's alone."""

    def __init__(self, folder: Path, pattern: str, most: int) -> None:
        self.folder, self.most, self._pattern = folder, most, pattern
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for fragment in folder.glob(".*.partial"):
            fragment.unlink(missing_ok=True)
        (probe := folder / f".{secrets.token_hex(4)}.partial").touch()
        probe.unlink()
        self._since = most  # what lies there from before counts
        self.make_room(0)

    def keep(self, name: str, data: bytes) -> str | None:
        """The name, once the file is whole; None for one that would take too much of the shelf."""
        if len(data) > STEP * self.most:
            return None
        self.make_room(len(data))
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

    def make_room(self, size: int) -> None:
        self._since += size
        if self._since <= STEP * self.most:
            return
        self._since = size
        files = sorted(self.folder.glob(self._pattern))
        sizes = {file: file.stat().st_size for file in files if file.is_file() and not file.is_symlink()}
        total = sum(sizes.values())
        for file, own in sizes.items():
            if total <= (1 - STEP) * self.most:
                break
            file.unlink(missing_ok=True)
            total -= own


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")


def _name() -> str:
    """Sorts by time. The answer is no part of it: whoever labels should not be led."""
    return f"{_stamp()}-{secrets.token_hex(4)}"


def _suffix(data: bytes) -> str:
    """By the first bytes, as the client's own name is not known."""
    return _SUFFIXES.get(format_of(data) or "", ".img")


_SUFFIXES = MappingProxyType(
    {
        "JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp", "AVIF": ".avif", "HEIC": ".heic",
    }
)  # fmt: skip
