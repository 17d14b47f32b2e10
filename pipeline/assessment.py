"""What is made of a trained classifier before it becomes a bundle: calibrated on validation, measured on the hold-out, reported."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from augment import Preprocess
from models.classifier import Classifier
from pipeline import measures
from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.doctor import Doctor, Finding
from pipeline.evaluation import Evaluation, evaluate, probabilities_of, truth_of
from pipeline.files import write_atomically
from pipeline.label_noise import noise_evidence
from pipeline.report import Report, make_report
from pipeline.robustness import measure_robustness

log = logging.getLogger(__name__)

SOFT = 20.0
"""The temperature at which the validation's answers are computed, so that the most confident are still told apart."""

FEWEST_ERRORS = 5
"""Wrong answers on validation that a temperature is fitted from: without errors the likelihood knows no bound to confidence."""

ANSWERS, HISTORY = "holdout.npz", "history.json"


@dataclass(frozen=True)
class Assessment:
    """evaluation: of the hold-out at `temperature`; more: further metrics; abstain_below: see `pipeline.measures`, None for multilabel."""

    evaluation: Evaluation
    more: dict[str, float]
    temperature: float
    abstain_below: float | None
    findings: list[Finding]
    report: Report


def assess(
    classifier: Classifier,
    preprocess: Preprocess,
    manifest: Manifest,
    config: Config,
    *,
    name: str,
    doctor: Doctor,
    history: list[dict[str, float]],
) -> Assessment:
    """classifier: in eval mode, on any device. name: for the report's title; doctor, history: of the training. DataError names a picture
    that cannot be read."""
    test, task = manifest.of("test"), manifest.task
    temperature, threshold = _calibrated(classifier, preprocess, manifest, config.evaluation.precision)
    kinds: dict[str, Any] = {"task": task, "labels": manifest.labels, "temperature": temperature}
    evaluation = evaluate(classifier, preprocess, test, **kinds)
    more = {}
    if config.trainer.tta != "none":  # beside the figures without it, which `refract evaluate` and the server give
        again = evaluate(classifier, preprocess, test, tta=config.trainer.tta, **kinds)
        more = {f"tta_{metric}": value for metric, value in again.metrics.items()}
    robustness = None
    if config.evaluation.robustness != "none" and task != "multilabel" and "pictures" in classifier.reads:
        log.info("measuring under the 19 corruptions (%s)", config.evaluation.robustness)
        robustness = measure_robustness(
            classifier, preprocess, test, quick=config.evaluation.robustness == "quick", seed=config.trainer.seed
        )
        more["corruption_error"] = robustness.mean_error
    facts = {
        "network": config.model.name,
        "hold-out": f"{len(test):,} pictures of {manifest.source}",
        "training": f"{len(manifest.of('train')):,} pictures, {config.trainer.max_epochs} epochs, seed {config.trainer.seed}",
        "temperature": f"{temperature:.3f}",
        "time a picture": f"{_milliseconds(classifier, config.data.sides()):.2f} ms, the network alone in batches of 64",
    }
    if task != "multilabel":
        answers = evaluation.probabilities.argmax(axis=1)
        doctor.record.said, doctor.record.truth = (
            _shares(found, manifest.labels) for found in (answers, evaluation.truth)
        )
        doctor.record.noise = noise_evidence(evaluation.probabilities, evaluation.truth)
        doctor.record.answered = len(evaluation.truth)
        doctor.record.wrong = float((~evaluation.right).mean())
    findings = doctor.findings(history)
    report = make_report(
        f"Run {name}", evaluation, manifest.labels, facts=facts, precision=config.evaluation.precision,
        abstain_below=threshold, robustness=robustness, findings=[finding.to_dict() for finding in findings],
        near=manifest.near_of(test),
    )  # fmt: skip
    return Assessment(evaluation, more, temperature, threshold, findings, report)


def _shares(indices: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(indices, minlength=len(labels))
    return dict(zip(labels, (counts / max(1, len(indices))).tolist(), strict=True))


def write_answers(run_dir: Path, evaluation: Evaluation, history: Sequence[Mapping[str, float]]) -> None:
    """What `refract compare` needs: each hold-out sample's path with its text, truth and probabilities, and the metrics of each epoch."""
    import io

    buffer = io.BytesIO()
    paths = np.array([f"{sample.path} {sample.text[:200]}".rstrip() for sample in evaluation.samples])
    np.savez_compressed(buffer, paths=paths, truth=evaluation.truth, probabilities=evaluation.probabilities)
    write_atomically(run_dir / ANSWERS, buffer.getvalue())
    write_atomically(run_dir / HISTORY, json.dumps(list(history), indent=1).encode())


def _calibrated(
    classifier: Classifier, preprocess: Preprocess, manifest: Manifest, precision: float
) -> tuple[float, float | None]:
    """(temperature, the confidence below which to abstain), both from the validation pictures."""
    samples, multilabel = manifest.of("val"), manifest.task == "multilabel"
    if not samples:
        return 1.0, None
    truth = truth_of(samples, manifest.task, len(manifest.labels))
    soft = probabilities_of(classifier, preprocess, samples, task=manifest.task, temperature=SOFT)
    given = measures.at_temperature(soft, 1 / SOFT, multilabel=multilabel)
    wrong = ((given >= 0.5) != truth).sum() if multilabel else (given.argmax(axis=1) != truth).sum()
    temperature = 1.0
    if wrong >= FEWEST_ERRORS:
        temperature = measures.fit_temperature(soft, truth, multilabel=multilabel, given_at=SOFT)
        given = measures.at_temperature(soft, temperature / SOFT, multilabel=multilabel)
    else:
        log.info("not calibrated: %d wrong answers on validation are too few to fit a temperature", wrong)
    return temperature, None if multilabel else measures.abstain_below(given, truth, precision)


def _milliseconds(classifier: Classifier, size: tuple[int, int], batch: int = 64) -> float:
    """For one picture, the best of three batches after one to warm up."""
    import torch

    device = next(classifier.parameters()).device
    images = torch.zeros(batch, 3, *size, device=device) if "pictures" in classifier.reads else None
    tokens = classifier.tokens
    # A page of words, or as much as is read of one.
    texts = [] if tokens is None else [torch.ones(batch, min(32, tokens.most), dtype=torch.int32, device=device)]
    times = []
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            classifier(images, *texts).sum().item()
            times.append(time.perf_counter() - began)
    return 1000 * min(times[1:]) / batch
