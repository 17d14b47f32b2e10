"""The choice of the fastest backend that agrees with plain float32 on this machine."""

import hashlib
import importlib.util
import json
import logging
import os
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refract.models.bundle.bundle import Bundle, BundleError
from refract.models.classifier import Classifier, probabilities
from refract.serve.runtime.backends import BACKENDS, INT8
from refract.serve.runtime.backends.base import Forward, first_line
from refract.serve.runtime.backends.kept import store
from refract.serve.runtime.backends.quantised import weight_bits

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/refract/backends")

THREADS = torch.get_num_threads()
"""That PyTorch would use by itself; a choice may set fewer, and the next one begins from all again."""

WORTH = 1.2
"""How many times faster more threads must be: decoding and HTTP want cores too."""

LONG_S = 0.005
"""What a batch must take one thread for others to help: between short ones they wait awake, and take the cores from decoding and HTTP."""

STEADY = 1.5
"""How many times faster than when it was chosen a backend may be for the choice to stand, as the machine was busy then; and how many
times slower beside plain PyTorch."""

BATCH, ROUNDS, SECONDS = 8, 5, 2.0
"""Images in a timed batch; how often it is timed, at most for so long."""


@dataclass(frozen=True)
class Choice:
    """name: of the backend; threads: of a CPU that compute one batch; rates: images a second of each that was tried, `NAME/threads` on a
    CPU; dropped: those that were not, with the reason."""

    name: str
    threads: int
    rates: dict[str, float]
    dropped: dict[str, str]

    @property
    def agreed(self) -> float:
        """Largest difference of its probabilities from plain float32's."""
        return BACKENDS[self.name].agreed

    @property
    def rate(self) -> float:
        """Of the chosen one."""
        return self.rates.get(f"{self.name}/{self.threads}") or self.rates[self.name]


def candidates(device: torch.device) -> tuple[str, ...]:
    """Names of the backends that `auto` times on this device."""
    return tuple(backend.name for backend in BACKENDS.values() if backend.offered(device))


def choose(
    bundle: Bundle,
    classifier: Classifier,
    images: np.ndarray,
    *,
    wanted: str = "auto",
    threads: int = THREADS,
    cache: Path | None = None,
) -> tuple[Forward, Choice]:
    """The fastest way for this bundle on this machine that agrees with plain float32 on `images`, the golden images, uint8 N×H×W×3: the
    same likeliest label, probabilities within AGREED. wanted: a name of BACKENDS is taken, if it agrees, those of INT8 within INT8_AGREED;
    int8 is the fastest of INT8. threads: of a CPU, at most. The choice is kept in `cache`, by default ~/.cache/refract/backends, for the
    bundle, the machine and the versions.

    ValueError for a name that is none; BundleError where a wanted one is not installed, does not compute on this device, or does not agree.
    """
    if wanted not in ("auto", "int8", *BACKENDS):
        raise ValueError(f"backend: {wanted!r} is none of auto, int8, {', '.join(BACKENDS)}")
    device = next(classifier.parameters()).device
    names = {"auto": candidates(device), "int8": INT8}.get(wanted, (wanted,))
    if wanted != "auto":
        _check_wanted(wanted, names, device)
    folder = (cache or CACHE).expanduser() / _key(bundle, device, threads)
    tensor = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    trial = _Trial(bundle, classifier, tensor, folder)
    kept = _kept(folder) if wanted == "auto" else None
    if kept is not None and kept.name in names:
        try:
            torch.set_num_threads(kept.threads)
            forward = trial.agreeing(kept.name)
            change = trial.change(kept, forward)
            if 1 / STEADY < change < STEADY:
                return forward, kept
            told = f"{change:.1f} times faster" if change > 1 else f"{1 / change:.1f} times slower beside plain PyTorch"
            logger.info("%s is %s than when it was chosen; the backend is chosen anew", kept.name, told)
        except Exception as err:  # of any kind: these are four libraries; what does not work any more is chosen anew
            logger.warning("the backend %s, chosen before, does not work now: %s", kept.name, first_line(err))
    return _fastest(trial, names, threads, folder, forced=wanted != "auto")


def _check_wanted(wanted: str, names: tuple[str, ...], device: torch.device) -> None:
    """BundleError where none of `names` computes on the device of this machine."""
    if not any(device.type in BACKENDS[name].devices for name in names):
        there = ", ".join(["auto", *(name for name, backend in BACKENDS.items() if device.type in backend.devices)])
        devices = " and ".join(BACKENDS[names[0]].devices)
        raise BundleError(f"--backend {wanted} computes on {devices}, not on {device}; take one of {there}")
    reasons = [(name, BACKENDS[name].missing(device)) for name in names]
    if all(reason for _, reason in reasons):
        named = "; ".join(f"--backend {name} {reason}" for name, reason in reasons)
        raise BundleError(f"{named}; or take --backend auto")


def _fastest(
    trial: "_Trial", names: tuple[str, ...], most: int, folder: Path, *, forced: bool
) -> tuple[Forward, Choice]:
    if not forced:
        logger.info("timing %s; the choice is kept for the next start", ", ".join(names))
    rates: dict[str, float] = {}
    dropped: dict[str, str] = {}
    tries: list[tuple[float, str, int, Forward]] = []
    for name in names:
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
        told = "; ".join(f"--backend {name}: {why}" for name, why in dropped.items())
        raise BundleError(f"{told}; --backend auto takes the fastest of those that work here")
    short = any(one[2] == 1 and BATCH / one[0] < LONG_S for one in tries)
    worth = [one for one in tries if one[2] == 1] if short else tries
    _, name, threads, forward = max(worth, key=lambda one: one[0] / (WORTH if one[2] > 1 else 1))
    choice = Choice(name, threads, rates, dropped)
    torch.set_num_threads(threads)
    if not forced:
        logger.info("%s is taken; images a second: %s", name, rates)
        _keep(folder, choice)
    return forward, choice


class _Trial:
    """The golden images, and what plain float32 says to them."""

    def __init__(self, bundle: Bundle, classifier: Classifier, images: Tensor, folder: Path) -> None:
        self._classifier, self._images, self._folder = classifier, images, folder
        self._older = {
            folder / file for backend in BACKENDS.values() for file in backend.files if (folder / file).exists()
        }
        self.on_cpu = images.device.type == "cpu"
        self._options: dict[str, Any] = {"task": bundle.info.task, "temperature": bundle.info.temperature}
        with torch.inference_mode():
            self._wanted = probabilities(classifier(images), **self._options)

    def agreeing(self, name: str) -> Forward:
        """ValueError where it answers otherwise. What fails with a network that an earlier start kept is tried with one converted anew."""
        kept = self._older & {self._folder / file for file in BACKENDS[name].files}
        try:
            return self._agreeing(name)
        except Exception as err:
            if not kept:
                raise
            logger.warning("%s does not work with what is kept of it, which is made anew: %s", name, first_line(err))
        for file in kept:
            file.unlink(missing_ok=True)
        self._older -= kept
        return self._agreeing(name)

    def _agreeing(self, name: str) -> Forward:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of converters, about themselves
            images = self._images if len(self._images) > 1 else self._images.repeat(2, 1, 1, 1)
            forward = BACKENDS[name].build(self._classifier, images.contiguous(), self._folder)
            found = probabilities(forward(self._images), **self._options)
        gap = float((found - self._wanted).abs().max())
        if not gap <= (limit := BACKENDS[name].agreed):
            raise ValueError(
                f"moves a probability of the golden samples by {gap:.2g} from float32's; the limit is {limit}"
            )
        if others := int((found.argmax(1) != self._wanted.argmax(1)).sum()):
            raise ValueError(f"gives {others} of {len(found)} golden samples another label than float32")
        return forward

    def change(self, kept: Choice, forward: Forward) -> float:
        """How many times faster than when it was kept; where it is much slower, beside plain PyTorch, which the rest of the machine slows
        too: while others work is no time to choose."""
        change = self.rate(forward) / kept.rate
        if change > 1 / STEADY or kept.name == "eager":
            return max(change, 1.0)
        eager = "eager" if "eager" in kept.rates else f"eager/{kept.threads}"
        plain = self.rate(BACKENDS["eager"].build(self._classifier, self._images, self._folder))
        return min(1.0, change * kept.rates[eager] / plain)

    def rate(self, forward: Forward) -> float:
        """Images a second, in batches."""
        batch = self._images.repeat(-(-BATCH // len(self._images)), 1, 1, 1)[:BATCH]
        times: list[float] = []
        with torch.inference_mode():
            forward(batch).sum().item()
            while len(times) < ROUNDS and sum(times) < SECONDS:
                began = time.perf_counter()
                forward(batch).sum().item()
                times.append(time.perf_counter() - began)
        return BATCH / sorted(times)[len(times) // 2]


def _key(bundle: Bundle, device: torch.device, threads: int) -> str:
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} {os.cpu_count()} {threads}"
    )
    packages = [name for name in ("refract", "torch", "openvino", "onnxruntime") if importlib.util.find_spec(name)]
    facts = [bundle.digest, machine, f"int8 of {weight_bits()} bits", *(f"{name} {version(name)}" for name in packages)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _kept(folder: Path) -> Choice | None:
    try:
        return Choice(**json.loads((folder / "kept.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _keep(folder: Path, choice: Choice) -> None:
    store(folder, "json", lambda part: part.write_text(json.dumps(asdict(choice), indent=1), "utf-8"))
