"""Heat maps for requests: computed in steps on a thread of their own, priced, and given up before the deadline. Knows nothing of HTTP."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torch import Tensor

from refract.models.occlusion import BATCH, PASSES
from refract.models.prediction import Explanation
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.pools import PricedPool

PACE = 0.002
"""Seconds that one image takes to pass through the network, until it was measured."""

METHOD = "occlusion"
READS_TEXTS = Explanation(code="reads_texts", detail="this model reads texts; heat maps need a model of images alone")
LATE = Explanation(code="deadline_exceeded", detail="the heat map would exceed the deadline of the request")
NO_EVIDENCE = Explanation(code="no_evidence", detail="no single part of the image speaks for this label")


class Explanations:
    """Explains one request at a time, in the order in which they come. Belongs to one event loop."""

    def __init__(self) -> None:
        self._thread = PricedPool(1, "explain", pace=PACE)
        self._turn = asyncio.Lock()

    def expected(self, count: int) -> float:
        """Seconds until `count` more heat maps are there, after those that were promised; 0 where none was."""
        return self._thread.expected(count * PASSES)

    @contextmanager
    def promised(self, count: int) -> Iterator[None]:
        """Count `count` heat maps as waiting until the block ends."""
        with self._thread.promised(count * PASSES):
            yield

    def close(self) -> None:
        """Start no further step."""
        self._thread.close()

    async def of(self, engine: Engine, batch: np.ndarray, rows: np.ndarray, due: float) -> tuple[Explanation, ...]:
        """Explain the likeliest label of each image.

        batch: N images as `Engine.compute` takes them; rows: (N, C) probabilities; due: a time of the event loop. A map that would not be
        there by then is given up between two steps. Cancelling this call ends the work after the step that runs.
        """
        if engine.tokens is not None:
            return (READS_TEXTS,) * len(batch)
        try:
            async with asyncio.timeout_at(due):
                await self._turn.acquire()
        except TimeoutError:
            return (LATE,) * len(batch)
        try:
            pairs = zip(batch, rows.argmax(axis=1).tolist(), strict=True)
            return tuple([await self._one(engine, image, label, due) for image, label in pairs])
        finally:
            self._turn.release()

    async def _one(self, engine: Engine, image: np.ndarray, label: int, due: float) -> Explanation:
        loop = asyncio.get_running_loop()
        began, done = loop.time(), 0
        steps = engine.occlusion.steps(torch.from_numpy(image).to(engine.device).permute(2, 0, 1), label)
        while (heat := await self._thread.run(BATCH, lambda: next(steps))) is None:
            done += BATCH
            # By the pace of this very map: one that an earlier, slower moment left behind would refuse for ever.
            if loop.time() + (loop.time() - began) * (PASSES - done) / done > due:
                return LATE
        return _drawn(heat)


def _drawn(heat: Tensor) -> Explanation:
    return Explanation(png(heat.numpy()), METHOD) if heat.any() else NO_EVIDENCE


def png(heat: np.ndarray) -> bytes:
    """Draw a heat map (H, W) in 0…1 as an image to lay over another: red where it is hot, transparent where it is not."""
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_JET)
    layer = np.dstack([colours, (heat * 180).astype(np.uint8)])
    return bytes(cv2.imencode(".png", layer)[1])
