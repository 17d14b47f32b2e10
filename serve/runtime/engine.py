"""Compute predictions with a bundle's network on one device. Independent of HTTP."""

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
from refract.models.familiarity import Familiarity
from refract.models.features import FeatureClassifier
from refract.models.multimodal.tokens import Tokens
from refract.models.occlusion import Occlusion
from refract.serve.requests.multimodal_samples import blank, inputs, joined
from refract.serve.runtime.backends.base import AGREED, Forward
from refract.serve.runtime.backends.torch_backends import channels_last
from refract.serve.runtime.gpus import is_out_of_memory, naming_memory
from refract.serve.runtime.outputs import packed, unpacked
from refract.serve.runtime.selection import THREADS, Choice, choose
from refract.serve.runtime.staging import Staging

logger = logging.getLogger(__name__)

Compute = Callable[[np.ndarray], np.ndarray]

TOLERANCE = 2e-3
"""Largest allowed difference of a golden sample's probabilities from the stored ones. float32 convolutions differ by about 1e-6 between
CPUs; TF32 on the training GPU changes probabilities by up to about 1e-3. Wrong channels, resizing or weights change them by far more. The
top-1 label stays the same if its stored margin is over twice this."""

BUFFERS = 2
"""Threads of an engine on a GPU: one copies its batch while the GPU computes the other's."""

RETRY_S = 60.0
"""Seconds after an out-of-memory error until larger batches are tried again."""


class Engine:
    """Computes probabilities, logits and embeddings with the network of `bundle` on `device`. A batch is uint8 N×H×W×3, or, for a model
    that reads texts, N records of `refract.serve.requests.multimodal_samples`. A batch that exceeds the device's memory is split."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        backend: str = "eager",
        *,
        threads: int = THREADS,
    ) -> None:
        """backend: a name of `refract.serve.runtime.backends.NAMES`; threads: most CPU threads. BundleError as
        in `choose`, if a golden sample cannot be decoded, or if the device's memory is too small."""
        self.bundle = bundle
        self.others: tuple[Engine, ...] = ()
        """Other engines of the same bundle, which compute in parallel with this one."""
        self.device = torch.device(device)
        self.preprocess = Preprocess.from_dict(bundle.info.preprocess)
        with naming_memory(self.device, "this network"):
            self._classifier = bundle.classifier(self.device)
        training = bundle.training_features()
        self.familiarity = None if training is None else Familiarity(training, self.device)
        """Compares images with the training images; None for a bundle without training features."""
        if self.device.type == "cpu":
            channels_last(self._classifier)
        self._network = FeatureClassifier(self._classifier)
        self._forward: Forward = self._network
        self.choice: Choice | None = None
        if self.tokens is not None and backend not in ("auto", "eager"):
            raise BundleError(
                f"--backend {backend} computes image models only; this bundle reads texts: use --backend eager"
            )
        if backend != "eager" and self.tokens is None:
            images = np.stack([self._golden(golden) for golden in self._goldens()])
            with naming_memory(self.device, "timing the backends"):
                self._forward, self.choice = choose(bundle, self._network, images, wanted=backend, threads=threads)
        self._queue_lock = threading.Lock()  # the kernels of a batch and the copy of its outputs are queued together
        self._largest, self._retry_at = math.inf, 0.0
        overlaps = self.device.type == "cuda" and self.tokens is None
        self._staging = tuple(Staging(self.device) for _ in range(BUFFERS if overlaps else 0))

    @property
    def reads(self) -> frozenset[str]:
        """The inputs of the network: images, texts, or both."""
        return self._classifier.reads

    @property
    def tokens(self) -> Tokens | None:
        """The tokenizer; None if the network reads no texts."""
        return self._classifier.tokens

    @property
    def workers(self) -> tuple[Compute, ...]:
        """The compute functions of this engine and of `others`. Call each one on a separate thread."""
        functions = tuple(partial(self.overlapped, staging) for staging in self._staging) or (self.compute,)
        return (*functions, *(worker for other in self.others for worker in other.workers))

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each engine."""
        return (str(self.device), *(str(other.device) for other in self.others))

    def compute(self, batch: np.ndarray) -> np.ndarray:
        """Return a record of each sample's probabilities, with the bundle's temperature applied, logits, embedding and familiarity: see
        `refract.serve.runtime.outputs.unpacked`."""
        return self._fitted(partial(self._outputs, self._forward), batch)

    def overlapped(self, staging: Staging, batch: np.ndarray) -> np.ndarray:
        """Compute like `compute`, with the buffers of one thread, while the device computes another thread's batch."""
        return self._fitted(partial(self._overlapped, staging), batch)

    def warm_up(self, largest: int) -> None:
        """Compute batches of 1, 2, 4 … `largest` samples, so that kernels are chosen and CUDA graphs recorded before the first request.
        BundleError if one sample exceeds the device's memory. If a larger batch does, a warning is logged."""
        sample = self._golden(self._goldens()[0])
        with naming_memory(self.device, "one sample"):
            for size in {min(1 << power, largest): None for power in range(largest.bit_length() + 1)}:
                self.compute(np.repeat(sample[None], size, axis=0))

    def _fitted(self, compute: Compute, batch: np.ndarray) -> np.ndarray:
        """Compute the batch in parts that fit into the device's memory."""
        if time.monotonic() > self._retry_at:
            self._largest = math.inf
        outputs: list[np.ndarray] = []
        start = 0
        while start < len(batch):
            part = batch[start : start + int(min(self._largest, len(batch)))]
            try:
                outputs.append(compute(part))
            except RuntimeError as err:
                if len(part) == 1 or not is_out_of_memory(err):
                    raise
                self._shrink(len(part))
            else:
                start += len(part)
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _shrink(self, count: int) -> None:
        self._largest, self._retry_at = count // 2, time.monotonic() + RETRY_S
        logger.warning(
            "%s has too little memory for a batch of %d; using batches of %d for the next %g s; set a smaller --max-batch",
            self.device, count, self._largest, RETRY_S,
        )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _overlapped(self, staging: Staging, batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            images = staging.load(batch)
            with self._queue_lock:
                wait = staging.unload(self._packed(*self._forward(images)))
            return unpacked(wait(), self._num_classes)

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """Return the probabilities of `compute`, float32 N×C."""
        return self.compute(batch)["probabilities"]

    def _outputs(self, forward: Forward, batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rows = self._packed(*forward(*inputs(batch, self.device, self.reads))).cpu().numpy()  # type: ignore[arg-type]
        return unpacked(rows, self._num_classes)

    def _packed(self, logits: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        unknown = logits.new_full((len(logits),), math.nan)
        familiarity = unknown if self.familiarity is None else self.familiarity(embedding)
        return packed(self._probabilities(logits), logits, embedding, familiarity)

    def mean(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return the records of the mean logits and the mean embeddings of two views of each sample, as in evaluation."""
        mean = one.copy()
        for name in ("logits", "embedding"):
            mean[name] = (one[name] + other[name]) / 2
        # From the mean of the logits, not of the probabilities: those of a confident network round to 0 and 1 in float32.
        mean["probabilities"] = self._probabilities(torch.from_numpy(mean["logits"])).numpy()
        if self.familiarity is not None:
            embedding = torch.from_numpy(np.ascontiguousarray(mean["embedding"])).to(self.device)
            mean["familiarity"] = self.familiarity(embedding).cpu().numpy()
        return mean

    @property
    def _num_classes(self) -> int:
        return len(self.bundle.info.labels)

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        info = self.bundle.info
        return probabilities(logits, task=info.task, temperature=info.temperature)

    @property
    def occlusion(self) -> Occlusion:
        """The heat maps of the selected backend. For bundles that read only images."""
        info = self.bundle.info
        return Occlusion(
            lambda images: self._forward(images)[0], multilabel=info.task == "multilabel", temperature=info.temperature
        )

    def self_test(self) -> float:
        """Predict the golden samples, and compare with their stored probabilities. Returns the shortest seconds that one took. BundleError,
        which names the sample, if a difference exceeds the tolerance."""
        times = []
        for golden in self._goldens():
            batch, stored = np.stack([self._golden(golden)]), np.asarray(golden.probabilities, dtype=np.float32)
            # Check plain float32 first, then the backend, which may be less precise.
            self._compare(
                self._where(golden), self._outputs(self._network, batch)["probabilities"][0], stored, TOLERANCE
            )
            start = time.perf_counter()
            predicted = self.predict(batch)[0]
            times.append(time.perf_counter() - start)
            self._compare(
                self._where(golden), predicted, stored, (self.choice.agreed if self.choice else AGREED) + TOLERANCE
            )
        for other in self.others:
            other.self_test()
        return min(times)

    def _goldens(self) -> Sequence[GoldenSample]:
        if not self.bundle.golden_samples:
            raise BundleError(f"{self.bundle.path}: has no golden samples for the self-test; build the bundle again")
        return self.bundle.golden_samples

    def _golden(self, golden: GoldenSample) -> np.ndarray:
        try:
            image = self.preprocess(golden.data) if golden.has_image else blank(self.preprocess)
        except ImageError as err:
            raise BundleError(f"{self._where(golden)} cannot be decoded: {err}") from err
        return image if self.tokens is None else joined(image[None], [golden.text], [golden.has_image], self.tokens)[0]

    def _where(self, golden: GoldenSample) -> str:
        return f"{self.bundle.path}: golden sample {golden.name}"

    def _compare(self, where: str, predicted: np.ndarray, stored: np.ndarray, tolerance: float) -> None:
        if predicted.shape != stored.shape:
            raise BundleError(f"{where} has {stored.size} stored probabilities, the network returns {predicted.size}")
        gap = float(np.abs(predicted - stored).max())
        if not gap <= tolerance:  # also when gap is NaN
            labels = self.bundle.info.labels
            raise BundleError(
                f"{where} is predicted as {labels[predicted.argmax()]!r}, stored is {labels[stored.argmax()]!r}; "
                f"its probabilities differ by {gap:.2g}, at most {tolerance:g} is allowed"
            )


def build(
    bundle: Bundle, devices: Sequence[str], backend: str = "eager", replicas: int = 1, largest: int = 32
) -> Engine:
    """Build `replicas` engines on each device, and return the first with the rest as its `others`. Replicas on a CPU divide its threads.
    largest: samples of the largest batch, up to which a GPU warms up. Raises as `Engine`."""
    threads = max(1, THREADS // replicas)
    torch.set_num_threads(threads)
    placements = [device for device in devices for _ in range(replicas)]
    first = Engine(bundle, placements[0], backend, threads=threads)
    # All engines use one backend: otherwise a prediction would depend on which engine was idle.
    chosen = first.choice.name if first.choice else "eager"
    first.others = tuple(Engine(bundle, device, chosen, threads=threads) for device in placements[1:])
    for engine in (first, *first.others):
        if engine.device.type == "cuda":
            engine.warm_up(largest)
    return first
