"""The doctor of a run, built from its config."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refract.augment.ops.composition import CompositionOp
from refract.models.classifier import inputs_of
from refract.pipeline.config.config import Config
from refract.pipeline.doctor.record import Normalisation, Record
from refract.pipeline.doctor.watch import OVERFIT_IMAGES, Doctor

if TYPE_CHECKING:
    from refract.pipeline.training.fit import Assembly

LOOKED_AT = 64


def make_doctor(made: "Assembly", config: Config) -> Doctor:
    """A doctor that has looked at some validation images, and tried whether a few can be learned by heart."""
    import torch

    from refract.pipeline.data.datasets import collate

    augmenter = made.data.train_set.augmenter
    loss = config.loss
    plain = loss.name in ("auto", "cross_entropy") and not (loss.penalty or loss.consistency or loss.teacher)
    record = Record(
        classes=len(made.manifest.labels) if plain and made.manifest.task != "multilabel" else 0,
        lr=made.module.optim.lr,
        optimizer=config.optim.name,
        network=config.model.name,
        args=dict(config.model.args),
        weights=config.model.weights,
        mode=config.model.mode,
        soft=config.loss.label_smoothing > 0 or augmenter.mixes,
        workers=made.data.workers,
        ops=tuple(_names(augmenter.policy.ops)),
    )
    if config.data.normalize == "fixed" and record.pretrained:
        record.normalisation, record.weights_normalisation = _normalisations(made, config)
    doctor = Doctor(record, config)
    images = made.data.images_of("val")
    places = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(int)).tolist() if len(images) else []
    if len(places) >= OVERFIT_IMAGES:
        batch = collate([images[i] for i in places])
        # Of several classes, where the images are sorted by them.
        order = torch.randperm(len(batch["targets"]), generator=torch.Generator().manual_seed(0))
        shuffled = {name: values[order] for name, values in batch.items()}
        doctor.preflight(made.module, inputs_of(shuffled), shuffled["targets"])
    return doctor


def _normalisations(made: "Assembly", config: Config) -> tuple[Normalisation, Normalisation | None]:
    """(mean and std of the run, those that its weights were trained with or None where no record says so)"""
    from refract.models.registry import weights_preprocess

    own = (weights_preprocess(config.model.name, config.model.weights) or {}) if config.model.name != "none" else {}
    known = (tuple(own["mean"]), tuple(own["std"])) if "mean" in own and "std" in own else None
    return (tuple(made.data.preprocess.mean), tuple(made.data.preprocess.std)), known


def _names(ops: Sequence[Any]) -> list[str]:
    """Of all ops, those inside choices too."""
    held = [op.ops if isinstance(op, CompositionOp) else () for op in ops]
    return [name for op, inner in zip(ops, held, strict=True) for name in (op.name, *_names(inner))]
