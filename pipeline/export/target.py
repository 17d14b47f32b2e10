"""The interface of an export target: what it writes, and how its own runtime computes it."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refract.errors import InputError
from refract.models.bundle.bundle import Bundle
from refract.models.conversion.deployable import Deployable

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""uint8 N×H×W×3, as the preprocessing returns it → float32 (probabilities N×C, logits N×C)."""


class ExportError(InputError):
    """Raised for a bundle that cannot be exported to a target. The message names the target and what to use instead."""


@dataclass(frozen=True)
class Job:
    """What a target converts.

    network: the bundle's, in eval mode; images: golden images, uint8 N×H×W×3 with N ≥ 2; description: the content of `preprocess.json`;
    calibration: images for the ranges of 8-bit integers, uint8 M×H×W×3, None for float32. runtime: name → content of the files of the
    runtime that the export contains.
    """

    bundle: Bundle
    network: Deployable
    images: np.ndarray
    description: Mapping[str, Any]
    calibration: np.ndarray | None = None
    runtime: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A format of exports.

    write: (job, empty folder) → writes the model. run: (folder, its description) → opens the model with its own runtime.
    packages: what both need, with `extra` of Refract that installs them. model: the file that holds the network, with `{name}` for the
    bundle's name. input: what the network takes, for `preprocess.json`. int8: whether it can be in 8-bit integers. unfit: returns why the
    target cannot hold this bundle, None if it can. runtime: (`--runtime`, None without) → name → content of the files of a runtime that
    the export contains.
    """

    name: str
    write: Callable[[Job, Path], None]
    run: Callable[[Path, Mapping[str, Any]], Run]
    model: str
    input: Mapping[str, Any]
    packages: tuple[str, ...] = ()
    extra: str = ""
    int8: bool = False
    unfit: Callable[[Bundle], str | None] = lambda bundle: None
    runtime: Callable[[Path | None], Mapping[str, bytes]] | None = None

    def check_installed(self) -> None:
        """Raise ExportError if a package is missing."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ExportError(f"--to {self.name} needs the package {missing[0]}: pip install 'refract[{self.extra}]'")


PIXELS: Mapping[str, Any] = {"name": "images", "dtype": "uint8", "layout": "NHWC", "color": "RGB", "range": [0, 255]}
"""The input of a network with normalisation inside."""


METADATA = (
    "name", "task", "labels", "thresholds", "temperature", "abstain_below", "preprocess", "bundle", "created_by",
)  # fmt: skip
"""Keys of `preprocess.json` that are also in the model's own metadata."""


def metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of a model's metadata, as text: strings as they are, other values as JSON."""
    return {
        name: value if isinstance(value := description[name], str) else json.dumps(value, ensure_ascii=False)
        for name in METADATA
    }
