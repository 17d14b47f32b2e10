"""Time the stages of a real training, find the slowest one, and try the setting that should lift it.

The stages of the process are timed while Lightning trains. Those of an image (read, decode, augment) are timed on one core beforehand, as
they run in worker processes.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from refract.cores import cores
from refract.pipeline.config.config import Config, ConfigError
from refract.progress import Progress

if TYPE_CHECKING:
    from refract.pipeline.training.callbacks.step_timer import StepTimer
    from refract.pipeline.training.fit import Assembly

WARM_UP = 5
"""Steps before the timed ones: workers start, caches fill, kernels are chosen."""

IMAGES = 32
"""Images whose reading, decoding and augmentation is timed."""

REPEATS = 3

WAITS = 0.15
"""Fraction of a step that a training may wait for its batch before the input is the bottleneck."""

STEP_STAGES = ("wait", "transfer", "images", "forward", "backward", "optimiser", "callbacks")
"""`images`: decoding and augmentation on the device."""

INPUT_STAGES = ("read", "decode", "augment", "collate")

ACTIONS = (
    ("dataloader_next", "wait"),
    ("on_after_batch_transfer", "images"),
    ("batch_to_device", "transfer"),
    (".training_step", "forward"),
    (".backward", "backward"),
    ("optimizer_", "optimiser"),
    ("[Callback]", "callbacks"),
)
"""Part of the name of an action of Lightning's profiler → its stage. The time of an action excludes the actions within it."""


@dataclass(frozen=True)
class InputCost:
    """Milliseconds of one core for an image, by stage; bytes of a decoded image; name and milliseconds of its slowest augmentation."""

    read: float
    decode: float
    augment: float
    decoded_bytes: float = 0
    slowest: tuple[str, float] | None = None


@dataclass(frozen=True)
class Profile:
    """The times of a training's steps.

    step: milliseconds of a step; stages: stage → its milliseconds in a step, of the process for STEP_STAGES, of one core for
    INPUT_STAGES; workers, cores: loader processes, and cores that the process may use; slowest: name and milliseconds of the slowest
    augmentation of an image; decoded_bytes: memory of all decoded training images in bytes, estimated; decodes_on: `device`, `workers`
    where a GPU could decode, else None.
    """

    step: float
    stages: Mapping[str, float]
    workers: int
    cores: int
    batch_size: int
    decoded_bytes: int
    slowest: tuple[str, float] | None = None
    decodes_on: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)

    @property
    def bottleneck(self) -> str:
        """`read`, `decode`, `augment` or `collate` if the training waits for batches, else the slowest stage of a step."""
        if self.stages["wait"] > WAITS * self.step:
            return max(INPUT_STAGES, key=self.stages.__getitem__)
        return max(STEP_STAGES[1:], key=self.stages.__getitem__)

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch_size / self.step


def profile(config: Config, *, steps: int) -> Profile:
    """Train some steps and time their stages. Writes no run and keeps no weights.

    ConfigError for a mode without steps, and the errors of `assemble`.
    """
    from refract.pipeline.training.fit import assemble

    if config.model.on_embeddings:
        raise ConfigError(f"model.mode: {config.model.mode} fits a head on embeddings, and has no steps to profile")
    assembly = assemble(config.changed({"trainer.devices": 1, "tracking.enabled": False}))
    cost = input_cost(assembly)
    collate = _collate_ms(assembly)
    timer = _timed_steps(assembly, steps)
    size = min(assembly.data.batch_size, len(assembly.data.train_set))
    of_image = {"read": cost.read, "decode": cost.decode, "augment": cost.augment}
    stages = {name: timer.totals[name] / steps for name in STEP_STAGES}
    stages |= {name: size * milliseconds for name, milliseconds in of_image.items()} | {"collate": collate}
    decoded_bytes = int(cost.decoded_bytes * len(assembly.data.train_set))
    data = assembly.data
    other = "workers" if data.can_decode_on_device and assembly.device == "cuda" else None
    decodes_on = "device" if data.train_set.encoded else other
    facts = (data.workers, cores(), size, decoded_bytes, cost.slowest, decodes_on)
    return Profile(timer.step_ms, stages, *facts, events=timer.events)


def input_cost(assembly: "Assembly") -> InputCost:
    """Time the stages of up to IMAGES training images on one core.

    Images in memory are neither read nor decoded there, and files for a device are only read.
    """
    import numpy as np

    from refract.augment import image_size
    from refract.augment.executors.explain import explain
    from refract.augment.executors.jpeg_batch import header_of

    data = assembly.data.train_set
    chosen = np.unique(np.linspace(0, len(data) - 1, IMAGES).astype(int)).tolist()
    times: dict[str, float] = defaultdict(float)
    of_ops: dict[str, float] = defaultdict(float)
    decoded_bytes = 0
    for index in chosen:
        whole = _ms(partial(data.__getitem__, (0, index, 0)))
        read = decode = 0.0
        sample = data.samples[index]
        if sample.has_image and data.decoded is None and data.reads_images:
            read = _ms(sample.read)
            file = sample.read()
            height, width = image_size(file)
            decoded_bytes += 3 * height * width
            plan = data.augmenter.draw((height, width), epoch=0, index=index)
            on_device = data.encoded and header_of(file, color_profile=data.augmenter.color_profile) is not None
            for stage in () if on_device else explain(plan, file, repeats=REPEATS):
                if stage.name == "decode":
                    decode = 1000 * stage.seconds
                else:
                    of_ops[" + ".join(step.op for step in stage.steps) or stage.name] += 1000 * stage.seconds
        times["read"] += read
        times["decode"] += decode
        times["augment"] += max(0.0, whole - read - decode)
    slowest = max(of_ops.items(), key=lambda item: item[1], default=None)
    per_image = {name: total / len(chosen) for name, total in times.items()}
    name_and_ms = None if slowest is None else (slowest[0], slowest[1] / len(chosen))
    return InputCost(**per_image, decoded_bytes=decoded_bytes / len(chosen), slowest=name_and_ms)


def _collate_ms(assembly: "Assembly") -> float:
    data, size = assembly.data.train_set, min(assembly.data.batch_size, len(assembly.data.train_set))
    items = [data[(0, index, 0)] for index in range(min(size, IMAGES))]
    stack = assembly.data.stack
    return _ms(lambda: stack(items)) * size / len(items)


def _ms(work: Callable[[], object]) -> float:
    """Return the milliseconds of the fastest of REPEATS calls."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def _timed_steps(assembly: "Assembly", steps: int) -> "StepTimer":
    """Train WARM_UP and then `steps` steps with the callbacks that watch each step of a training."""
    from refract.pipeline.doctor.run import make_doctor
    from refract.pipeline.training.callbacks.step_timer import CountSteps, StepTimer
    from refract.pipeline.training.finders import trial_trainer

    timer = StepTimer(assembly.device, ACTIONS)
    with TemporaryDirectory() as folder, Progress("profiling", WARM_UP + steps, unit="steps") as progress:
        count = CountSteps(timer, WARM_UP, steps, progress.update)
        trainer = trial_trainer(assembly, folder, callbacks=[make_doctor(assembly), count], profiler=timer)
        trainer.fit(assembly.module, datamodule=assembly.data)
    return timer


def write_trace(profile: Profile, path: Path) -> None:
    """Write the stages of each step in the format of Chrome's tracing, which Perfetto also reads. OSError."""
    from refract.pipeline.files import write_atomically

    write_atomically(path, json.dumps({"traceEvents": profile.events, "displayTimeUnit": "ms"}).encode())
