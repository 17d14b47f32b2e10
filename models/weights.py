"""Weights from a file into a network: all but the head must fit, a head for other classes is left as it is.

Reads `.safetensors`, and `.pt`/`.pth` without running what a pickle may carry. Knows nothing of networks' names.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth")

# What torch.compile, DDP, other people's training modules and Refract's own Classifier and module put before the keys.
_PREFIXES = ("_orig_mod.", "module.", "model.", "network.", "classifier.")
# The classifier's normalisation in a bundle's weights; auxiliary heads, which are off here.
_EXPENDABLE = frozenset({"mean", "std", "mean_image", "whitening", "aux1", "aux2", "AuxLogits"})

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """Keys of the network that were loaded, keys of the file that were left out, keys of the head that start afresh."""

    loaded: tuple[str, ...]
    left_out: tuple[str, ...]
    reinitialised: tuple[str, ...]


def load_weights(network: nn.Module, head: nn.Module, path: str | Path) -> LoadReport:
    """Load the file's state dict into `network`, in place; keep `head` as it is when its shapes differ. Logs one line.

    ValueError for another kind of file, one that cannot be read, or one that does not fit outside the head (names the
    first few keys); FileNotFoundError if there is none.
    """
    given, expected = read_weights(path), network.state_dict()
    found = {_clean(key, expected): tensor for key, tensor in given.items()}
    own = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()}
    head_keys = [key for key, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in own]
    if all(_fits(found, key, expected[key]) for key in head_keys):
        head_keys = []
    report = LoadReport(
        loaded=tuple(k for k in expected if k not in head_keys and _fits(found, k, expected[k])),
        left_out=tuple(k for k in found if k not in expected or k in head_keys),
        reinitialised=tuple(head_keys),
    )
    _check(report, found, expected, path)
    network.load_state_dict({key: found[key] for key in report.loaded}, strict=False)
    log.info(
        "weights from %s: %d tensors loaded; left out: %s; freshly initialised: %s",
        path,
        len(report.loaded),
        ", ".join(report.left_out) or "none",
        ", ".join(report.reinitialised) or "none",
    )
    return report


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file on the CPU; of a checkpoint those under "state_dict" or "model". Raises the same."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"weights={str(path)!r}: expected 'none', 'default', or a path that ends in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file")
    try:
        content: Any = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (
        Exception
    ) as err:  # torch's readers of old formats stumble over damage in many ways; an OSError too says what it is
        raise ValueError(f"weights={str(path)!r} cannot be read as plain tensors: {err}") from err
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights={str(path)!r}: expected a state dict, names to tensors")
    return dict(content)


def _clean(key: str, expected: Mapping[str, Tensor]) -> str:
    """The key without foreign prefixes, if the network has such a one; else as it is.

    Cut only as far as needed: timm has networks whose own head is named `classifier`.
    """
    cut = key
    while cut not in expected:
        prefix = next((p for p in _PREFIXES if cut.startswith(p)), None)
        if prefix is None:
            return key
        cut = cut.removeprefix(prefix)
    return cut


def _fits(found: Mapping[str, Tensor], key: str, expected: Tensor) -> bool:
    return key in found and found[key].shape == expected.shape


def _check(report: LoadReport, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    faults = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}" if key in found else f"{key} missing"
        for key, tensor in expected.items()
        # Files from before PyTorch 0.4.1 have no such counter, and only a batch norm without momentum reads it.
        if key not in {*report.loaded, *report.reinitialised} and not key.endswith("num_batches_tracked")
    ]
    strange = [
        f"{key} unknown" for key in report.left_out if key not in expected and not _EXPENDABLE & set(key.split("."))
    ]
    if not report.loaded:
        raise ValueError(f"weights={str(path)!r}: no key fits the network; the file begins with {list(found)[:3]}")
    if differing := faults + strange:
        shown = ", ".join(differing[:5])
        raise ValueError(
            f"weights={str(path)!r} is of another network: {len(differing)} keys besides the head differ: {shown}"
        )
