"""A bundle at work on one device. Knows nothing of HTTP, nor of who asks."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from augment.decode import ImageError
from augment.preprocess import Preprocess
from models.bundle import Bundle, BundleError, Golden
from models.classifier import probabilities
from serve.backends import AGREED, THREADS, Choice, Forward, choose
from serve.explain import Explainer

# How far a golden picture's probabilities may lie from the stored ones. float32 convolutions differ by about 1e-6
# between CPUs; TF32 on the training GPU moves them by up to about 1e-3. Wrong channels, resize or weights move them
# by far more. Where the stored lead is over twice this, the same top-1 follows.
TOLERANCE = 2e-3


class Engine:
    """Turns uint8 N×H×W×3 batches into probabilities, by `bundle`'s network on `device`."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        backend: str = "eager",
        *,
        threads: int = THREADS,
        others: Sequence["Engine"] = (),
    ) -> None:
        """backend: a name of `serve.backends.BACKENDS`, or auto for the fastest that agrees; threads: of a CPU, at most; others: that
        compute beside it, of the same bundle. BundleError as `choose`, or where a golden picture cannot be read."""
        self.bundle, self._others = bundle, tuple(others)
        self.device = torch.device(device)
        self.preprocess = Preprocess.from_dict(bundle.info.preprocess)
        self._classifier = bundle.classifier(self.device)
        self._forward: Forward = self._classifier
        self.choice: Choice | None = None
        if backend != "eager":
            images = np.stack([self._golden(golden) for golden in self._goldens()])
            self._forward, self.choice = choose(bundle, self._classifier, images, wanted=backend, threads=threads)

    @property
    def workers(self) -> tuple[Callable[[np.ndarray], np.ndarray], ...]:
        """The `predict` of each engine, which may run at the same time."""
        return (self.predict, *(other.predict for other in self._others))

    @property
    def devices(self) -> tuple[str, ...]:
        """Of each engine."""
        return (str(self.device), *(str(other.device) for other in self._others))

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """batch: uint8 N×H×W×3 → float32 N×C probabilities. The bundle's temperature is applied."""
        return self._answers(self._forward, batch)

    def _answers(self, forward: Forward, batch: np.ndarray) -> np.ndarray:
        info = self.bundle.info
        with torch.inference_mode():
            images = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
            logits = forward(images)
            return probabilities(logits, task=info.task, temperature=info.temperature).float().cpu().numpy()

    def mean(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The probabilities of the mean of two answers' logits, float32 N×C each."""
        safe = [
            np.clip(p.astype(np.float64), 1e-12, 1 - 1e-7 if self.bundle.info.task == "multilabel" else 1)
            for p in (one, other)
        ]
        if self.bundle.info.task == "multilabel":
            logits = sum(np.log(p / (1 - p)) for p in safe) / 2
            return (1 / (1 + np.exp(-logits))).astype(np.float32)
        # A softmax is known up to its logits' common shift, which the next softmax takes out again.
        joint = np.sqrt(safe[0] * safe[1])
        return (joint / joint.sum(axis=1, keepdims=True)).astype(np.float32)

    @cached_property
    def explainer(self) -> Explainer:
        """Made when it is first asked for, from a golden picture, so that a server which explains nothing pays nothing."""
        return Explainer(self._classifier, self.preprocess(self.bundle.goldens[0].data))

    def self_test(self) -> float:
        """Ask for the golden pictures. BundleError, naming the picture, unless the stored answers come again. Returns the seconds that
        one takes, the shortest of them."""
        times = []
        for golden in self._goldens():
            batch, stored = self._golden(golden)[None], np.asarray(golden.probabilities, dtype=np.float32)
            # The bundle by plain float32 first; then what computes it here, which may be coarser.
            self._compare(self._where(golden), self._answers(self._classifier, batch)[0], stored, TOLERANCE)
            began = time.perf_counter()
            answered = self.predict(batch)[0]
            times.append(time.perf_counter() - began)
            self._compare(self._where(golden), answered, stored, AGREED + TOLERANCE)
        for other in self._others:
            other.self_test()
        return min(times)

    def _goldens(self) -> Sequence[Golden]:
        if not self.bundle.goldens:
            raise BundleError(f"{self.bundle.path}: no golden pictures, so nothing shows that this model still works")
        return self.bundle.goldens

    def _golden(self, golden: Golden) -> np.ndarray:
        try:
            return self.preprocess(golden.data)
        except ImageError as err:
            raise BundleError(f"{self._where(golden)} cannot be read: {err}") from err

    def _where(self, golden: Golden) -> str:
        return f"{self.bundle.path}: golden picture {golden.name}"

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


def build(bundle: Bundle, devices: Sequence[str], backend: str = "eager", replicas: int = 1) -> Engine:
    """`replicas` engines on each device, as one; on a CPU they share its threads. Raises as `Engine`."""
    threads = max(1, THREADS // replicas)
    torch.set_num_threads(threads)
    places = [device for device in devices for _ in range(replicas)]
    others = [Engine(bundle, device, backend, threads=threads) for device in places[1:]]
    return Engine(bundle, places[0], backend, threads=threads, others=others)


def cuda_bytes(devices: Sequence[str]) -> int:
    """What tensors hold of these GPUs' memory."""
    return sum(torch.cuda.memory_allocated(device) for device in set(devices))
