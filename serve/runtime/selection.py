"""Select the fastest backend on this machine whose predictions agree with plain float32."""

import hashlib
import importlib.util
import json
import logging
import os
import platform
import time
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from refract import progress
from refract.augment.preprocess import Preprocess
from refract.cache_folder import cache_folder
from refract.errors import first_line
from refract.models.bundle.bundle import Bundle, BundleError
from refract.models.classifier import probabilities
from refract.models.conversion.instruction_sets import weight_bits
from refract.models.conversion.int8 import calibration_images
from refract.models.features import FeatureClassifier
from refract.plugins import loaded
from refract.serve.runtime.backends.base import Forward
from refract.serve.runtime.backends.registry import BACKENDS, INT8
from refract.serve.runtime.backends.storage import store

logger = logging.getLogger(__name__)

THREADS = torch.get_num_threads()
"""PyTorch's default number of threads. A choice may set fewer; the next choice starts from this number again."""

WORTH = 1.2
"""How many times faster all threads must be than one to be chosen: decoding and HTTP need cores too."""

LONG_S = 0.005
"""Seconds that a batch must take one thread for more threads to be considered. Between short batches the threads spin, and take the cores
from decoding and HTTP."""

ALIKE, ALIKE_INT8 = 0.99, 0.9
"""Smallest cosine of a golden sample's embedding to that of plain float32, and of one that 8-bit integers compute. A network in 8-bit
integers that keeps its predictions may turn its embeddings more."""

STEADY = 1.5
"""A stored choice stays valid if its backend is at most this many times faster than at the time of the choice (the machine was busy then),
and at most this many times slower relative to plain PyTorch."""

BATCH, ROUNDS, SECONDS = 8, 5, 2.0
"""Images in a timed batch; most repetitions; most seconds."""


@dataclass(frozen=True)
class Choice:
    """The selected backend and the measurements. name: the backend; threads: CPU threads that compute one batch; rates: images a second of
    each timed backend, `NAME/threads` on a CPU; dropped: the reason for each backend that failed."""

    name: str
    threads: int
    rates: dict[str, float]
    dropped: dict[str, str]

    @property
    def agreed(self) -> float:
        """The largest allowed difference of its probabilities from those of plain float32."""
        return BACKENDS[self.name].agreed

    @property
    def rate(self) -> float:
        """Images a second of the selected backend."""
        return self.rates.get(f"{self.name}/{self.threads}") or self.rates[self.name]


def candidates(device: torch.device) -> tuple[str, ...]:
    """Return the names of the backends that `auto` times on this device."""
    return tuple(backend.name for backend in BACKENDS.values() if backend.offered(device))


def choose(
    bundle: Bundle,
    network: FeatureClassifier,
    images: np.ndarray,
    *,
    wanted: str = "auto",
    threads: int = THREADS,
    cache: Path | None = None,
) -> tuple[Forward, Choice]:
    """Select the fastest backend for this bundle on this machine that agrees with plain float32 on `images`.

    A backend agrees if each likeliest label is the same, all probabilities are within AGREED, or INT8_AGREED for those of INT8, and the
    cosine of each embedding to that of float32 is at least ALIKE, or ALIKE_INT8.
    images: the golden images, uint8 N×H×W×3. wanted: auto, int8 for the fastest of INT8, or a name of BACKENDS, which must agree.
    threads: most CPU threads. `cache`, by default backends/ in `cache_folder()`, stores the choice of auto for the bundle, the machine and
    the package versions. ValueError for an unknown name. BundleError if a wanted backend is not installed, does not support this device, or
    does not agree.
    """
    if wanted not in ("auto", "int8", *BACKENDS):
        raise ValueError(
            f"backend: {wanted!r} is unknown; accepted are auto, int8, {', '.join(BACKENDS)}; a plugin's backend needs --plugin FILE"
        )
    device = next(network.parameters()).device
    names = {"auto": candidates(device), "int8": INT8}.get(wanted, (wanted,))
    if wanted != "auto":
        _check_wanted(wanted, names, device)
    folder = (cache or cache_folder() / "backends") / _key(bundle, device, threads)
    tensor = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    trial = _Trial(bundle, network, tensor, folder)
    stored = _load_choice(folder) if wanted == "auto" else None
    if stored is not None and stored.name in names:
        progress.stage(f"checking the stored backend {stored.name}")
        try:
            torch.set_num_threads(stored.threads)
            forward = trial.agreeing(stored.name)
            change = trial.change(stored, forward)
            if 1 / STEADY < change < STEADY:
                return forward, stored
            speed = f"{change:.1f} times faster" if change > 1 else f"{1 / change:.1f} times slower, relative to eager,"
            logger.info("%s is %s than when it was chosen; choosing the backend again", stored.name, speed)
        except Exception as err:  # of any kind, from four libraries: the backend is chosen again
            logger.warning("the stored choice %s fails; choosing the backend again: %s", stored.name, first_line(err))
    return _fastest(trial, names, threads, folder, forced=wanted != "auto")


def _check_wanted(wanted: str, names: tuple[str, ...], device: torch.device) -> None:
    """Raise BundleError if none of `names` supports the device, or none is installed."""
    if not any(device.type in BACKENDS[name].devices for name in names):
        supported = ["auto", *(name for name, backend in BACKENDS.items() if device.type in backend.devices)]
        devices = " and ".join(BACKENDS[names[0]].devices)
        raise BundleError(f"--backend {wanted} runs on {devices}, not on {device}; use one of {', '.join(supported)}")
    reasons = [(name, BACKENDS[name].missing()) for name in names]
    if all(reason for _, reason in reasons):
        message = "; ".join(f"--backend {name} {reason}" for name, reason in reasons)
        raise BundleError(f"{message}; or use --backend auto")


def _fastest(
    trial: "_Trial", names: tuple[str, ...], most: int, folder: Path, *, forced: bool
) -> tuple[Forward, Choice]:
    if not forced:
        logger.info("timing %s; the choice is stored for the next start", ", ".join(names))
    rates: dict[str, float] = {}
    dropped: dict[str, str] = {}
    tries: list[tuple[float, str, int, Forward]] = []
    for position, name in enumerate(names):
        progress.stage(f"converting and timing the backend {name}", position, len(names))
        for threads in dict.fromkeys((most, 1)) if trial.on_cpu else (most,):
            torch.set_num_threads(threads)
            try:
                forward = trial.agreeing(name)
                rate = trial.rate(forward)
            except Exception as err:
                dropped[name] = first_line(err)
                break
            rates[f"{name}/{threads}" if trial.on_cpu else name] = round(rate, 1)
            tries.append((rate, name, threads, forward))
    if not tries:
        message = "; ".join(f"--backend {name}: {reason}" for name, reason in dropped.items())
        raise BundleError(f"{message}; use --backend auto for the fastest that works on this machine")
    short = any(threads == 1 and BATCH / rate < LONG_S for rate, _, threads, _ in tries)
    eligible = [each for each in tries if each[2] == 1] if short else tries
    _, name, threads, forward = max(eligible, key=lambda each: each[0] / (WORTH if each[2] > 1 else 1))
    choice = Choice(name, threads, rates, dropped)
    torch.set_num_threads(threads)
    if not forced:
        logger.info("chose the backend %s; images a second: %s", name, rates)
        _store_choice(folder, choice)
    return forward, choice


class _Trial:
    """Compares backends with plain float32 on the golden images, and times them."""

    def __init__(self, bundle: Bundle, network: FeatureClassifier, images: Tensor, folder: Path) -> None:
        self._bundle, self._network, self._images, self._folder = bundle, network, images, folder
        self._from_earlier_start = {
            folder / file for backend in BACKENDS.values() for file in backend.files if (folder / file).exists()
        }
        self.on_cpu = images.device.type == "cpu"
        self._options: dict[str, Any] = {"task": bundle.info.task, "temperature": bundle.info.temperature}
        with torch.inference_mode():
            logits, self._embedding = network(images)
            self._expected = probabilities(logits, **self._options)

    def agreeing(self, name: str) -> Forward:
        """Build the backend `name`, and check it. If it fails with a network converted by an earlier start, convert the network again.
        ValueError if its predictions do not agree."""
        converted = self._from_earlier_start & {self._folder / file for file in BACKENDS[name].files}
        try:
            return self._agreeing(name)
        except Exception as err:
            if not converted:
                raise
            logger.warning("%s fails with its stored network; converting it again: %s", name, first_line(err))
        for file in converted:
            file.unlink(missing_ok=True)
        self._from_earlier_start -= converted
        return self._agreeing(name)

    def _agreeing(self, name: str) -> Forward:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # converters warn about their own code
            images = self._images if len(self._images) > 1 else self._images.repeat(2, 1, 1, 1)
            backend = BACKENDS[name]
            stored = all((self._folder / file).is_file() for file in backend.files)
            examples = self._calibration() if backend.int8 and not stored else images
            forward = backend.forward(self._network, examples.contiguous(), self._folder)
            logits, embedding = forward(self._images)
            predicted = probabilities(logits, **self._options)
        gap = float((predicted - self._expected).abs().max())
        if not gap <= (limit := BACKENDS[name].agreed):
            raise ValueError(
                f"changes a probability of the golden samples by {gap:.2g} from float32; the limit is {limit}"
            )
        if differing := int((predicted.argmax(1) != self._expected.argmax(1)).sum()):
            raise ValueError(f"predicts another label than float32 for {differing} of {len(predicted)} golden samples")
        alike = ALIKE_INT8 if BACKENDS[name].int8 else ALIKE
        if embedding.shape[1] and not (cosine := _cosine(embedding, self._embedding)) >= alike:
            raise ValueError(
                f"gives a golden sample an embedding with a cosine of {cosine:.3f} to that of float32; the limit is {alike}"
            )
        return forward

    def _calibration(self) -> Tensor:
        """Return the images on which an 8-bit backend measures the ranges of activations, uint8 N×3×H×W."""
        resize = replace(Preprocess.from_dict(self._bundle.info.preprocess), resize="squash")
        golden_images = self._images.permute(0, 2, 3, 1).cpu().numpy()
        images = calibration_images(golden_images, self._bundle.training_features(), resize)
        return torch.from_numpy(images).permute(0, 3, 1, 2).to(self._images.device)

    def change(self, stored: Choice, forward: Forward) -> float:
        """Return how many times faster the backend is than when it was chosen. If it is much slower, the result is relative to plain
        PyTorch, which other load on the machine slows too: under such load no new choice is made."""
        change = self.rate(forward) / stored.rate
        if change > 1 / STEADY or stored.name == "eager":
            return max(change, 1.0)
        eager = "eager" if "eager" in stored.rates else f"eager/{stored.threads}"
        plain = self.rate(BACKENDS["eager"].forward(self._network, self._images, self._folder))
        return min(1.0, change * stored.rates[eager] / plain)

    def rate(self, forward: Forward) -> float:
        """Return the images a second, from the median time of a batch."""
        batch = self._images.repeat(-(-BATCH // len(self._images)), 1, 1, 1)[:BATCH]
        times: list[float] = []
        with torch.inference_mode():
            forward(batch)[0].sum().item()
            while len(times) < ROUNDS and sum(times) < SECONDS:
                start = time.perf_counter()
                forward(batch)[0].sum().item()
                times.append(time.perf_counter() - start)
        return BATCH / sorted(times)[len(times) // 2]


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the smallest cosine of two embeddings of a sample. An embedding of zeros equals only zeros."""
    cosines = cosine_similarity(one, other, dim=1)
    return float(torch.where((one == other).all(dim=1), 1.0, cosines).min())


def _key(bundle: Bundle, device: torch.device, threads: int) -> str:
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} {os.cpu_count()} {threads}"
    )
    named = {backend.requires[0] for backend in BACKENDS.values() if backend.requires}
    packages = [name for name in ("refract", "torch", *sorted(named)) if importlib.util.find_spec(name)]
    facts = [
        bundle.digest,
        machine,
        f"int8 of {weight_bits()} bits by training images",
        *(f"{name} {version(name)}" for name in packages),
    ]
    facts += [f"{plugin.name} {plugin.sha256}" for plugin in loaded()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _load_choice(folder: Path) -> Choice | None:
    try:
        return Choice(**json.loads((folder / "kept.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _store_choice(folder: Path, choice: Choice) -> None:
    store(folder, "json", lambda part: part.write_text(json.dumps(asdict(choice), indent=1), "utf-8"))
