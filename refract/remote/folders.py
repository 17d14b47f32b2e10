"""Download a folder, such as a bundle, from a URL."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from refract.cache_folder import VARIABLE, cache_folder
from refract.remote import client
from refract.remote.address import checked, scheme_of
from refract.remote.client import RemoteError
from refract.remote.store import RemoteObject

FOLDER = "bundles"
UNUSED_S = 30 * 86_400
"""Seconds after which an unused download is removed."""
MANIFEST = "manifest.json"


def fetched_folder(url: str, *, again: bool = False) -> Path:
    """Return the local copy of a folder. Each version is downloaded once.

    A folder of a web server, which cannot be listed, must have a manifest of its files, as bundles have. again: replace a damaged copy.
    AddressError, RemoteError.
    """
    url = checked(url)
    items = _files_of(url)
    if not items:
        raise RemoteError(f"{url}: no such folder, or it is empty; check the URL")
    return stored(url, versions_of(items), FOLDER, lambda: items, again=again)


def versions_of(items: Sequence[RemoteObject]) -> str:
    """Return a text that differs between versions of the files."""
    return "\n".join(f"{item.url} {item.version} {item.size}" for item in items)


def stored(
    url: str, version: str, kind: str, files: Callable[[], Sequence[RemoteObject]], *, again: bool = False
) -> Path:
    """Return the local copy of files of the folder `url`, which this machine downloads once for each `version`.

    kind: the folder of the cache; files: returns the files, and is called only before a download; again: replace a damaged copy.
    RemoteError.
    """
    root = cache_folder() / kind
    target = root / hashlib.sha256(version.encode()).hexdigest()[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        if again:
            shutil.rmtree(target, ignore_errors=True)
        if not target.is_dir():
            download(url, files(), target)
        os.utime(target)
        _remove_unused(root)
    except OSError as error:
        raise RemoteError(
            f"{url}: cannot be stored in {root} ({error.strerror or error}); set {VARIABLE} to a folder with free space"
        ) from error
    return target


def _files_of(url: str) -> Sequence[RemoteObject]:
    if not scheme_of(url).startswith("http"):
        return client.listed(url)
    try:
        first = client.info(f"{url}/{MANIFEST}")
        manifest = json.loads(client.read(first))
        names = [str(name) for name in manifest["files"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise RemoteError(f"{url}/{MANIFEST}: does not list the files of a bundle; upload the bundle again") from error
    try:
        return [first, *(client.info(f"{url}/{name}") for name in sorted(names))]
    except FileNotFoundError as error:
        raise RemoteError(f"{error.filename}: is listed in {MANIFEST} but missing; upload the bundle again") from error


def download(url: str, items: Sequence[RemoteObject], target: Path) -> None:
    """Download files of the folder `url` to a temporary folder, which is renamed to `target` when it is complete. RemoteError, OSError."""
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for item in items:
            name = item.url.removeprefix(f"{url}/")
            if {"", ".", ".."} & {*name.split("/")}:
                raise RemoteError(f"{item.url}: the name leads out of the folder; rename the file")
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                for block in client.blocks(item):
                    stream.write(block)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process has downloaded it
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_unused(root: Path) -> None:
    before = time.time() - UNUSED_S
    for folder in root.iterdir():
        with suppress(FileNotFoundError):  # another process has renamed its temporary folder
            if folder.stat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)
