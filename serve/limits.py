"""What one request may ask for. Knows nothing of HTTP."""

from dataclasses import dataclass, fields

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest request that is answered; anything larger is refused before it costs memory.

    max_body_bytes: of the HTTP body as sent (base64 and multipart framing count); max_pixels: height × width of one
    picture, read from its header; max_total_pixels: of all pictures of a request together; max_images: pictures in one
    request; max_held_bytes: of the bodies of all requests at a time, as far as they have arrived; body_seconds: for a body to arrive.
    ValueError unless all are at least 1.
    """

    max_body_bytes: int = 20 * MIB
    max_pixels: int = 50_000_000
    max_total_pixels: int = 100_000_000
    max_images: int = 64
    max_held_bytes: int = 512 * MIB
    body_seconds: int = 30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Limits.{field.name} is {value!r}; it must be an integer of at least 1")
