"""A bundle at work on one device. Knows nothing of HTTP, nor of who asks."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from augment.decode import ImageError
from augment.preprocess import Preprocess
from models.bundle import Bundle, BundleError, Golden
from models.classifier import probabilities
from models.occlusion import Occlusion
from models.texts.tokens import Tokens
from serve.backends import Forward, channels_last
from serve.choice import AGREED, THREADS, Choice, choose
from serve.samples import blank, inputs, joined

# How far a golden picture's probabilities may lie from the stored ones. float32 convolutions differ by about 1e-6
# between CPUs; TF32 on the training GPU moves them by up to about 1e-3. Wrong channels, resize or weights move them
# by far more. Where the stored lead is over twice this, the same top-1 follows.
TOLERANCE = 2e-3


class Engine:
    """Turns batches into probabilities and logits, by `bundle`'s network on `device`. A batch is uint8 N×H×W×3, or where texts are read N
    records of `serve.samples`."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        backend: str = "eager",
        *,
        threads: int = THREADS,
    ) -> None:
        """backend: a name of `serve.backends.BACKENDS`, or auto for the fastest that agrees; threads: of a CPU, at most.
        BundleError as `choose`, or where a golden picture cannot be read."""
        self.bundle = bundle
        self.others: tuple[Engine, ...] = ()
        """Of the same bundle, that compute beside it."""
        self.device = torch.device(device)
        self.preprocess = Preprocess.from_dict(bundle.info.preprocess)
        self._classifier = bundle.classifier(self.device)
        if self.device.type == "cpu":
            channels_last(self._classifier)
        self._forward: Forward = self._classifier
        self.choice: Choice | None = None
        if self.tokens is not None and backend not in ("auto", "eager"):
            raise BundleError(f"--backend {backend}: computes pictures alone; for a bundle that reads texts take eager")
        if backend != "eager" and self.tokens is None:
            images = np.stack([self._golden(golden) for golden in self._goldens()])
            self._forward, self.choice = choose(bundle, self._classifier, images, wanted=backend, threads=threads)

    @property
    def reads(self) -> frozenset[str]:
        """pictures, texts, or both."""
        return self._classifier.reads

    @property
    def tokens(self) -> Tokens | None:
        """What makes numbers of texts, where texts are read."""
        return self._classifier.tokens

    @property
    def workers(self) -> tuple[Callable[[np.ndarray], np.ndarray], ...]:
        """The `compute` of each engine, which may run at the same time."""
        return (self.compute, *(other.compute for other in self.others))

    @property
    def devices(self) -> tuple[str, ...]:
        """Of each engine."""
        return (str(self.device), *(str(other.device) for other in self.others))

    def compute(self, batch: np.ndarray) -> np.ndarray:
        """batch → float32 N×2×C: of each picture its probabilities, the bundle's temperature applied, and its logits."""
        return self._answers(self._forward, batch)

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
        """Ask for the golden pictures. BundleError, naming the picture, unless the stored answers come again. Returns the seconds that
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

    def _goldens(self) -> Sequence[Golden]:
        if not self.bundle.goldens:
            raise BundleError(f"{self.bundle.path}: no golden pictures, so nothing shows that this model still works")
        return self.bundle.goldens

    def _golden(self, golden: Golden) -> np.ndarray:
        try:
            image = self.preprocess(golden.data) if golden.pictured else blank(self.preprocess)
        except ImageError as err:
            raise BundleError(f"{self._where(golden)} cannot be read: {err}") from err
        return image if self.tokens is None else joined(image[None], [golden.text], [golden.pictured], self.tokens)[0]

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
    first = Engine(bundle, places[0], backend, threads=threads)
    # The same way for all: else the answer to a picture would hang on which of them was free.
    own = first.choice.name if first.choice else "eager"
    first.others = tuple(Engine(bundle, device, own, threads=threads) for device in places[1:])
    return first


def cuda_bytes(devices: Sequence[str]) -> int:
    """What tensors hold of these GPUs' memory."""
    return sum(torch.cuda.memory_allocated(device) for device in set(devices))
