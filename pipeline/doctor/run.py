"""The doctor in a run: made for a config, and what it found as a file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from augment.ops.choice import ChoiceOp
from models.classifier import inputs_of
from pipeline.config import Config, ConfigError
from pipeline.doctor.finding import Finding
from pipeline.doctor.record import Normalisation, Record
from pipeline.doctor.watch import OVERFIT_PICTURES, Doctor
from pipeline.files import write_atomically

if TYPE_CHECKING:
    from pipeline.fitting import Assembly

FILE = "doctor.json"
LOOKED_AT = 64


def make_doctor(made: "Assembly", config: Config) -> Doctor:
    """A doctor that has looked at some validation pictures, and tried whether a few can be learned by heart."""
    import torch

    from pipeline.data.pictures import collate

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
    pictures = made.data.pictures_of("val")
    places = np.unique(np.linspace(0, len(pictures) - 1, LOOKED_AT).astype(int)).tolist() if len(pictures) else []
    if len(places) >= OVERFIT_PICTURES:
        batch = collate([pictures[i] for i in places])
        # Of several classes, where the pictures are sorted by them.
        order = torch.randperm(len(batch["targets"]), generator=torch.Generator().manual_seed(0))
        shuffled = {name: values[order] for name, values in batch.items()}
        doctor.preflight(made.module, inputs_of(shuffled), shuffled["targets"])
    return doctor


def write_findings(run_dir: Path, findings: Sequence[Finding], record: Record) -> None:
    """`doctor.json`: the findings and what they were found from."""
    values = {"findings": [finding.to_dict() for finding in findings], "record": dataclasses.asdict(record)}
    write_atomically(run_dir / FILE, json.dumps(values, indent=1).encode())


def read_findings(run_dir: Path) -> tuple[list[Finding], dict[str, Any]]:
    """(findings, the record). ConfigError where the run has none."""
    try:
        values = json.loads((run_dir / FILE).read_text("utf-8"))
        sum(values["record"]["seconds"].values())
        return [Finding.from_dict(finding) for finding in values["findings"]], values["record"]
    except FileNotFoundError as error:
        why = f"has no {FILE}; a run has one when it is finished" if run_dir.is_dir() else "no such run"
        if run_dir.is_dir() and (run_dir.parent / FILE).is_file():
            why = f"is a part of a run; give the run's folder, {run_dir.parent}"
        raise ConfigError(f"{run_dir}: {why}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run_dir / FILE}: cannot be read ({error})") from error


def _normalisations(made: "Assembly", config: Config) -> tuple[Normalisation, Normalisation | None]:
    """(mean and std of the run, those that its weights were trained with or None where no record says so)"""
    from models.networks import weights_preprocess

    own = (weights_preprocess(config.model.name, config.model.weights) or {}) if config.model.name != "none" else {}
    known = (tuple(own["mean"]), tuple(own["std"])) if "mean" in own and "std" in own else None
    return (tuple(made.data.preprocess.mean), tuple(made.data.preprocess.std)), known


def _names(ops: Sequence[Any]) -> list[str]:
    """Of all ops, those inside choices too."""
    held = [op.ops if isinstance(op, ChoiceOp) else () for op in ops]
    return [name for op, inner in zip(ops, held, strict=True) for name in (op.name, *_names(inner))]
