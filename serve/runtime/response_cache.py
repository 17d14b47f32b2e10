"""Keep the outputs of repeated requests in bounded memory, by the content of the request and the model that answered."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from refract.serve.requests.decoding import RequestImages

ENTRY_BYTES = 512
"""Memory of an entry in addition to its outputs, in bytes: its key, tuple and array header."""


class Key(NamedTuple):
    """What determines the outputs of a request. digest: the model's; flipped: test-time augmentation; content: see `content_hash`."""

    digest: str
    flipped: bool
    content: bytes


class Cached(NamedTuple):
    """The outputs of one request, and whether each text was truncated: see `refract.serve.runtime.work.Predictions`."""

    outputs: np.ndarray
    cut: tuple[bool, ...]


class ResponseCache:
    """Holds at most `most_bytes` and removes the least recently used entries first. Use it on one event loop only.

    used_bytes: the memory of all entries.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self.used_bytes = most_bytes, 0
        self._entries: OrderedDict[Key, Cached] = OrderedDict()

    def get(self, key: Key) -> Cached | None:
        """Return the entry of `key`, which becomes the most recently used; None without one."""
        cached = self._entries.get(key)
        if cached:
            self._entries.move_to_end(key)
        return cached

    def put(self, key: Key, cached: Cached) -> None:
        """Store an entry, unless it alone exceeds the limit. Its outputs become read-only."""
        if key in self._entries or _size(cached) > self._most:
            return
        cached.outputs.flags.writeable = False
        self._entries[key] = cached
        self.used_bytes += _size(cached)
        while self.used_bytes > self._most:
            _, oldest = self._entries.popitem(last=False)
            self.used_bytes -= _size(oldest)


def content_hash(images: RequestImages) -> bytes:
    """Return the SHA-256 of the images and texts of a request: files as sent, or pixels with their shape. Their names do not count."""
    digest = hashlib.sha256()
    for part in _parts(images):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _parts(images: RequestImages) -> Iterator[bytes]:
    """Yield a description of the parts, and then each part."""
    present = [data is not None for data in images.encoded]
    shape = None if images.pixels is None else images.pixels.shape
    yield repr((images.number, present, shape, len(images.texts))).encode()
    yield from (data for data in images.encoded if data is not None)
    if images.pixels is not None:
        yield np.ascontiguousarray(images.pixels).tobytes()
    for text in images.texts:  # JSON may contain half a surrogate pair
        yield text.encode("utf-8", "surrogatepass")


def _size(cached: Cached) -> int:
    return cached.outputs.nbytes + ENTRY_BYTES
