"""Where the runs of one model leave what they know, and the lock that one night at a time holds."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.files import locked, write_atomically


class Busy(ConfigError):
    """Another process has the night in its hands."""


@dataclass(frozen=True)
class Workspace:
    """The folder of one model. holdout/: frozen images; snapshots/DIGEST/: the data of a night; runs/ID/: a night's record; last.json:
    the last night whose data were accepted."""

    root: Path

    @property
    def holdout(self) -> Path:
        return self.root / "holdout"

    def snapshot(self, digest: str) -> Path:
        return self.root / "snapshots" / digest[:16]

    def night(self, name: str) -> Path:
        return self.root / "runs" / name

    def runs(self) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in (self.root / "runs").glob("*") if (path / "night.json").is_file())

    def last(self) -> dict[str, Any] | None:
        path = self.root / "last.json"
        return read(path) if path.exists() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """One night at a time; a process that died holds nothing. Busy where another has it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / "lock", Busy(f"{self.root}: a night is under way; one at a time")):
            yield


def workspace_of(config: Config) -> Workspace:
    """ConfigError where nothing names the registered model, or MLflow is switched off."""
    if not config.tracking.enabled or not config.tracking.model_name:
        raise ConfigError(
            "the nightly run needs tracking.model_name, the registered model that it is for, and tracking.enabled"
        )
    if re.search(r"[/:\\\0]", config.tracking.model_name) or config.tracking.model_name in (".", ".."):
        raise ConfigError(
            f"tracking.model_name: {config.tracking.model_name!r}: MLflow takes no / and no : in a model's name"
        )
    return Workspace(Path(config.retrain.folder) / config.tracking.model_name)


def read(path: Path) -> dict[str, Any]:
    """A record. ConfigError where it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no record")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return found


def write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
