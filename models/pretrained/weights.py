"""Load weights from a file, a folder or a URL into a network. All keys outside the head must fit.

Reads `.safetensors`, and `.pt`/`.pth`/`.bin` without executing code from a pickle. Independent of the networks' names.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from refract.models.head import class_parameters
from refract.models.multimodal.former_names import present_name
from refract.models.pretrained.weights_files import (
    BUNDLE_RECORD,
    FOLDER_FILES,
    PROCESSOR_RECORD,
    SUFFIXES,
    TIMM_RECORD,
    weights_file,
    weights_folder,
)
from refract.remote.address import is_remote

# Prefixes of keys from torch.compile, DDP, common training modules, and Refract's Classifier and ClassifierModule.
_PREFIXES = ("_orig_mod.", "module.", "model.", "network.", "classifier.")
# The classifier's normalisation in a bundle's weights, and auxiliary heads, which Refract does not build.
_EXPENDABLE = frozenset({"mean", "std", "mean_image", "whitening", "aux1", "aux2", "AuxLogits"})

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_weights`. loaded, reinitialised: keys of the network and of its fresh head; skipped: unused keys of the file."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    reinitialised: tuple[str, ...]


def load_weights(
    network: nn.Module, head: nn.Module, path: str | Path, head_rows: Sequence[int | None] | None = None
) -> LoadReport:
    """Load the file's state dict into `network`, in place; keep the values of `head` if its shapes differ. Logs the skipped and fresh keys.

    head_rows: for each class its row in the head of the file, None for a new class, whose row becomes the mean of the file's rows: its
    logit is then the mean of the others, wherever a softmax shifts them. Without head_rows the classes are those of the file.
    path: a file, a folder with one of FOLDER_FILES, or a URL, see `refract.models.pretrained.weights_files`. If the first convolution has
    another number of input channels than in the file, its weights are averaged over the channels and repeated (Wightman 2019, timm).
    ValueError for another kind of file, an unreadable file, or keys outside the head that do not fit (the message names the first few);
    FileNotFoundError if the file is missing.
    """
    return load_tensors(network, head, read_weights(path), path, head_rows)


def load_tensors(
    network: nn.Module,
    head: nn.Module,
    tensors: Mapping[str, Tensor],
    path: str | Path,
    head_rows: Sequence[int | None] | None = None,
) -> LoadReport:
    """Load the tensors of `path` as `load_weights` does. path: only for the log and the errors."""
    expected = network.state_dict()
    weights = {_clean(key, expected): tensor for key, tensor in tensors.items()}
    _adapt_channels(network, weights, expected)
    if head_rows is not None:
        _arrange_rows(network, weights, head_rows)
    head_ids = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()}
    head_keys = [key for key, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in head_ids]
    if all(_fits(weights, key, expected[key]) for key in head_keys):
        head_keys = []
    head_prefix = _prefix(network, head)
    report = LoadReport(
        loaded=tuple(k for k in expected if k not in head_keys and _fits(weights, k, expected[k])),
        skipped=tuple(k for k in weights if k not in expected or k in head_keys),
        reinitialised=tuple(head_keys),
    )
    _check(report, weights, expected, head_prefix, path)
    network.load_state_dict({key: weights[key] for key in report.loaded}, strict=False)
    log.info(
        "weights from %s: %d tensors loaded; skipped: %s; freshly initialised: %s",
        path,
        len(report.loaded),
        ", ".join(report.skipped) or "none",
        ", ".join(report.reinitialised) or "none",
    )
    return report


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file to the CPU; from a checkpoint those under "state_dict" or "model".

    path and errors: as in `load_weights`, for everything that does not concern the network.
    """
    source, path = str(path), weights_file(str(path))
    if any((path / "bundle" / name).is_file() for name in FOLDER_FILES):
        raise ValueError(f"weights={source!r} is a run's folder; did you mean {str(path / 'bundle')!r}?")
    if path.suffix not in SUFFIXES:
        missing = "" if path.exists() else "the path does not exist; "
        raise ValueError(
            f"weights={str(path)!r}: {missing}expected 'none', 'default', a URL such as hf://OWNER/NAME, "
            f"a folder with {' or '.join(FOLDER_FILES)}, or a path that ends in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: the file does not exist; check the path")
    try:
        content: Any = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    # torch's readers of old formats raise many kinds of exceptions for damaged files.
    except Exception as err:
        if is_remote(source):  # an incomplete download: the next attempt downloads the file again
            path.unlink(missing_ok=True)
        raise ValueError(f"weights={str(path)!r} cannot be read as plain tensors: {err}") from err
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights={str(path)!r}: expected a state dict, a dict of names to tensors")
    return dict(content)


def folder_preprocess(source: str) -> dict[str, Any] | None:
    """Read {"mean", "std"} of the training of weights, from the folder `source` or the folder of the file `source`.

    The record is a bundle's `bundle.json`, Hugging Face's `preprocessor_config.json` or timm's `config.json`. A bundle with another
    normalisation than `channel` adds {"normalize"}; timm's config adds {"image_size": [height, width]}.
    None if these files are missing, or have no numbers for each channel.
    """
    folder = weights_folder(source)
    for name, section, mean, std in (
        (BUNDLE_RECORD, "preprocess", "mean", "std"),
        (PROCESSOR_RECORD, None, "image_mean", "image_std"),
        (TIMM_RECORD, "pretrained_cfg", "mean", "std"),
    ):
        try:
            record: Any = json.loads((folder / name).read_text("utf-8"))
            values = record if section is None else record[section]
            numbers: dict[str, Any] = {"mean": [float(v) for v in values[mean]], "std": [float(v) for v in values[std]]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if all(len(channels) == 3 for channels in numbers.values()):
            kind = values.get("normalize", "channel")
            if name == TIMM_RECORD and len(size := values.get("input_size") or ()) == 3:
                numbers["image_size"] = [int(side) for side in size[1:]]
            return {**numbers, "normalize": kind} if kind in ("mean_image", "pca", "zca") else numbers
    return None


def folder_arrays(source: str, normalize: str) -> dict[str, Tensor]:
    """Read the arrays that a bundle's weights contain for `normalize`: `mean_image`, `pca` or `zca`, see `refract.models.classifier`.

    ValueError if an array is missing or the weights cannot be read.
    """
    weights = read_weights(source)
    needed = ("mean_image",) if normalize == "mean_image" else ("mean_image", "whitening")
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"weights={source!r}: bundle.json says {normalize}, but the array {missing[0]} is missing")
    return {name: weights[name] for name in needed}


def _adapt_channels(network: nn.Module, weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Convert the first convolution in `weights` to the network's number of input channels, in place."""
    first = next((f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)), "")
    if first not in weights or first not in expected or weights[first].ndim != 4:
        return
    kernel, target = weights[first], expected[first]
    if (
        kernel.shape[1] != target.shape[1]
        and kernel.shape[0] == target.shape[0]
        and kernel.shape[2:] == target.shape[2:]
    ):
        log.info("weights: the first layer has %d input channels; converted to %d", kernel.shape[1], target.shape[1])
        weights[first] = kernel.sum(dim=1, keepdim=True).expand_as(target) / target.shape[1]


def _arrange_rows(network: nn.Module, weights: dict[str, Tensor], rows: Sequence[int | None]) -> None:
    """Arrange the rows of the head in `weights`, in place. A head of another kind, which lacks these keys, is not changed."""
    ids = {id(parameter) for parameter in class_parameters(network)}
    count = max((row + 1 for row in rows if row is not None), default=1)
    for key in [name for name, parameter in network.named_parameters() if id(parameter) in ids]:
        stored = weights.get(key)
        if stored is not None and stored.ndim and len(stored) >= count:
            weights[key] = torch.stack([stored.mean(dim=0) if row is None else stored[row] for row in rows])


def _clean(key: str, expected: Mapping[str, Tensor]) -> str:
    """Return the network's own key: without prefixes that its keys do not have, and under its present name. A key that the network does not
    have at all stays unchanged."""
    names = (present_name(shortened, expected) for shortened in _shortened(key))
    return next((name for name in names if name in expected), key)


def _shortened(key: str) -> Iterator[str]:
    """Yield the key, then the key without its first prefix, its second and so on: `classifier` may also be the name of a network's head."""
    yield key
    while (prefix := next((p for p in _PREFIXES if key.startswith(p)), None)) is not None:
        key = key.removeprefix(prefix)
        yield key


def _expendable(key: str, head_prefix: str) -> bool:
    """Return whether the key belongs to the classifier's normalisation, an auxiliary head, or another kind of head."""
    return any(
        shortened.partition(".")[0] in _EXPENDABLE or (head_prefix and shortened.startswith(head_prefix))
        for shortened in _shortened(key)
    )


def _fits(weights: Mapping[str, Tensor], key: str, expected: Tensor) -> bool:
    return key in weights and weights[key].shape == expected.shape


def _prefix(network: nn.Module, head: nn.Module) -> str:
    """Return the prefix of the head's keys; "" if the head is not a single module of the network."""
    return next((f"{name}." for name, module in network.named_modules() if module is head and name), "")


def _check(
    report: LoadReport,
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    head_prefix: str,
    path: str | Path,
) -> None:
    misfits = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(tensor.shape)}" if key in weights else f"{key} missing"
        for key, tensor in expected.items()
        # Files from before PyTorch 0.4.1 do not have this counter, and only a batch norm without momentum reads it.
        if key not in {*report.loaded, *report.reinitialised} and not key.endswith("num_batches_tracked")
    ]
    unknown = [f"{key} unknown" for key in report.skipped if key not in expected and not _expendable(key, head_prefix)]
    if not report.loaded:
        raise ValueError(
            f"weights={str(path)!r}: no key fits the network; the file starts with {list(weights)[:3]}{_network_hint(path)}"
        )
    if differing := misfits + unknown:
        shown = ", ".join(differing[:5])
        raise ValueError(
            f"weights={str(path)!r} belongs to another network: {len(differing)} keys outside the head differ: "
            f"{shown}{_network_hint(path)}"
        )


def _network_hint(path: str | Path) -> str:
    """Return the end of an error message: the config that builds the network of a bundle or of a folder of timm; "" without a record."""
    folder = weights_folder(str(path))
    try:
        network = json.loads((folder / BUNDLE_RECORD).read_text("utf-8"))["network"]
        args, size = json.dumps(network["args"]), json.dumps(network["image_size"])
        return f"; the bundle's network is model.name: {network['name']}, model.args: {args}, data.image_size: {size}"
    except (OSError, ValueError, KeyError, TypeError):
        name = timm_network(folder)
        return f"; the folder's network is model.name: {name}" if name else ""


def timm_network(folder: Path) -> str | None:
    """Return the network that timm's config.json in the folder names, as model.name; None without one."""
    try:
        return f"timm/{json.loads((folder / TIMM_RECORD).read_text('utf-8'))['architecture']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
