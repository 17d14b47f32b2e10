"""What a kind of remote storage does: one attempt of each operation. `refract.remote.client` repeats them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class RemoteObject(NamedTuple):
    """A file at a URL. size: bytes, or -1 if unknown; version: changes with the content; checksum: `md5:`, `sha256:` or `git:` and
    hexadecimal digits, or "" if unknown."""

    url: str
    size: int
    version: str
    checksum: str = ""


class ChangedError(OSError):
    """Raised if an object is not the version that is read."""


class RefusedError(OSError):
    """Raised if another attempt would fail too, such as without credentials. The message is complete."""


class Store(Protocol):
    """One attempt of each operation. FileNotFoundError for a missing object, RefusedError; other errors may be temporary."""

    def info(self, url: str) -> RemoteObject: ...

    def list(self, url: str) -> Sequence[RemoteObject]:
        """List the objects below a folder at any depth."""

    def read(self, item: RemoteObject, start: int) -> Iterator[bytes]:
        """Yield the content from the byte `start` on. ChangedError if the object has another version."""

    def upload(self, path: Path, url: str) -> None: ...

    def remove(self, url: str) -> None: ...
