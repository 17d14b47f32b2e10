"""The stages of the program, what each measures, and the goals. Imports nothing heavy."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

BACKENDS = ("eager", "bf16", "fp16", "cuda-graphs", "compiled")
BATCHES = (1, 8, 32, 128)
SERVED = ("resnet50", "vit_b_16")


@dataclass(frozen=True)
class Measure:
    """One number. unit: "" for a ratio; goal: None where there is none; at_most: whether the goal is an upper bound."""

    name: str
    unit: str = ""
    goal: float | None = None
    at_most: bool = False

    def met(self, value: float) -> bool | None:
        """Whether the value reaches the goal, None without a goal."""
        if self.goal is None:
            return None
        return value <= self.goal if self.at_most else value >= self.goal


@dataclass(frozen=True)
class Stage:
    """module: of this package, with `run(options, record, clock)`; weight: of the time, relative to the other stages; quick_weight:
    with --quick."""

    module: str
    weight: int
    quick_weight: int
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Options:
    """device: cuda or cpu; cifar: a tar of train|test/CLASS/*.jpg; quick: tiny networks and images, to test the program itself; work:
    a folder for temporary files."""

    device: str
    cifar: Path | None
    quick: bool
    work: Path


class Clock:
    """The time of a stage. seconds: from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())


def _serving(network: str) -> Iterator[Measure]:
    for backend in BACKENDS:
        for size in BATCHES:
            yield Measure(f"{network} {backend}, batch {size}", "images/s")
    yield Measure(f"{network} batch-1 inference", "ms")
    yield Measure(f"{network} JPEG decoding", "images/s")
    yield Measure(f"{network} HTTP at the limit", "images/s")
    yield Measure(f"{network} p50 at the limit", "ms")
    yield Measure(f"{network} p99 at the limit", "ms")
    yield Measure(f"{network} p50 at half load", "ms")
    yield Measure(f"{network} p99 at half load", "ms")
    yield Measure(f"{network} HTTP / min(engine, decoding)", goal=0.85)
    yield Measure(f"{network} p99 at half load / (2.5 × inference + wait)", goal=1.0, at_most=True)


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "correctness": Stage(
            "correctness",
            100,
            100,
            (
                Measure("tests passed"),
                Measure("tests failed", goal=0, at_most=True),
                Measure("tests skipped"),
            ),
        ),
        "augment": Stage(
            "augment",
            20,
            22,
            (
                Measure("Refract", "images/s"),
                Measure("Refract bandwidth", "GB/s"),
                Measure("copy bandwidth", "GB/s"),
                Measure("plans of one batch", "ms"),
                Measure("kornia", "images/s"),
                Measure("torchvision v2", "images/s"),
                Measure("Refract / copy bandwidth", goal=0.5),
                Measure("Refract / kornia", goal=20),
                Measure("Refract / torchvision v2"),
            ),
        ),
        "input": Stage(
            "inputs",
            55,
            28,
            (
                Measure("loading, decode_on: workers", "images/s"),
                Measure("loading, decode_on: device", "images/s"),
                Measure("ResNet-50 step", "ms"),
                Measure("waiting fraction, decode_on: workers"),
                Measure("waiting fraction, decode_on: device"),
                Measure("difference of the paths' images", "grey levels", goal=5, at_most=True),
                Measure("training, decode_on: workers", "images/s"),
                Measure("training, decode_on: device", "images/s"),
            ),
        ),
        "cifar": Stage(
            "cifar",
            60,
            28,
            (
                Measure("preparation", "s"),
                Measure("plain training", "s"),
                Measure("plain accuracy with TTA"),
                Measure("Refract training", "s"),
                Measure("Refract fit with validation and checkpoints", "s"),
                Measure("plans of all epochs", "s"),
                Measure("Refract accuracy"),
                Measure("Refract accuracy with TTA", goal=0.94),
                Measure("Refract / plain training", goal=1.1, at_most=True),
            ),
        ),
        "resnet": Stage(
            "resnet",
            85,
            25,
            (
                Measure("plain, eager", "images/s"),
                Measure("Refract, eager", "images/s"),
                Measure("Refract / plain, eager"),
                Measure("compilation", "s"),
                Measure("plain, compiled", "images/s"),
                Measure("Refract, compiled", "images/s"),
                Measure("Refract / plain, compiled", goal=0.97),
                Measure("bf16 matrix product", "TFLOP/s"),
                Measure("model FLOPs utilisation"),
            ),
        ),
        "serving": Stage("serving", 110, 32, tuple(measure for name in SERVED for measure in _serving(name))),
    }
)
