"""Propose the settings that lift a training's bottleneck, and measure them."""

import os
from dataclasses import dataclass
from typing import Any

from refract.pipeline.config.config import Config
from refract.pipeline.data.loader import MOST_WORKERS
from refract.pipeline.training.profile import WAITS, Profile

MEMORY = 0.5
"""Fraction of the available memory that decoded images may take."""


@dataclass(frozen=True)
class Proposal:
    """A setting that may lift the bottleneck, and why. setting: key → value, empty for a change outside the config."""

    reason: str
    setting: dict[str, Any]

    @property
    def options(self) -> str:
        """The setting as options of the command line."""
        return " ".join(f"--{key} {value}" for key, value in self.setting.items())


def explanation(profile: Profile) -> str:
    """Return why the bottleneck is one, as a sentence."""
    stage, step = profile.bottleneck, profile.step
    if profile.stages["wait"] > WAITS * step:
        waits = profile.stages["wait"] / step
        return (
            f"{stage}: the training waits for {waits:.0%} of each step, and {stage} takes most of the time of a batch"
        )
    return f"{stage}: {profile.stages[stage] / step:.0%} of each step"


def proposals(profile: Profile, config: Config) -> list[Proposal]:
    """Return the settings to try for the bottleneck, the most promising first."""
    stage = profile.bottleneck
    if profile.stages["wait"] > WAITS * profile.step:
        return _for_input(profile, config)
    options = []
    if stage in ("forward", "backward"):
        if config.trainer.precision == "fp32":
            options.append(
                Proposal("computes in 16 bits if the device is faster in them", {"trainer.precision": "auto"})
            )
        side = min(config.data.sides())
        if side >= 64:
            smaller = {"data.image_size": side * 3 // 4 // 8 * 8}
            options.append(Proposal("smaller images; check the accuracy", smaller))
        options.append(Proposal("a smaller network", {}))
    if stage == "images" and profile.decodes_on == "device":
        options.append(Proposal("processes decode and augment in place of the device", {"data.decode_on": "workers"}))
    if stage in ("optimiser", "callbacks"):
        if stage == "optimiser" and config.optim.name not in ("adamw", "sgd"):
            options.append(Proposal("a cheaper optimiser; check the accuracy", {"optim.name": "adamw"}))
        doubled = {"data.batch_size": 2 * config.data.batch_size}
        options.append(Proposal("fewer steps for the same images; check the accuracy", doubled))
    if stage == "transfer":
        options.append(Proposal("keeps the images on the device", {"data.memory": "always"}))
    return options


def _for_input(profile: Profile, config: Config) -> list[Proposal]:
    """Return the settings to try for a training that waits for its batches."""
    stage, workers = profile.bottleneck, min(MOST_WORKERS, profile.cores)
    options = []
    if (
        stage in ("read", "decode")
        and config.data.memory != "always"
        and profile.decoded_bytes < MEMORY * available_memory()
    ):
        options.append(Proposal("keeps the decoded images in memory", {"data.memory": "always"}))
    if stage in ("decode", "augment") and profile.decodes_on == "workers":
        options.append(Proposal("decodes and augments on the GPU", {"data.decode_on": "device"}))
    if profile.workers < workers:
        options.append(Proposal("more processes load images", {"data.workers": workers}))
    if stage == "decode":
        side = round(1.15 * max(config.data.sides()))
        command = f"`refract pack {config.data.source} FOLDER --resize {side}`"
        options.append(Proposal(f"store smaller images by {command}, and train on the folder", {}))
    if stage == "augment" and profile.slowest is not None:
        name, milliseconds = profile.slowest
        options.append(
            Proposal(f"lower the `p` of {name}, which takes {milliseconds:.2f} ms an image, or remove it", {})
        )
    return options


def available_memory() -> int:
    """Return the bytes of memory that are free or can be freed; 0 if the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
