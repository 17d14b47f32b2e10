"""Limits of one request and of all requests together. Independent of HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The size limits of requests. A larger request is rejected before it uses memory.

    max_body_bytes: the bytes of the HTTP body as sent, and after its Content-Encoding is decoded (base64 and multipart framing count).
    max_pixels: height × width of one image, from its header. max_total_pixels: the pixels of all images of a request.
    max_images: images in one request.
    max_held_bytes: the bytes of all bodies in memory, incomplete ones too. The bodies of at most eight shadow requests, and the decoded
    contents of forms and base64, are extra. max_decoding_pixels: the pixels of all images that are being decoded at a time, from their
    headers. body_seconds: until a body must have arrived. ValueError if one is less than 1, or if `max_decoding_pixels` is less than
    `max_pixels`.
    """

    max_body_bytes: int = 20 * MIB
    max_pixels: int = 50_000_000
    max_total_pixels: int = 100_000_000
    max_images: int = 64
    max_held_bytes: int = 512 * MIB
    max_decoding_pixels: int = 400_000_000
    body_seconds: int = 30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Limits.{field.name} is {value!r}; it must be an integer of at least 1")
        if self.max_decoding_pixels < self.max_pixels:
            raise ValueError(
                f"Limits.max_decoding_pixels is {self.max_decoding_pixels}; it must be at least max_pixels={self.max_pixels}"
            )


class OverloadedError(RuntimeError):
    """The server has too much work; try again after `after_s` seconds. code: the machine-readable error code."""

    def __init__(self, message: str, after_s: int = 1, code: str = "overloaded") -> None:
        super().__init__(message)
        self.after_s, self.code = after_s, code


class Budget:
    """Counts the pixels that all threads decode now, and limits them to `limits.max_decoding_pixels`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock, self._held = threading.Lock(), 0

    @contextmanager
    def reserved(self, pixels: int) -> Iterator[None]:
        """Reserve `pixels` until the block ends. OverloadedError if they exceed the budget."""
        with self._lock:
            if self._held + pixels > self.limits.max_decoding_pixels:
                raise OverloadedError(f"{self._held:,} pixels are being decoded already; try again later")
            self._held += pixels
        try:
            yield
        finally:
            with self._lock:
                self._held -= pixels
