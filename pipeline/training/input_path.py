"""Choose where a training on a GPU decodes and augments its images: in worker processes, or on the GPU.

Neither the decoders' speeds nor the network's decide this alone: workers cost the GPU no time as long as they keep up with it. Steps of
the training itself are therefore timed with both.
"""

import gc
import logging
import math
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

from refract.errors import first_line
from refract.pipeline.config.sections import TrainerConfig
from refract.pipeline.stopping import Stop, Stopped, stop_requests
from refract.pipeline.training.fit import Assembly, interrupts_raised
from refract.progress import Progress

if TYPE_CHECKING:
    from refract.augment.executors.jpeg_batch import StoredImage
    from refract.pipeline.data.datamodule import ImageDataModule

log = logging.getLogger(__name__)

LONG = 1_000_000
"""Images that a training reads at least, over all epochs, for `auto` to time the input paths: about 160 steps."""

STEPS = 64
"""Timed steps, at least. Workers deliver one batch each at about the same time: fewer steps do not average over that."""

GAIN = 1.1
"""The speed of the device relative to workers at which it is chosen: workers give the pixels of a training on the CPU."""

SAMPLES, AGREES = 16, 5.0
"""Images that are compared, and the mean difference in grey levels up to which the device's decoder agrees: it may round and upsample
colours in its own way."""


def choose_input_path(assembly: Assembly) -> Assembly:
    """Return the assembly with the faster path in place of `auto` in data.decode_on, and set its data module to that path.

    An assembly whose paths are not timed is returned unchanged: `auto` then means workers. If the comparison fails, workers are chosen.
    Logs a warning for `device` without effect.
    """
    if assembly.config.data.decode_on != "auto":
        _warn(assembly)
        return assembly
    if reason := why_not_timed(assembly):
        log.log(logging.INFO if assembly.device == "cuda" else logging.DEBUG, "workers decode the images: %s", reason)
        return assembly
    try:
        rates = timed_paths(assembly)
    except Stopped:
        raise
    except Exception as error:  # of any library, such as too little memory: the training does not need the comparison
        log.warning("workers decode the images: the input paths could not be compared (%s)", first_line(error))
        rates = {}
    finally:
        gc.collect()  # also the copy of the network that an error's frames held
        _forget_compiled(assembly.config.trainer)
    place = faster(rates)
    assembly.data.decode_on(place)
    if rates:
        measured = ", ".join(f"{path} {rate:,.0f} images/s" for path, rate in rates.items())
        log.info("data.decode_on: %s (%s)", place, measured)
    return replace(assembly, config=assembly.config.changed({"data.decode_on": place}), timed_input=True)


def _forget_compiled(config: TrainerConfig) -> None:
    """Forget the graphs of the copies: the training would use them, where it otherwise compiles others."""
    if config.compile:
        import torch

        torch._dynamo.reset()


def _warn(assembly: Assembly) -> None:
    if assembly.config.data.decode_on != "device":
        return
    if assembly.data.in_memory:
        log.warning(
            "data.decode_on: device has no effect on images in memory; set data.memory: never, or data.decode_on: auto"
        )
    elif not assembly.data.can_decode_on_device or assembly.config.model.on_embeddings:
        log.warning("data.decode_on: device has no effect, as no image is augmented; set data.decode_on: auto")
    elif assembly.device == "cpu":
        log.warning(
            "data.decode_on: device, but there is no GPU: the training process decodes; set data.decode_on: workers"
        )


def why_not_timed(assembly: Assembly) -> str | None:
    """Return why workers decode without a comparison; None if the paths are to be timed."""
    import torch

    config, data = assembly.config, assembly.data
    if assembly.device != "cuda":
        return "there is no GPU"
    if assembly.ranks.count > 1:
        return "several ranks train"
    if not data.can_decode_on_device or config.model.on_embeddings:
        return "no single images are read from files in each epoch"
    if torch.are_deterministic_algorithms_enabled():
        return "a choice by time is not deterministic"
    if len(data.train_set) * config.trainer.max_epochs < LONG:
        return f"the training reads fewer than {LONG:,} images"
    if not _files(data):
        return "the device decodes none of the files"
    return None


def timed_paths(assembly: Assembly, *, steps: int = STEPS) -> dict[str, float]:
    """Return the images per second of training steps, by `workers` and, if it agrees with them, by `device`.

    The steps are those of an epoch that trains all layers on images of full size. The module, the random generators and the data module are
    unchanged afterwards, also after an error: RuntimeError for too little memory, ImageError if the device cannot decode, Stopped after a
    stop request, and the errors of a training.
    """
    from refract.pipeline.training.callbacks.checkpoints import random_states, set_random_states

    states = random_states()
    try:
        return _rates(assembly, steps)
    finally:
        set_random_states(states)


def _rates(assembly: Assembly, steps: int) -> dict[str, float]:
    rates = {}
    total = 2 * (_warm_up(assembly.data.workers) + steps)
    with (
        Progress("timing the input paths", total, unit="steps") as progress,
        stop_requests("after this step") as stop,
    ):
        for place in ("workers", "device"):
            assembly.data.decode_on(place)
            try:
                if place == "workers" or _agrees(assembly):
                    rates[place] = assembly.data.batch_size / _step_seconds(assembly, steps, progress, stop)
            except (Exception, KeyboardInterrupt):
                _check(stop)  # a stop request takes precedence over what failed meanwhile
                raise
            finally:
                assembly.data.decode_on("workers")
                gc.collect()  # ends the loader's worker processes, and frees the copy of the network
            _check(stop)
    return rates


def _check(stop: Stop) -> None:
    """Raise Stopped after a stop request."""
    if stop.signal is not None:
        log.warning("the training has not started; the same command starts it")
        raise Stopped(stop.signal)


def faster(rates: Mapping[str, float]) -> str:
    """Return the input path for rates of `timed_paths`; `workers` without rates."""
    return "device" if rates.get("device", 0.0) > GAIN * rates.get("workers", math.inf) else "workers"


def _agrees(assembly: Assembly) -> bool:
    largest = difference(assembly.data, assembly.device)
    if largest > AGREES:
        log.warning("the device's images differ from those of the CPU by up to %.1f grey levels", largest)
    return largest <= AGREES


def difference(data: "ImageDataModule", device: str) -> float:
    """Return the largest mean difference, in grey levels, between training images that the device decodes and the CPU decodes.

    Compares up to SAMPLES images that are spread over the data set. Both are decoded whole and only resized, as a reduced scale or an op
    such as Equalize changes more than a decoder does. ImageError if the device cannot decode one of them.
    """
    import torch

    from refract.augment import Augmenter, decode
    from refract.augment.executors import jpeg_batch, torch_batch

    files = _files(data)
    if not files:
        return 0.0
    resize = Augmenter("none", size=data.train_set.augmenter.size)
    plans = [resize.draw((header.height, header.width), epoch=0, index=0) for _, header in files]
    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file, _ in files]
    place = torch.empty(0, device=device).device  # with its index
    images = jpeg_batch.run(plans, encoded, [header.orientation for _, header in files], place)
    expected = torch_batch.run(plans, [torch.from_numpy(decode(file)).permute(2, 0, 1) for file, _ in files])
    return float((images.cpu().int() - expected.int()).abs().float().mean((1, 2, 3)).max())


def _files(data: "ImageDataModule") -> "list[tuple[bytes, StoredImage]]":
    """Return, of up to SAMPLES training samples that are spread over the data set, the files that a device decodes."""
    import numpy as np

    from refract.augment.executors.jpeg_batch import header_of
    from refract.pipeline.data.datasets import named

    count, profile = len(data.train_set), data.train_set.augmenter.color_profile
    indices = np.unique(np.linspace(0, count - 1, SAMPLES).astype(int)).tolist()
    files = [named(data.train_set.samples[index], bytes) for index in indices]
    return [(file, header) for file in files if (header := header_of(file, color_profile=profile))]


def _warm_up(workers: int) -> int:
    """Return the steps before the timed ones: kernels are chosen, and the batches that workers had ready are used up."""
    from refract.pipeline.data.loader import PREFETCH

    return 8 + PREFETCH * workers


def _step_seconds(assembly: Assembly, steps: int, progress: Progress, stop: Stop) -> float:
    """Train a copy of the module, after a warm-up for `steps` steps. Returns their mean seconds; infinite after a stop request."""
    from refract.pipeline.training.callbacks.step_timer import CountSteps, StepTimer
    from refract.pipeline.training.finders import trial_trainer

    module = deepcopy(assembly.module)
    module.start_size, module.unfreeze_epochs = 1.0, 0
    if assembly.config.trainer.compile:
        module.classifier.network.compile()
    # Not the trainer's profiler: the timer waits for the device at its start and its end alone.
    timer = StepTimer(assembly.device, ())
    count = CountSteps(timer, _warm_up(assembly.data.workers), steps, progress.update, stop)
    try:
        with tempfile.TemporaryDirectory() as folder, interrupts_raised():
            trainer = trial_trainer(assembly, folder, assembly.accumulate, callbacks=[count])
            trainer.fit(module, datamodule=assembly.data)
    finally:
        assembly.data.trainer = None
        assembly.data.order.set_epoch(0)
    return timer.step_ms / 1000 or math.inf
