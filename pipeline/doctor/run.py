"""Build the doctor of a run from its config."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refract.augment.ops.composition import CompositionOp
from refract.models.classifier import inputs_of
from refract.pipeline.doctor.record import Normalisation, Record
from refract.pipeline.doctor.watch import OVERFIT_IMAGES, Doctor

if TYPE_CHECKING:
    from refract.pipeline.training.fit import Assembly

PREFLIGHT_IMAGES = 64


def make_doctor(assembly: "Assembly") -> Doctor:
    """Build the doctor and run its preflight checks on up to PREFLIGHT_IMAGES validation images.

    The checks measure the normalised inputs and whether the network overfits a few images.
    """
    import torch

    from refract.pipeline.data.datasets import collate

    augmenter, config = assembly.data.train_set.augmenter, assembly.config
    loss = config.loss
    plain = loss.name in ("auto", "cross_entropy") and not (loss.penalty or loss.consistency or loss.teacher)
    record = Record(
        classes=len(assembly.manifest.labels) if plain and assembly.manifest.task != "multilabel" else 0,
        lr=assembly.module.optim.peak_lr,
        optimizer=config.optim.name,
        network=config.model.name,
        args=dict(config.model.args),
        weights=config.model.weights,
        mode=config.model.mode,
        soft=config.loss.label_smoothing > 0 or augmenter.mixes,
        workers=assembly.data.workers,
        ops=tuple(_names(augmenter.policy.ops)),
    )
    if config.data.normalize == "fixed" and record.pretrained:
        record.normalisation, record.weights_normalisation = _normalisations(assembly)
    doctor = Doctor(record, config)
    if config.model.on_embeddings:  # without steps, which the checks would predict
        return doctor
    images = assembly.data.images_of("val")
    indices = np.unique(np.linspace(0, len(images) - 1, PREFLIGHT_IMAGES).astype(int)).tolist() if len(images) else []
    if len(indices) >= OVERFIT_IMAGES:
        batch = collate([images[i] for i in indices])
        # Images may be sorted by class; the shuffle mixes the classes of the few images to overfit.
        order = torch.randperm(len(batch["targets"]), generator=torch.Generator().manual_seed(0))
        shuffled = {name: values[order] for name, values in batch.items()}
        doctor.preflight(assembly.module, inputs_of(shuffled), shuffled["targets"])
    return doctor


def _normalisations(assembly: "Assembly") -> tuple[Normalisation, Normalisation | None]:
    """Return (mean, std) of the run, and those of its weights' training or None if they are unknown."""
    from refract.models.registry import weights_preprocess

    model = assembly.config.model
    weights_record = (weights_preprocess(model.name, assembly.weights) or {}) if model.reads_images else {}
    weights_normalisation = (
        (tuple(weights_record["mean"]), tuple(weights_record["std"]))
        if "mean" in weights_record and "std" in weights_record
        else None
    )
    return (tuple(assembly.data.preprocess.mean), tuple(assembly.data.preprocess.std)), weights_normalisation


def _names(ops: Sequence[Any]) -> list[str]:
    """Return the names of all ops, including those inside composition ops."""
    nested = [op.ops if isinstance(op, CompositionOp) else () for op in ops]
    return [name for op, inner in zip(ops, nested, strict=True) for name in (op.name, *_names(inner))]
