"""A bundle at work on one device. Knows nothing of HTTP, nor of who asks."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from refract.augment.decoding.decode import ImageError
from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, BundleError, GoldenSample
from refract.models.classifier import probabilities
from refract.models.multimodal.tokens import Tokens
from refract.models.occlusion import Occlusion
from refract.serve.requests.multimodal_samples import blank, inputs, joined
from refract.serve.runtime.backends.base import AGREED, Forward
from refract.serve.runtime.backends.torch_backends import channels_last
from refract.serve.runtime.gpus import is_out_of_memory, naming_memory
from refract.serve.runtime.selection import THREADS, Choice, choose
from refract.serve.runtime.staging import Staging

logger = logging.getLogger(__name__)

Compute = Callable[[np.ndarray], np.ndarray]

# How far a golden image's probabilities may lie from the stored ones. float32 convolutions differ by about 1e-6
# between CPUs; TF32 on the training GPU moves them by up to about 1e-3. Wrong channels, resize or weights move them
# by far more. Where the stored lead is over twice this, the same top-1 follows.
TOLERANCE = 2e-3


BUFFERS = 2
"""Worker threads of an engine on a GPU: one copies and waits while the other's batch is computed."""

RETRY_S = 60.0
"""Time after which larger batches are tried again, when the device's memory was too small for one."""


class Engine:
    """Turns batches into probabilities and logits, by `bundle`'s network on `device`. A batch is uint8 N×H×W×3, or where texts are read N
    records of `refract.serve.requests.multimodal_samples`. A batch that does not fit into the device's memory is
    computed in smaller parts."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        backend: str = "eager",
        *,
        threads: int = THREADS,
    ) -> None:
        """backend: a name of `refract.serve.runtime.backends.BACKENDS`, or auto for the fastest that agrees; threads: of a CPU, at most.
        BundleError as `choose`, where a golden sample cannot be read, or where the device's memory is too small."""
        self.bundle = bundle
        self.others: tuple[Engine, ...] = ()
        """Of the same bundle, that compute beside it."""
        self.device = torch.device(device)
        self.preprocess = Preprocess.from_dict(bundle.info.preprocess)
        with naming_memory(self.device, "this network"):
            self._classifier = bundle.classifier(self.device)
        if self.device.type == "cpu":
            channels_last(self._classifier)
        self._forward: Forward = self._classifier
        self.choice: Choice | None = None
        if self.tokens is not None and backend not in ("auto", "eager"):
            raise BundleError(f"--backend {backend}: computes images alone; for a bundle that reads texts take eager")
        if backend != "eager" and self.tokens is None:
            images = np.stack([self._golden(golden) for golden in self._goldens()])
            with naming_memory(self.device, "timing the backends"):
                self._forward, self.choice = choose(bundle, self._classifier, images, wanted=backend, threads=threads)
        self._alone = threading.Lock()  # kernels of a batch and the copy of its answers are queued together
        self._largest, self._retry_at = math.inf, 0.0
        overlaps = self.device.type == "cuda" and self.tokens is None
        self._staging = tuple(Staging(self.device) for _ in range(BUFFERS if overlaps else 0))

    @property
    def reads(self) -> frozenset[str]:
        """images, texts, or both."""
        return self._classifier.reads

    @property
    def tokens(self) -> Tokens | None:
        """What makes numbers of texts, where texts are read."""
        return self._classifier.tokens

    @property
    def workers(self) -> tuple[Compute, ...]:
        """The functions of this engine and of the others, each for a thread of its own."""
        own = tuple(partial(self.overlapped, staging) for staging in self._staging) or (self.compute,)
        return (*own, *(worker for other in self.others for worker in other.workers))

    @property
    def devices(self) -> tuple[str, ...]:
        """Of each engine."""
        return (str(self.device), *(str(other.device) for other in self.others))

    def compute(self, batch: np.ndarray) -> np.ndarray:
        """batch → float32 N×2×C: of each image its probabilities, the bundle's temperature applied, and its logits."""
        return self._fitted(partial(self._answers, self._forward), batch)

    def overlapped(self, staging: Staging, batch: np.ndarray) -> np.ndarray:
        """Like `compute`, through the buffers of one thread, while another thread's batch is computed."""
        return self._fitted(partial(self._overlapped, staging), batch)

    def warm_up(self, largest: int) -> None:
        """Compute batches of 1, 2, 4 … `largest` samples: kernels are chosen and CUDA graphs recorded before the first request.
        BundleError where one sample does not fit into the device's memory; smaller batches are logged."""
        sample = self._golden(self._goldens()[0])
        with naming_memory(self.device, "one sample"):
            for size in {min(1 << power, largest): None for power in range(largest.bit_length() + 1)}:
                self.compute(np.repeat(sample[None], size, axis=0))

    def _fitted(self, compute: Compute, batch: np.ndarray) -> np.ndarray:
        """The answers, computed in parts that fit into the device's memory."""
        if time.monotonic() > self._retry_at:
            self._largest = math.inf
        done: list[np.ndarray] = []
        start = 0
        while start < len(batch):
            part = batch[start : start + int(min(self._largest, len(batch)))]
            try:
                done.append(compute(part))
            except RuntimeError as err:
                if len(part) == 1 or not is_out_of_memory(err):
                    raise
                self._shrink(len(part))
            else:
                start += len(part)
        return done[0] if len(done) == 1 else np.concatenate(done)

    def _shrink(self, count: int) -> None:
        self._largest, self._retry_at = count // 2, time.monotonic() + RETRY_S
        logger.warning(
            "%s has too little memory for a batch of %d; batches of %d for the next %g s; --max-batch sets less for good",
            self.device, count, self._largest, RETRY_S,
        )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _overlapped(self, staging: Staging, batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            images = staging.load(batch)
            with self._alone:
                logits = self._forward(images).float()
                answers = staging.unload(torch.stack([self._probabilities(logits), logits], dim=1))
            return answers()

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """The probabilities of `compute` alone, float32 N×C."""
        return self.compute(batch)[:, 0]

    def _answers(self, forward: Forward, batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = forward(*inputs(batch, self.device, self.reads)).float()  # type: ignore[arg-type]
            return torch.stack([self._probabilities(logits), logits], dim=1).cpu().numpy()

    def mean(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The probabilities of the mean of two answers' logits, float32 N×C each, as evaluation takes it."""
        # Not of probabilities: where a network is sure they are 0 and 1 in float32, however sure it is.
        return self._probabilities(torch.from_numpy((one + other) / 2)).numpy()

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        info = self.bundle.info
        return probabilities(logits, task=info.task, temperature=info.temperature)

    @property
    def occlusion(self) -> Occlusion:
        """Heat maps of the backend that answers. For bundles that read images alone."""
        info = self.bundle.info
        return Occlusion(self._forward, multilabel=info.task == "multilabel", temperature=info.temperature)

    def self_test(self) -> float:
        """Ask for the golden images. BundleError, naming the image, unless the stored answers come again. Returns the seconds that
        one takes, the shortest of them."""
        times = []
        for golden in self._goldens():
            batch, stored = np.stack([self._golden(golden)]), np.asarray(golden.probabilities, dtype=np.float32)
            # The bundle by plain float32 first; then what computes it here, which may be coarser.
            self._compare(self._where(golden), self._answers(self._classifier, batch)[0, 0], stored, TOLERANCE)
            began = time.perf_counter()
            answered = self.predict(batch)[0]
            times.append(time.perf_counter() - began)
            self._compare(
                self._where(golden), answered, stored, (self.choice.agreed if self.choice else AGREED) + TOLERANCE
            )
        for other in self.others:
            other.self_test()
        return min(times)

    def _goldens(self) -> Sequence[GoldenSample]:
        if not self.bundle.golden_samples:
            raise BundleError(f"{self.bundle.path}: no golden images, so nothing shows that this model still works")
        return self.bundle.golden_samples

    def _golden(self, golden: GoldenSample) -> np.ndarray:
        try:
            image = self.preprocess(golden.data) if golden.has_image else blank(self.preprocess)
        except ImageError as err:
            raise BundleError(f"{self._where(golden)} cannot be read: {err}") from err
        return image if self.tokens is None else joined(image[None], [golden.text], [golden.has_image], self.tokens)[0]

    def _where(self, golden: GoldenSample) -> str:
        return f"{self.bundle.path}: golden image {golden.name}"

    def _compare(self, where: str, answered: np.ndarray, stored: np.ndarray, tolerance: float) -> None:
        if answered.shape != stored.shape:
            raise BundleError(f"{where} has {stored.size} stored probabilities, the network answers {answered.size}")
        gap = float(np.abs(answered - stored).max())
        if not gap <= tolerance:  # also when gap is not a number
            labels = self.bundle.info.labels
            raise BundleError(
                f"{where} is answered with {labels[answered.argmax()]!r} where {labels[stored.argmax()]!r} is stored; "
                f"its probabilities are off by {gap:.2g}, at most {tolerance:g} is allowed"
            )


def build(
    bundle: Bundle, devices: Sequence[str], backend: str = "eager", replicas: int = 1, largest: int = 32
) -> Engine:
    """`replicas` engines on each device, as one; on a CPU they share its threads. largest: samples of the largest batch, which a GPU
    computes once now. Raises as `Engine`."""
    threads = max(1, THREADS // replicas)
    torch.set_num_threads(threads)
    places = [device for device in devices for _ in range(replicas)]
    first = Engine(bundle, places[0], backend, threads=threads)
    # The same backend for all: else the answer to a request would depend on which of them was free.
    own = first.choice.name if first.choice else "eager"
    first.others = tuple(Engine(bundle, device, own, threads=threads) for device in places[1:])
    for engine in (first, *first.others):
        if engine.device.type == "cuda":
            engine.warm_up(largest)
    return first
