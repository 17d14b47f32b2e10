"""Feedback as JSON lines in a folder, for relabelling."""

import asyncio
import json
import os
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

MOST_IMAGES = 10_000
"""Most captured images whose hash is remembered for later feedback: the latest."""


class CapturedImage(NamedTuple):
    """An image file that the server stored. sha256: digest of its bytes, as the client sent them; name: its path in the folder."""

    sha256: str
    name: str


class FeedbackLog:
    """Appends feedback to `DIR/feedback-TIME-NAME.jsonl`, a new file for each process. OSError if the folder is not writable.

    When `append` returns, its line outlives the process. After a crash only the last line of a file can be incomplete.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (probe := folder / f".{secrets.token_hex(4)}.partial").touch()
        probe.unlink()
        self._folder, self._file = folder, None  # type: Path, Path | None
        self._images: dict[tuple[str, int], CapturedImage] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")  # one, so that the lines keep their order

    def captured(self, request_id: str, index: int, image: CapturedImage) -> None:
        """Remember the stored image of a prediction."""
        with self._lock:
            self._images[request_id, index] = image
            if len(self._images) > MOST_IMAGES:
                del self._images[next(iter(self._images))]

    async def append(self, request_id: str, index: int, values: dict[str, Any]) -> None:
        """Write a line with the id, the index, the captured image, if any, and `values`. OSError if it cannot be written."""
        with self._lock:
            image = self._images.get((request_id, index))
        captured = {"sha256": image.sha256, "image": image.name} if image else {"sha256": None, "image": None}
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {"time": time, "id": request_id, "index": index, **captured, **values}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, line)

    def close(self) -> None:
        """Write the waiting lines, and stop the thread."""
        self._thread.shutdown()

    def _write(self, line: bytes) -> None:
        if self._file is None:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            self._file = self._folder / f"feedback-{stamp}-{secrets.token_hex(4)}.jsonl"
        try:
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                while line:
                    line = line[os.write(handle, line) :]
            finally:
                os.close(handle)
        except OSError:
            self._file = None  # its last line may be incomplete
            raise
