"""Read, list and write remote files, with repeated attempts. Errors name the URL and the cause, without credentials."""

import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from refract.errors import ServiceError
from refract.models.credentials import masked
from refract.remote.address import checked, scheme_of
from refract.remote.hub import HubFiles
from refract.remote.hub import pinned as pinned_once
from refract.remote.object_store import ObjectStore
from refract.remote.store import ChangedError, RefusedError, RemoteObject, Store
from refract.remote.web import WebFiles

log = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 10.0
"""Seconds before the second attempt, which double with each further one, and their bound."""

UNMEASURED = 1 << 30
"""Bytes of the largest file without a known size that is held in memory."""

_T = TypeVar("_T")

STORES: Mapping[str, Callable[[str], Store]] = MappingProxyType(
    {"s3": ObjectStore, "gs": ObjectStore, "az": ObjectStore, "hf": HubFiles, "https": WebFiles, "http": WebFiles}
)
"""Scheme → class."""


class RemoteError(ServiceError):
    """Raised if a remote file cannot be read or written: after all attempts, or without credentials."""


@cache
def _store(scheme: str) -> Store:
    return STORES[scheme](f"{scheme}://")


def store_of(url: str) -> Store:
    """Return the store of a URL."""
    return _store(scheme_of(url))


def info(url: str) -> RemoteObject:
    """Look up a file. FileNotFoundError if there is none, RemoteError if that is unknown."""
    checked(url)
    return _repeated(url, lambda: store_of(url).info(url))


def pinned(url: str) -> str:
    """Return a URL of the Hub with the present commit in place of the branch or tag. RemoteError if that is unknown."""
    checked(url)
    return _repeated(url, lambda: pinned_once(url))


def exists(url: str) -> bool:
    """Return whether there is a file. RemoteError if that is unknown."""
    try:
        info(url)
    except FileNotFoundError:
        return False
    return True


def listed(url: str) -> list[RemoteObject]:
    """Return the files below a folder at any depth, sorted by URL; [] for none. RemoteError if it cannot be listed."""
    checked(url)
    try:
        return sorted(_repeated(url, lambda: store_of(url).list(url)))
    except FileNotFoundError:
        return []


def blocks(item: RemoteObject) -> Iterator[bytes]:
    """Yield the content of a file, and resume a cut transfer where it ended.

    FileNotFoundError if the file is gone. RemoteError if its content is not that of `item`, or after all attempts without a byte more.
    """
    digest, done, attempt = _digest(item), 0, 0
    while True:
        before = done
        try:
            for block in store_of(item.url).read(item, done):
                digest.update(block)
                done += len(block)
                if 0 <= item.size < done:  # before an endless response fills the memory
                    raise ChangedError(item.url)
                yield block
            if done < item.size:
                raise ConnectionError(f"the transfer ended after {done:,} of {item.size:,} bytes")
            break
        except FileNotFoundError:
            raise
        except Exception as error:  # the libraries raise many types for a failed connection
            attempt = 1 if done > before else attempt + 1
            _wait_or_raise(item.url, error, attempt)
    differs = bool(item.checksum) and digest.hexdigest() != item.checksum.partition(":")[2]
    if differs and item.checksum.startswith("md5:"):
        # An ETag of an object that an S3 server encrypts looks like an MD5 and is none.
        differs = info(item.url).version != item.version
    if differs or (item.size >= 0 and done != item.size):
        raise changed(item.url)


def _digest(item: RemoteObject) -> "hashlib._Hash":
    """Return the digest of the item's checksum, to which its content is added."""
    kind = item.checksum.partition(":")[0]
    if kind == "git":  # which hashes the size too
        return hashlib.sha1(f"blob {item.size}\0".encode(), usedforsecurity=False)
    return hashlib.sha256() if kind == "sha256" else hashlib.md5(usedforsecurity=False)


def read(item: RemoteObject) -> bytes:
    """Return the content of a file. Raises as `blocks`, and RemoteError for a response of unknown size that may be endless."""
    parts, size = list[bytes](), 0
    for block in blocks(item):
        parts.append(block)
        size += len(block)
        if item.size < 0 and size > UNMEASURED:
            raise RemoteError(
                f"{masked(item.url)}: the server names no size and sent more than {UNMEASURED:,} bytes; check the URL, "
                "or copy the file to another server"
            )
    return b"".join(parts)


def upload(path: Path, url: str) -> RemoteObject:
    """Write a local file to a URL. RemoteError if it cannot be written."""
    checked(url)
    try:
        _repeated(url, lambda: store_of(url).upload(path, url))
        item = info(url)
    except FileNotFoundError as error:
        if not path.exists():
            raise
        raise RemoteError(f"{url}: there is no such bucket; check the URL, or create the bucket") from error
    if item.size != path.stat().st_size:
        raise RemoteError(
            f"{url}: has {item.size:,} bytes after the upload of {path.stat().st_size:,}; upload {path} again"
        )
    return item


def remove(url: str) -> None:
    """Delete a file, if it exists. RemoteError if it cannot be deleted."""
    checked(url)
    with suppress(FileNotFoundError):
        _repeated(url, lambda: store_of(url).remove(url))


def changed(url: str) -> RemoteError:
    """Return the error for a file whose content is not the one that was looked up."""
    return RemoteError(f"{masked(url)}: has changed while it was in use; run the command again")


def _repeated(url: str, attempt_once: Callable[[], _T]) -> _T:
    attempt = 0
    while True:
        try:
            return attempt_once()
        except FileNotFoundError:
            raise
        except Exception as error:  # the libraries raise many types for a failed connection
            attempt += 1
            _wait_or_raise(url, error, attempt)


def _wait_or_raise(url: str, error: Exception, attempt: int) -> None:
    """Wait before the next attempt. RemoteError after the last one, and for an error that stays."""
    if isinstance(error, ChangedError):
        raise changed(url) from error
    if isinstance(error, RefusedError):
        raise RemoteError(masked(str(error))) from error
    cause = masked(str(error)) or type(error).__name__
    if attempt >= ATTEMPTS:
        raise RemoteError(
            f"{masked(url)}: failed {attempt} times, at last with {type(error).__name__}: {cause}; check the network, then try "
            "again"
        ) from error
    delay = min(FIRST_DELAY_S * 2 ** (attempt - 1), LONGEST_DELAY_S) * random.uniform(0.8, 1.2)
    log.debug("%s: attempt %d of %d failed (%s); the next one in %.1f s", masked(url), attempt, ATTEMPTS, cause, delay)
    time.sleep(delay)
