"""Weights from a file, a folder or a URL into a network: all but the head must fit, a head for other classes is left as it is.

Reads `.safetensors`, and `.pt`/`.pth`/`.bin` without running what a pickle may carry. Knows nothing of networks' names.
"""

import hashlib
import http.client
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from refract.models.credentials import MASK, masked

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "weights.safetensors")
"""What a folder's weights are called: Hugging Face's two names, and that of Refract's bundles."""

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
    """Load the file's state dict into `network`, in place; keep `head` as it is when its shapes differ. Logs what became of each key.

    path: a file, a folder with one of FOLDER_FILES, or an http(s) URL of a file, which is kept in torch hub's cache. Where the first
    convolution takes another number of channels than the file's, its weights are averaged over them and spread (Wightman 2019, timm).
    ValueError for another kind of file, one that cannot be read, or one that does not fit outside the head (names the
    first few keys); FileNotFoundError if there is none.
    """
    given, expected = read_weights(path), network.state_dict()
    found = {_clean(key, expected): tensor for key, tensor in given.items()}
    _adapt_channels(network, found, expected)
    own = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()}
    head_keys = [key for key, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in own]
    if all(_fits(found, key, expected[key]) for key in head_keys):
        head_keys = []
    below_head = _prefix(network, head)
    report = LoadReport(
        loaded=tuple(k for k in expected if k not in head_keys and _fits(found, k, expected[k])),
        left_out=tuple(k for k in found if k not in expected or k in head_keys),
        reinitialised=tuple(head_keys),
    )
    _check(report, found, expected, below_head, path)
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
    source, path = str(path), _local(str(path))
    if any((path / "bundle" / name).is_file() for name in FOLDER_FILES):
        raise ValueError(f"weights={source!r} is a run; did you mean {str(path / 'bundle')!r}?")
    if path.suffix not in SUFFIXES:
        lost = "" if path.exists() else "there is no such file or folder; "
        raise ValueError(
            f"weights={str(path)!r}: {lost}expected 'none', 'default', a URL, a folder with {' or '.join(FOLDER_FILES)}, or a path that "
            f"ends in {', '.join(SUFFIXES)}"
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
        if _is_url(source):  # a download that was cut short: the next one is tried anew
            path.unlink(missing_ok=True)
        raise ValueError(f"weights={str(path)!r} cannot be read as plain tensors: {err}") from err
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights={str(path)!r}: expected a state dict, names to tensors")
    return dict(content)


def folder_preprocess(source: str) -> dict[str, Any] | None:
    """{"mean", "std"} that the weights in a folder, or a file in it, were trained with: of a bundle's `bundle.json` or Hugging Face's
    `preprocessor_config.json`; and {"normalize"} of a bundle where that is not by channel. None where there is no such record, or it has
    no numbers for each channel."""
    folder = Path(source).parent if Path(source).suffix in SUFFIXES else Path(source)
    for name, section, mean, std in (
        ("bundle.json", "preprocess", "mean", "std"),
        ("preprocessor_config.json", None, "image_mean", "image_std"),
    ):
        try:
            record: Any = json.loads((folder / name).read_text("utf-8"))
            found = record if section is None else record[section]
            numbers = {"mean": [float(v) for v in found[mean]], "std": [float(v) for v in found[std]]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if all(len(values) == 3 for values in numbers.values()):
            kind = found.get("normalize", "channel")
            return {**numbers, "normalize": kind} if kind in ("mean_image", "pca", "zca") else numbers
    return None


def folder_arrays(source: str, normalize: str) -> dict[str, Tensor]:
    """What a bundle's weights hold for `normalize`, that is `mean_image`, `pca` or `zca`: see `refract.models.classifier`. ValueError
    where they do not, or cannot be read."""
    given, needed = read_weights(source), ("mean_image",) if normalize == "mean_image" else ("mean_image", "whitening")
    if lost := [name for name in needed if name not in given]:
        raise ValueError(f"weights={source!r}: bundle.json says {normalize}, but there is no {lost[0]}")
    return {name: given[name] for name in needed}


def _local(source: str) -> Path:
    """The file itself: in a folder the one of FOLDER_FILES, of a URL the copy in torch hub's cache, downloaded first if need be."""
    if _is_url(source):
        return _downloaded(source)
    path = Path(source)
    inside = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    return inside[0] if inside else path


def _is_url(source: str) -> bool:
    return re.match(r"https?://", source) is not None


def _downloaded(url: str) -> Path:
    """ValueError where it cannot be had. The name in the cache tells the URL, so that two files of one name do not meet.

    A URL with credentials is stored masked. The masked URL finds the file that was downloaded last for it, so that a run can resume.
    """
    name = Path(urllib.parse.urlparse(url).path).name
    if Path(name).suffix not in SUFFIXES:
        raise ValueError(f"weights={masked(url)!r}: expected the URL of a file that ends in {', '.join(SUFFIXES)}")
    target, known = _cached(url, name), _cached(masked(url), name)
    if MASK in url and not target.is_file():
        raise ValueError(
            f"weights={url!r}: its credentials were not stored, and the download cache has no copy; download the file"
        )
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # torch hub writes beside and renames.
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except (OSError, http.client.HTTPException) as err:
            raise ValueError(f"weights={masked(url)!r} cannot be downloaded: {err}") from err
    if known != target:
        link = known.with_name(f".{known.name}.{os.getpid()}")
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(known)
    return target


def _cached(url: str, name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"


def _adapt_channels(network: nn.Module, found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fit the file's first convolution, in `found`, to the channels that the network takes."""
    first = next((f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)), "")
    if first not in found or first not in expected or found[first].ndim != 4:
        return
    given, wanted = found[first], expected[first]
    if given.shape[1] != wanted.shape[1] and given.shape[0] == wanted.shape[0] and given.shape[2:] == wanted.shape[2:]:
        log.info("weights: the first layer was trained on %d channels; fitted to %d", given.shape[1], wanted.shape[1])
        found[first] = given.sum(dim=1, keepdim=True).expand_as(wanted) / wanted.shape[1]


def _clean(key: str, expected: Mapping[str, Tensor]) -> str:
    """The key without foreign prefixes, if the network has such a one; else as it is."""
    return next((cut for cut in _cuts(key) if cut in expected), key)


def _cuts(key: str) -> Iterator[str]:
    """The key, and without its foreign prefixes one by one: some networks' own heads are named `classifier`."""
    yield key
    while (prefix := next((p for p in _PREFIXES if key.startswith(p)), None)) is not None:
        key = key.removeprefix(prefix)
        yield key


def _expendable(key: str, below_head: str) -> bool:
    """Of the classifier's normalisation, an auxiliary head, or a head of another kind."""
    return any(
        cut.partition(".")[0] in _EXPENDABLE or (below_head and cut.startswith(below_head)) for cut in _cuts(key)
    )


def _fits(found: Mapping[str, Tensor], key: str, expected: Tensor) -> bool:
    return key in found and found[key].shape == expected.shape


def _prefix(network: nn.Module, head: nn.Module) -> str:
    """What the keys of the head begin with; none where it is no one module."""
    return next((f"{name}." for name, module in network.named_modules() if module is head and name), "")


def _check(
    report: LoadReport,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    below_head: str,
    path: str | Path,
) -> None:
    faults = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}" if key in found else f"{key} missing"
        for key, tensor in expected.items()
        # Files from before PyTorch 0.4.1 have no such counter, and only a batch norm without momentum reads it.
        if key not in {*report.loaded, *report.reinitialised} and not key.endswith("num_batches_tracked")
    ]
    strange = [f"{key} unknown" for key in report.left_out if key not in expected and not _expendable(key, below_head)]
    if not report.loaded:
        raise ValueError(
            f"weights={str(path)!r}: no key fits the network; the file begins with {list(found)[:3]}{_own_network(path)}"
        )
    if differing := faults + strange:
        shown = ", ".join(differing[:5])
        raise ValueError(
            f"weights={str(path)!r} is of another network: {len(differing)} keys besides the head differ: {shown}{_own_network(path)}"
        )


def _own_network(path: str | Path) -> str:
    """What to take for a bundle's weights, to end a message with."""
    try:
        own = json.loads((Path(path) / "bundle.json").read_text("utf-8"))["network"]
        args, size = json.dumps(own["args"]), json.dumps(own["image_size"])
        return f"; the bundle's network is model.name: {own['name']}, model.args: {args}, data.image_size: {size}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
