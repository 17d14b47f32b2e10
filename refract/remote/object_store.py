"""Object stores through fsspec."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refract.remote.address import SCHEMES, credentials_of, scheme_of
from refract.remote.store import ChangedError, RefusedError, RemoteObject

BLOCK = 16 << 20
"""Bytes of one request, so that a cut transfer repeats at most this much."""
_CONNECT_S, _READ_S = 10, 30
_OPTIONS: Mapping[str, dict[str, Any]] = {
    # `refract.remote.client` repeats requests, with a bound on all attempts together.
    "s3": {
        "config_kwargs": {"connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "retries": {"max_attempts": 0}},
        "max_concurrency": 1,  # else each read of a file looks up its size
    },
}
_ANONYMOUS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
)


class ObjectStore:
    """An object store of fsspec. Independent of its credentials, which the libraries read from the environment."""

    def __init__(self, url: str) -> None:
        self.scheme = scheme_of(url)
        self._pid, self._filesystem = 0, None

    def info(self, url: str) -> RemoteObject:
        with _errors_of(url):
            entry = self._files().info(url)
        if entry.get("type") != "file":
            raise FileNotFoundError(2, "No such file", url)
        return self._object(url, entry)

    def list(self, url: str) -> Sequence[RemoteObject]:
        with _errors_of(url):
            objects = self._files().find(url, detail=True)
        below = url.partition("://")[2].rstrip("/") + "/"
        entries = [(str(entry["name"]), entry) for entry in objects.values() if entry.get("type") == "file"]
        return [
            self._object(f"{self.scheme}://{name}", entry)
            for name, entry in sorted(entries, key=lambda pair: pair[0])
            if name.startswith(below) and not name.endswith("/")
        ]

    def read(self, item: RemoteObject, start: int) -> Iterator[bytes]:
        while start < item.size or (start == item.size == 0):
            whole = start == 0 and item.size <= BLOCK
            limits = {} if whole else {"start": start, "end": min(start + BLOCK, item.size)}
            with _errors_of(item.url):
                data = self._files().cat_file(item.url, **limits)
            # Blocks of two versions must not be mixed: the checksum is that of one version, or the version is looked up again.
            if not (whole and item.checksum) and self.info(item.url).version != item.version:
                raise ChangedError(item.url)
            yield data
            start += len(data)
            if not data:
                return

    def upload(self, path: Path, url: str) -> None:
        with _errors_of(url):
            self._files().put_file(str(path), url)

    def _files(self) -> Any:
        if self._pid != os.getpid():  # connections do not survive a fork
            self._filesystem, self._pid = _filesystem(self.scheme), os.getpid()
        return self._filesystem

    def _object(self, url: str, entry: Mapping[str, Any]) -> RemoteObject:
        tag = str(entry.get("ETag") or entry.get("LastModified") or "").strip('"')
        return RemoteObject(url, int(entry["size"]), tag, f"md5:{tag}" if re.fullmatch(r"[0-9a-f]{32}", tag) else "")


def _filesystem(scheme: str) -> Any:
    extra = SCHEMES[scheme]
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise RefusedError(
            f"{scheme}:// needs the extra {extra!r}; install it with: pip install 'refract[{extra}]'"
        ) from error
    options = {"use_listings_cache": False, "skip_instance_cache": True, **_OPTIONS.get(scheme, {})}
    filesystem = kind(**options)
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1
    return filesystem


@contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Translate the errors that no further attempt would change."""
    try:
        yield
    except RefusedError:
        raise
    except FileNotFoundError as error:
        if error.errno is None:  # its text is the name alone
            raise FileNotFoundError(2, "No such file", url) from error
        raise
    except PermissionError as error:
        raise RefusedError(f"{url}: access denied ({error}); check the name, and {credentials_of(url)}") from error
    except Exception as error:  # of the library, whose classes are imported with it
        if type(error).__name__ in _ANONYMOUS:
            raise RefusedError(f"{url}: no credentials; set {credentials_of(url)}") from error
        raise
