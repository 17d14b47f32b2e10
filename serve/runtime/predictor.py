"""The steps of one request: parse, decode, compute a batch, explain. Threads parse and decode; a model worker computes."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np

from refract.serve.errors import RequestError
from refract.serve.metrics import Metrics
from refract.serve.requests.decoding import ParsedRequest, decode
from refract.serve.requests.limits import Limits
from refract.serve.requests.multimodal_samples import cuts, flipped, joined
from refract.serve.requests.protocols import parse
from refract.serve.rollout.data_capture import DataCapture
from refract.serve.runtime.admission import Admission
from refract.serve.runtime.explanation import Explanations
from refract.serve.runtime.model_worker import ModelWorker
from refract.serve.runtime.response_cache import Cached, Key, ResponseCache, content_hash
from refract.serve.runtime.work import ParsedWork, Predictions, Work, check_read

MOST_EXPLAINED = 8
"""The most heat maps in one request. Each costs several times as much as a prediction."""

READERS = 2
"""Requests that are parsed at the same time. A JSON body with many values takes many times its size in memory."""


class Predictor:
    """Takes a request through its steps, on the model worker that it is given. Use it on one event loop only.

    sampling: captures a sample of the requests whose predictions a client receives; cache: keeps the outputs of these requests; metrics:
    count its hits and misses.
    """

    def __init__(
        self,
        limits: Limits,
        admission: Admission,
        sampling: DataCapture | None,
        cache: ResponseCache | None,
        metrics: Metrics,
    ) -> None:
        self._limits, self._admission, self._sampling = limits, admission, sampling
        self._cache, self._metrics = cache, metrics
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        # Heat maps have a separate thread, so that they do not delay the decoding of other requests.
        self._explanations = Explanations()

    def close(self) -> None:
        """Stop the threads, and cancel jobs that have not started."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._explanations.close()

    async def parse(self, worker: ModelWorker, work: Work, due: float) -> ParsedWork:
        """Parse the body. due: see `ParsedWork`. RequestError, which the worker's statistics count."""
        start = time.monotonic()
        try:
            if work.quick:
                request, content = self._parsed(work)
            else:
                with worker.preparing_request():
                    loop = asyncio.get_running_loop()
                    request, content = await loop.run_in_executor(self._readers, self._parsed, work)
        except BaseException:
            worker.statistics.failed(time.monotonic() - start)
            raise
        return ParsedWork(work, request, time.monotonic() - start, due, content)

    def _parsed(self, work: Work) -> tuple[ParsedRequest, bytes | None]:
        """Return the request, and the hash of its content if there is a cache."""
        request = parse(work.body, self._limits)
        return request, content_hash(request.images) if self._cache is not None else None

    @contextmanager
    def explaining(self, count: int) -> Iterator[None]:
        """Reserve the time for `count` heat maps, before the predictions are computed. RequestError 413 or OverloadedError."""
        if count > MOST_EXPLAINED:
            message = f"the request asks for {count} heat maps; at most {MOST_EXPLAINED} are allowed"
            raise RequestError(413, "too_many_images", message)
        self._admission.check_wait(self._explanations.expected(count))
        with self._explanations.reserved(count):
            yield

    async def answer(self, worker: ModelWorker, parsed: ParsedWork, *, sampled: bool = True) -> Predictions:
        """Predict, and count the request in the worker's statistics. sampled: whether the client receives the predictions; False for a
        shadow's, which are neither counted nor captured."""
        start, predictions = time.monotonic(), None
        try:
            predictions = await self._predict(worker, parsed, sampled=sampled)
            return predictions
        finally:
            seconds = parsed.seconds + time.monotonic() - start
            if sampled and predictions:
                worker.statistics.succeeded(parsed.request.images.number, seconds, predictions.seconds)
            elif sampled:
                worker.statistics.failed(seconds)

    async def _predict(self, worker: ModelWorker, parsed: ParsedWork, *, sampled: bool) -> Predictions:
        work, request = parsed.work, parsed.request
        with worker.in_flight_request():  # the worker stays open, even if a swap happens meanwhile
            chosen = self._sampling.choose(request.images.number) if self._sampling and sampled else []
            # A shadow is measured without the cache. Heat maps and captured samples need the decoded images.
            uses_cache = sampled and not chosen and not work.explained
            key = self._key(worker, parsed) if uses_cache else None
            if key and (hit := self._hit(worker, parsed, key)):
                return hit
            start = time.monotonic()
            batch = await self._samples(worker, parsed)
            prepared = parsed.seconds + time.monotonic() - start
            inputs = np.concatenate([batch, flipped(batch)]) if work.flipped else batch
            if worker.waiting:
                self._admission.check_wait(worker.expected(len(inputs)))
            outputs, queued, computed = await worker.submit(inputs)
            seconds = {"prepare": prepared, "queue": queued, "compute": computed}
            if work.flipped:
                outputs = worker.engine.mean(*np.split(outputs, 2))
            engine = worker.engine
            predictions = Predictions(request, engine.bundle, outputs, seconds, engine.familiarity, cut=cuts(batch))
            if key and self._cache:
                self._cache.put(key, Cached(outputs, predictions.cut))
            rows = predictions.probabilities
            if chosen and self._sampling:
                self._sampling.offer(engine.bundle, request.images, batch, rows, work.request_id, chosen)
            if not work.explained:
                return predictions
            start = time.monotonic()
            maps = await self._explanations.of(worker.engine, batch, rows, parsed.due)
            seconds["explain"] = time.monotonic() - start
            return predictions._replace(explanations=maps)

    def _key(self, worker: ModelWorker, parsed: ParsedWork) -> Key | None:
        """Return the key of the request in the cache; None without a cache."""
        if parsed.content is None:
            return None
        return Key(worker.engine.bundle.digest, parsed.work.flipped, parsed.content)

    def _hit(self, worker: ModelWorker, parsed: ParsedWork, key: Key) -> Predictions | None:
        """Return the cached predictions of `key`, and count whether there are any."""
        assert self._cache is not None
        start, engine = time.monotonic(), worker.engine
        cached = self._cache.get(key)
        seconds = {"prepare": parsed.seconds, "cache": time.monotonic() - start}
        self._metrics.looked_up("hit" if cached else "miss")
        if cached is None:
            worker.statistics.missed(seconds["cache"])
            return None
        return Predictions(parsed.request, engine.bundle, cached.outputs, seconds, engine.familiarity, cut=cached.cut)

    async def _samples(self, worker: ModelWorker, parsed: ParsedWork) -> np.ndarray:
        """Build the model's inputs from the images, and from the texts if it reads them. RequestError 422 for an input it does not read."""
        images, tokens = parsed.request.images, worker.engine.tokens
        check_read(worker.engine, images)
        batch = await self._decoded(worker, parsed)
        if tokens is None:
            return batch
        join = partial(joined, batch, images.texts, images.has_image, tokens)
        return join() if not images.texts else await asyncio.get_running_loop().run_in_executor(self._readers, join)

    async def _decoded(self, worker: ModelWorker, parsed: ParsedWork) -> np.ndarray:
        images = parsed.request.images
        if parsed.work.quick:
            return decode(images, worker.engine.preprocess, worker.budget)
        pool = worker.decoders.of(images.megapixels)
        self._admission.check_wait(pool.expected(images.megapixels))
        with worker.preparing_request(), pool.reserved(images.megapixels):
            # One task a request, not one an image: it is cheaper, and a request of 64 images cannot occupy every thread.
            return await pool.run(images.megapixels, partial(decode, images, worker.engine.preprocess, worker.budget))
