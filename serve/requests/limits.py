"""What one request may ask for, and all of them together. Knows nothing of HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest request that is answered; anything larger is refused before it costs memory.

    max_body_bytes: of the HTTP body as sent (base64 and multipart framing count); max_pixels: height × width of one
    image, read from its header; max_total_pixels: of all images of a request together; max_images: images in one
    request; max_held_bytes: of the bodies of all requests at a time, as far as they have arrived (those that a shadow is
    asked for, eight at most, come to that, and what was in forms and base64); max_decoding_pixels: of all
    images that are being decoded at a time, by their headers; body_seconds: for a body to arrive.
    ValueError unless all are at least 1, and `max_decoding_pixels` takes an image of `max_pixels`.
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
                f"Limits.max_decoding_pixels is {self.max_decoding_pixels}, less than max_pixels={self.max_pixels} of one image"
            )


class OverloadedError(RuntimeError):
    """Too much is going on already; try again after `after_s` seconds. code: for programs."""

    def __init__(self, message: str, after_s: int = 1, code: str = "overloaded") -> None:
        super().__init__(message)
        self.after_s, self.code = after_s, code


class Budget:
    """What is being decoded now, on all threads, in pixels."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock, self._held = threading.Lock(), 0

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Place for an image of so many pixels until the block ends. OverloadedError where there is none."""
        with self._lock:
            if self._held + pixels > self.limits.max_decoding_pixels:
                raise OverloadedError(f"images of {self._held:,} pixels are being decoded; try again later")
            self._held += pixels
        try:
            yield
        finally:
            with self._lock:
                self._held -= pixels
