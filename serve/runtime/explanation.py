"""Compute heat maps in steps on a separate thread, and abandon those that would exceed the deadline. Independent of HTTP."""

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
"""Initial estimate of the seconds of one image's forward pass, until it is measured."""

METHOD = "occlusion"
READS_TEXTS = Explanation(code="reads_texts", detail="this model reads texts; heat maps need an image-only model")
LATE = Explanation(code="deadline_exceeded", detail="the heat map would exceed the deadline of the request")
NO_EVIDENCE = Explanation(code="no_evidence", detail="no single region of the image supports this label")


class Explanations:
    """Explains one request at a time, in order of arrival. Use it on one event loop only."""

    def __init__(self) -> None:
        self._thread = PricedPool(1, "explain", pace=PACE)
        self._turn = asyncio.Lock()

    def expected(self, count: int) -> float:
        """The expected seconds until `count` more heat maps are complete, after all reserved ones; 0 if none is reserved."""
        return self._thread.expected(count * PASSES)

    @contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Count `count` heat maps as queued work until the block ends."""
        with self._thread.reserved(count * PASSES):
            yield

    def close(self) -> None:
        """Start no further steps."""
        self._thread.close()

    async def of(self, engine: Engine, batch: np.ndarray, rows: np.ndarray, due: float) -> tuple[Explanation, ...]:
        """Explain the likeliest label of each image.

        batch: N images as `Engine.compute` takes them; rows: (N, C) probabilities; due: a time of the event loop. A map that would not be
        complete by then is abandoned between two steps. Cancelling this call stops the work after the current step.
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
        start, done = loop.time(), 0
        steps = engine.occlusion.steps(torch.from_numpy(image).to(engine.device).permute(2, 0, 1), label)
        while (heat := await self._thread.run(BATCH, lambda: next(steps))) is None:
            done += BATCH
            # Extrapolate the pace of this map. The pool's pace could be too slow, and then no map would run to correct it.
            if loop.time() + (loop.time() - start) * (PASSES - done) / done > due:
                return LATE
        return _drawn(heat)


def _drawn(heat: Tensor) -> Explanation:
    return Explanation(png(heat.numpy()), METHOD) if heat.any() else NO_EVIDENCE


def png(heat: np.ndarray) -> bytes:
    """Draw a heat map (H, W) in 0…1 as a PNG overlay: red at 1, transparent at 0."""
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_JET)
    layer = np.dstack([colours, (heat * 180).astype(np.uint8)])
    return bytes(cv2.imencode(".png", layer)[1])
