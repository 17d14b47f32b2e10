"""Object stores through fsspec: S3, Google Cloud Storage and Azure Blob Storage."""

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    "gs": {"requests_timeout": _READ_S},
    "az": {"connection_timeout": _CONNECT_S, "read_timeout": _READ_S},
}
_ANONYMOUS = (
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
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
            self._files().put_file(str(path), url, **({"overwrite": True} if self.scheme == "az" else {}))

    def remove(self, url: str) -> None:
        with _errors_of(url):
            self._files().rm_file(url)

    def _files(self) -> Any:
        if self._pid != os.getpid():  # connections do not survive a fork
            self._filesystem, self._pid = _filesystem(self.scheme), os.getpid()
        return self._filesystem

    def _object(self, url: str, entry: Mapping[str, Any]) -> RemoteObject:
        version, md5 = _version(entry)
        return RemoteObject(url, int(entry["size"]), version, f"md5:{md5}" if md5 else "")


def _version(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return (a text that changes with the content, the MD5 of the content in hexadecimal or "")."""
    tags = (entry.get(name) for name in ("generation", "ETag", "etag", "LastModified", "last_modified"))
    tag = str(next((value for value in tags if value), "")).strip('"')
    if entry.get("md5Hash"):  # of Google, absent for composed objects
        return tag, base64.b64decode(entry["md5Hash"]).hex()
    if stored := (entry.get("content_settings") or {}).get("content_md5"):  # of Azure
        return tag, bytes(stored).hex()
    return tag, tag if re.fullmatch(r"[0-9a-f]{32}", tag) else ""  # of S3, for objects in one part


def _filesystem(scheme: str) -> Any:
    """Return fsspec's file system of a scheme, which tries each request once: `refract.remote.client` repeats it."""
    extra = SCHEMES[scheme]
    try:
        kind = _google() if scheme == "gs" else _registered(scheme)
    except ImportError as error:
        raise RefusedError(
            f"{scheme}:// needs the extra {extra!r}; install it with: pip install 'refract[{extra}]'"
        ) from error
    options = {"use_listings_cache": False, "skip_instance_cache": True, **_OPTIONS.get(scheme, {})}
    try:
        filesystem = kind(**options)
    except ValueError as error:  # adlfs, without an account
        raise RefusedError(f"{scheme}://: no credentials ({error}); set {credentials_of(f'{scheme}://')}") from error
    if scheme == "s3":
        filesystem.retries = 1
    if scheme == "az":
        with suppress(AttributeError):  # of a version with other names, which repeats requests itself, too
            filesystem.service_client._config.retry_policy.total_retries = 0
    return filesystem


def _registered(scheme: str) -> Any:
    import fsspec

    return fsspec.get_filesystem_class(scheme)


def _google() -> Any:
    """Return the class for gs:// that fsspec's extends: fsspec's asks for the kind of the bucket before each request."""
    from gcsfs.core import GCSFileSystem

    class Once(GCSFileSystem):
        # The method without its decorator, which repeats it.
        _request = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)

    return Once


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
        if getattr(error, "code", None) in (401, 403):  # of gcsfs
            raise RefusedError(f"{url}: access denied; check the name, and {credentials_of(url)}") from error
        if type(error).__name__ in _ANONYMOUS:
            raise RefusedError(f"{url}: no credentials; set {credentials_of(url)}") from error
        raise
