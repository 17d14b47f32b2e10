"""One training of the benchmark as its contenders receive it."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """manifest: a CSV with path, label, split (train, val, test); weights: a .safetensors file of timm's `network`, trained with mean and
    std; size: pixels; mode: one of Refract's `model.mode`; settings: further `key=value` of Refract's config."""

    manifest: str
    weights: str
    network: str
    mode: str
    seed: int
    epochs: int = 4
    size: int = 224
    batch_size: int = 32
    mean: float = 0.5
    std: float = 0.5
    settings: tuple[str, ...] = ()

    def rows(self, split: str) -> list[tuple[str, str]]:
        """(path, label) of a split, in the manifest's order."""
        import pandas as pd

        table = pd.read_csv(self.manifest, dtype=str)
        return list(table.loc[table["split"] == split, ["path", "label"]].itertuples(index=False, name=None))

    def labels(self) -> list[str]:
        return sorted({label for _, label in self.rows("train")})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def given() -> Task:
    """The task that the parent process passes as the one argument."""
    values = json.loads(sys.argv[1])
    return Task(**values | {"settings": tuple(values["settings"])})


def answer(accuracy: float) -> None:
    print(json.dumps({"accuracy": accuracy}))


def state(weights: str | Path) -> dict:
    """The backbone's tensors: a head for other classes is of no use."""
    from safetensors.torch import load_file

    return {key: value for key, value in load_file(weights).items() if not key.startswith("classifier.")}
