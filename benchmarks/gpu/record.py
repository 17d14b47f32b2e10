"""The numbers of one stage, on the disk after each of them: a stage that is killed leaves what it has measured."""

import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import STAGES


class Record:
    """Measurements of `stage`, written to `path` as JSON."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._names = {measure.name for measure in STAGES[stage].measures}
        self._started = time.monotonic()
        self._data: dict[str, Any] = {"values": {}, "skipped": {}, "facts": {}, "notes": []}

    def measure(self, name: str, value: float) -> None:
        """Keep one number. KeyError for a name that the plan lacks; ValueError for a non-finite value."""
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not finite")
        self._data["values"][self._known(name)] = float(f"{value:.5g}")
        self._data["skipped"].pop(name, None)
        self._write()

    def skip(self, name: str, reason: str) -> None:
        """Say why a number is missing."""
        self._data["skipped"][self._known(name)] = reason
        self._write()

    def skip_rest(self, reason: str) -> None:
        """Say why all numbers are missing that were neither measured nor skipped."""
        for name in self._names - set(self._data["values"]) - set(self._data["skipped"]):
            self.skip(name, reason)

    def fact(self, **facts: Any) -> None:
        """Keep conditions of the measurement."""
        self._data["facts"] |= facts
        self._write()

    def note(self, text: str) -> None:
        """Keep a sentence for the reader."""
        self._data["notes"].append(text)
        self._write()

    def value(self, name: str) -> float | None:
        """A number that was measured before, None where it is missing."""
        number: float | None = self._data["values"].get(name)
        return number

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(f"{name!r} is not in the plan; known: {', '.join(sorted(self._names))}")
        return name

    def _write(self) -> None:
        self._data["seconds"] = round(time.monotonic() - self._started, 1)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._data, indent=1), "utf-8")
        part.replace(self._path)


def read_record(path: Path) -> dict[str, Any]:
    """What a stage has written, empty where it wrote nothing."""
    if not path.exists():
        return {"values": {}, "skipped": {}, "facts": {}, "notes": []}
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return data
