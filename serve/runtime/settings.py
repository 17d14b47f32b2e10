"""The settings of batches and of requests in flight. The module imports nothing heavy, so that the command line can name the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """How requests are batched, how many are accepted, and which predictions abstain.

    max_batch: most images in one batch. max_wait_ms: longest wait for a batch to fill, in milliseconds. max_queue: most images that wait
    for the engine. max_requests: most requests in flight. deadline_s: seconds from a request's last byte to its response.
    min_familiarity: predictions abstain below this familiarity; None for no limit. similar: whether clients may see the training images
    that are most similar to theirs. feedback_keep: most predictions that feedback can judge, 0 for none; feedback_hours: for how long.
    cache_mb: memory for the outputs of repeated requests, in MiB; 0 for none.
    ValueError if a setting is out of range.
    """

    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_queue: int = 1024
    max_requests: int = 256
    deadline_s: float = 10.0
    min_familiarity: float | None = None
    similar: bool = False
    feedback_keep: int = 100_000
    feedback_hours: float = 168.0
    cache_mb: float = 0.0

    def __post_init__(self) -> None:
        if self.max_requests < 1 or not self.deadline_s > 0:
            raise ValueError(
                f"max_requests={self.max_requests} must be at least 1, deadline_s={self.deadline_s} above 0"
            )
