"""Choose where a training on a GPU decodes and augments its images: in worker processes, or on the GPU.

Neither the decoders' speeds nor the network's decide this alone: workers cost the GPU no time as long as they keep up with it. Steps of
the training itself are therefore timed with both.
"""

import gc
import logging
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

from refract.augment import ImageError
from refract.augment.executors.jpeg_batch import header_of
from refract.pipeline.training.fit import Assembly, interrupts_raised
from refract.progress import Progress

if TYPE_CHECKING:
    from refract.pipeline.data.datamodule import ImageDataModule

log = logging.getLogger(__name__)

LONG = 1_000_000
"""Images that a training reads at least, over all epochs, for `auto` to time the input paths: that takes some seconds."""

WARM_UP, STEPS = 5, 20
"""Steps before the timed ones, in which workers start and kernels are chosen; and timed steps."""

GAIN = 1.05
"""The speed of the device relative to workers at which it is chosen: workers give the pixels of a training on the CPU."""

SAMPLES, AGREES = 16, 5.0
"""Images that are compared, and the mean difference in grey levels up to which the device agrees. Its decoder differs by about one level:
it upsamples colours in another way, and does not decode at a reduced scale."""


def choose_input_path(assembly: Assembly) -> Assembly:
    """Return the assembly with the faster path in place of `auto` in data.decode_on, and set its data module to that path.

    An assembly whose paths are not timed is returned unchanged: `auto` then means workers. Logs a warning for `device` without effect.
    """
    if assembly.config.data.decode_on != "auto":
        _warn(assembly)
        return assembly
    if reason := why_not_timed(assembly):
        log.debug("workers decode, as %s", reason)
        return assembly
    try:
        rates = timed_paths(assembly)
    except (RuntimeError, FloatingPointError, ImageError) as error:
        # Too little memory, a training that diverges, or a device that cannot decode: if the training itself fails, it says why.
        log.warning("workers decode, as the input paths could not be compared: %s", str(error).splitlines()[0])
        return assembly
    place = faster(rates)
    assembly.data.decode_on(place)
    log.info(
        "data.decode_on: %s (%s)", place, ", ".join(f"{path} {rate:,.0f} images/s" for path, rate in rates.items())
    )
    return replace(assembly, config=assembly.config.changed({"data.decode_on": place}))


def _warn(assembly: Assembly) -> None:
    if assembly.config.data.decode_on != "device":
        return
    if not assembly.data.can_decode_on_device:
        log.warning(
            "data.decode_on: device has no effect, as the images stay in memory or none are read; set data.memory: never"
        )
    elif assembly.device == "cpu":
        log.warning(
            "data.decode_on: device, but there is no GPU: the training process decodes; data.decode_on: workers is faster"
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
    files = (data.train_set.samples[index].read() for _, index, _ in _spread(data))
    if not any(header_of(file, color_profile=data.train_set.augmenter.color_profile) for file in files):
        return "the device decodes none of the files"
    return None


def timed_paths(assembly: Assembly, *, steps: int = STEPS) -> dict[str, float]:
    """Return the images per second of training steps, by `workers` and, if it agrees with them, by `device`.

    The module, the random generators and the data module are unchanged afterwards. RuntimeError for too little memory, ImageError if the
    device cannot decode, FloatingPointError for a training that diverges.
    """
    from refract.models.training.lightning_imports import isolate_rng

    rates = {}
    with Progress("timing the input paths", 2 * (WARM_UP + steps), unit="steps") as progress, isolate_rng():
        for place in ("workers", "device"):
            assembly.data.decode_on(place)
            try:
                if place == "device" and (off := difference(assembly.data, assembly.device)) > AGREES:
                    log.warning("the device's images differ from those of workers by %.1f grey levels", off)
                    break
                rates[place] = 1000 * assembly.data.batch_size / _step_ms(assembly, steps, progress)
            finally:
                assembly.data.decode_on("workers")
                gc.collect()  # ends the loader's worker processes, and frees the copy of the network
    return rates


def faster(rates: Mapping[str, float]) -> str:
    """Return the input path for rates of `timed_paths`."""
    return "device" if rates.get("device", 0.0) > GAIN * rates["workers"] else "workers"


def difference(data: "ImageDataModule", device: str) -> float:
    """Return the largest mean difference, in grey levels, between training images of the device and of workers.

    Compares up to SAMPLES images that are spread over the data set. data: decodes on the device. ImageError if that fails.
    """
    import numpy as np
    import torch

    from refract.pipeline.data.encoded_batches import collate_encoded, images_by_device

    keys, place = _spread(data), torch.empty(0, device=device).device  # with its index
    batch = collate_encoded([data.train_set[key] for key in keys])
    batch |= {name: value.to(place) for name, value in batch.items() if name == "images"}
    expected = np.stack([data.train_set.image(key) for key in keys])
    images = images_by_device(batch, data.train_set, place).permute(0, 2, 3, 1).cpu().numpy()
    return float(np.abs(images.astype(int) - expected).mean((1, 2, 3)).max())


def _spread(data: "ImageDataModule") -> list[tuple[int, int, int]]:
    """Return the keys of up to SAMPLES training samples, spread over the data set."""
    import numpy as np

    indices = np.unique(np.linspace(0, len(data.train_set) - 1, SAMPLES).astype(int))
    return [(0, index, 0) for index in indices.tolist()]


def _step_ms(assembly: Assembly, steps: int, progress: Progress) -> float:
    """Train a copy of the module for WARM_UP and `steps` steps. Returns the mean milliseconds of the latter."""
    from refract.pipeline.training.callbacks.step_timer import CountSteps, StepTimer
    from refract.pipeline.training.finders import trial_trainer

    module = deepcopy(assembly.module)
    if assembly.config.trainer.compile:
        module.classifier.network.compile()
    timer = StepTimer(
        assembly.device, ()
    )  # not the trainer's profiler: it waits for the device at its start and its end alone
    count = CountSteps(timer, WARM_UP, steps, progress.update)
    with tempfile.TemporaryDirectory() as folder, interrupts_raised():
        trainer = trial_trainer(assembly, folder, assembly.accumulate, callbacks=[count])
        trainer.fit(module, datamodule=assembly.data)
    assembly.data.trainer = None
    assembly.data.order.set_epoch(0)
    return timer.step_ms
