"""The file of weights that `model.weights` names: a file, a folder, or a URL, which this machine downloads once.

http(s) URLs are downloaded to torch hub's cache; s3://, gs://, az:// and hf:// to Refract's, with the records of the preprocessing.
"""

import hashlib
import http.client
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch

from refract.models.credentials import MASK, masked
from refract.remote.address import checked, is_remote

if TYPE_CHECKING:
    from refract.remote.store import RemoteObject

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "weights.safetensors")
"""Names of the weights in a folder: Hugging Face's two names, and the name in Refract's bundles."""

BUNDLE_RECORD, PROCESSOR_RECORD, TIMM_RECORD = RECORDS = ("bundle.json", "preprocessor_config.json", "config.json")
"""Files next to the weights that describe their preprocessing or network: Refract's, Hugging Face's and timm's."""

CACHE = "weights"
"""The folder in Refract's cache."""


def weights_file(source: str) -> Path:
    """Return the local path of the file: in a folder one of FOLDER_FILES, for a URL the local copy.

    A local path is not checked. ValueError if a download fails or the URL has no such file; AddressError or RemoteError for s3://, gs://,
    az:// and hf://.
    """
    if is_web(source):
        return _from_web(source)
    path = _from_store(source) if is_remote(source) else Path(source)
    inside = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    return inside[0] if inside else path


def weights_folder(source: str) -> Path:
    """Return the local folder that may have RECORDS of the weights. Raises as `weights_file`."""
    path = _from_store(source) if is_remote(source) and not is_web(source) else Path(source)
    return path.parent if path.suffix in SUFFIXES else path


def is_web(source: str) -> bool:
    """Return whether `source` is an http(s) URL."""
    return re.match(r"https?://", source) is not None


def is_on_hub(source: str) -> bool:
    """Return whether `source` is a URL of the Hugging Face Hub."""
    return source.startswith("hf://")


def pinned(url: str) -> str:
    """Return a URL of the Hub with the present commit in place of the branch or tag. RemoteError."""
    from refract.remote import client

    try:
        return client.pinned(url)
    except client.RemoteError as error:
        raise client.RemoteError(
            f"{error}. Without the Hub, set model.weights to a downloaded file or folder"
        ) from error


def _from_store(url: str) -> Path:
    """Return the local copy of a file, or of a folder with the first of FOLDER_FILES; with those of RECORDS next to it."""
    from refract.remote.folders import stored, versions_of

    url = pinned(url) if is_on_hub(url) else checked(url)
    is_file = PurePosixPath(url.partition("?")[0]).suffix in SUFFIXES
    folder, name = url.rsplit("/", 1) if is_file else (url, "")

    def files() -> "list[RemoteObject]":
        weights = _existing(folder, [name] if is_file else FOLDER_FILES)[:1]
        if not weights:
            missing = "no such file" if is_file else f"the folder has none of {', '.join(FOLDER_FILES)}"
            raise ValueError(f"weights={url!r}: {missing}; check the URL")
        records = _existing(folder, RECORDS)
        if not is_file and any(record.url.endswith(f"/{BUNDLE_RECORD}") for record in records):
            raise ValueError(
                f"weights={url!r}: is a bundle, whose labels only a local folder keeps; download it and name its folder"
            )
        return weights + records

    # A commit does not change. A listing would need the network again.
    version = url if is_on_hub(url) else versions_of(files())
    copy = stored(folder, version, CACHE, files)
    if not any((copy / weights).is_file() for weights in ([name] if is_file else FOLDER_FILES)):  # removed, or damaged
        copy = stored(folder, version, CACHE, files, again=True)
    return copy / name


def _existing(folder: str, names: Sequence[str]) -> "list[RemoteObject]":
    """Return those of the remote files that exist, in order."""
    from refract.remote import client

    items = []
    for name in names:
        try:
            items.append(client.info(f"{folder}/{name}"))
        except FileNotFoundError:
            continue
    return items


def _from_web(url: str) -> Path:
    """Download the file unless it is cached. Returns its path. ValueError if the download fails.

    The cached name includes a hash of the URL, so that two files with the same name do not collide. A run stores a URL with its
    credentials masked. A link from the masked URL to the latest download lets the run resume.
    """
    name = Path(urllib.parse.urlparse(url).path).name
    if Path(name).suffix not in SUFFIXES:
        raise ValueError(f"weights={masked(url)!r}: expected the URL of a file that ends in {', '.join(SUFFIXES)}")
    target, masked_target = _cached(url, name), _cached(masked(url), name)
    if MASK in url and not target.is_file():
        raise ValueError(
            f"weights={url!r}: the run did not store the URL's credentials, and the cache has no copy; "
            "download the file and set weights to its path"
        )
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # torch hub writes to a temporary file and renames it.
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except (OSError, http.client.HTTPException) as err:
            raise ValueError(f"weights={masked(url)!r} cannot be downloaded: {err}") from err
    if masked_target != target:
        link = masked_target.with_name(f".{masked_target.name}.{os.getpid()}")
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(masked_target)
    return target


def _cached(url: str, name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
