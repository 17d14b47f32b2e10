"""The content of remote files: each version of a file is fetched once, into the cache.

A process reads one version of each file: the one that was listed, or else the one of the first access. Child processes use the listings of
their parents.
"""

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from io import FileIO

from refract.pipeline.data import cache
from refract.remote import client
from refract.remote.store import RemoteObject

_TOKEN = "REFRACT_LISTINGS"
"""Environment variable with the name of a process' listings, which its child processes inherit."""
_SHA256 = 32

_versions: dict[str, RemoteObject] = {}
"""URL → the version that this process reads."""
_listed: set[str] = set()
"""The URLs of `_versions` that a listing has."""
_searched: set[str] = set()
"""The folders whose listings of a parent process were looked up."""
_lock = threading.Lock()


def list_files(url: str) -> Sequence[RemoteObject]:
    """List the files below a folder. This process and its children then read these versions. RemoteError if it cannot be listed."""
    items = client.listed(url)
    with _lock:
        _versions.update((item.url, item) for item in items)
        _listed.update(item.url for item in items)
    token = os.environ.setdefault(_TOKEN, uuid.uuid4().hex)
    data = "\n".join(json.dumps(item) for item in items).encode()
    cache.removed("listings", f"{token} {url.rstrip('/')}")
    cache.opened("listings", f"{token} {url.rstrip('/')}", lambda entry: entry.write(data), title=url).close()
    return items


def is_listed(url: str) -> bool:
    """Return whether a listing of this process or of a parent process has the file."""
    if url not in _listed:
        for folder in _folders_above(url):
            _read_listing(folder)
    return url in _listed


def version_of(url: str) -> RemoteObject:
    """Return the version of a file that this process reads. FileNotFoundError, RemoteError."""
    if known_version(url) is None:
        item = client.info(url)
        with _lock:
            _versions.setdefault(url, item)
    return _versions[url]


def known_version(url: str) -> RemoteObject | None:
    """Return the version of a file that this process reads, if it is known without a request."""
    return _versions[url] if url in _versions or is_listed(url) else None


def is_cached(url: str) -> bool:
    """Return whether the cache has the version of a file that this process reads."""
    item = known_version(url)
    return item is not None and any(cache.contains(kind, _key(item)) for kind in ("objects", "files"))


def whole_file(url: str) -> tuple[FileIO, str]:
    """Return (the file in the cache, its identity), for files that are read in parts. FileNotFoundError, RemoteError, CacheError."""
    item = version_of(url)

    def write(entry: cache.Writer) -> None:
        for block in client.blocks(item):
            entry.write(block)

    return cache.opened("files", _key(item), write, title=url), _key(item)


def content(url: str) -> bytes:
    """Return the content of a small file, verified by its checksum in the cache."""
    item = version_of(url)

    def write(entry: cache.Writer) -> None:
        data = client.read(item)
        entry.write(hashlib.sha256(data).digest() + data)

    for _ in range(2):
        with cache.opened("objects", _key(item), write, title=url, sync=False) as file:
            stored = file.readall()
        digest, data = stored[:_SHA256], stored[_SHA256:]
        if hashlib.sha256(data).digest() == digest:
            return data
        cache.removed("objects", _key(item))  # a damaged disk, or a crash of the machine
    raise cache.CacheError(
        f"{url}: the cache {cache.folder()} returns damaged data; set {cache.FOLDER} to another disk"
    )


def _key(item: RemoteObject) -> str:
    return f"{item.url} {item.version} {item.size}"


def _folders_above(url: str) -> Iterator[str]:
    scheme, _, path = url.partition("://")
    parts = path.split("/")
    return (f"{scheme}://{'/'.join(parts[:count])}" for count in range(1, len(parts)))


def _read_listing(folder: str) -> None:
    """Read the listing of a parent process, once."""
    if folder in _searched:
        return
    token = os.environ.get(_TOKEN, "")
    data = cache.content("listings", f"{token} {folder}") if token else None
    if data:
        items = [RemoteObject(*json.loads(line)) for line in data.decode().splitlines()]
        with _lock:
            for item in items:
                _versions.setdefault(item.url, item)
                _listed.add(item.url)
    _searched.add(folder)  # last: a thread that finds the folder here finds its versions too
