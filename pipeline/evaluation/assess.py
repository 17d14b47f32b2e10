"""What is made of a trained classifier before it becomes a bundle: calibrated on validation, measured on the hold-out, reported."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refract.augment import Preprocess
from refract.models.classifier import Classifier
from refract.models.prediction import confidences, given_labels
from refract.pipeline.config.config import Config
from refract.pipeline.config.sections import EvaluationConfig
from refract.pipeline.data.manifest import Manifest
from refract.pipeline.doctor.finding import Finding
from refract.pipeline.doctor.watch import Doctor
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.advice import notes_on
from refract.pipeline.evaluation.evaluate import Evaluation, evaluate, probabilities_of, truth_of
from refract.pipeline.evaluation.label_errors import noise_evidence
from refract.pipeline.evaluation.multilabel import set_errors
from refract.pipeline.evaluation.report import Report, make_report
from refract.pipeline.evaluation.robustness import EFFORTS, Effort, measure_robustness
from refract.pipeline.evaluation.robustness_cost import affordable, flops_of
from refract.pipeline.evaluation.thresholds import choose_thresholds
from refract.pipeline.files import write_atomically

log = logging.getLogger(__name__)

SOFT = 20.0
"""The temperature at which the validation's answers are computed, so that the most confident are still told apart."""

FEWEST_ERRORS = 5
"""Wrong answers on validation that a temperature is fitted from: without errors the likelihood knows no bound to confidence."""

ANSWERS, HISTORY = "holdout.npz", "history.json"


@dataclass(frozen=True)
class Assessment:
    """evaluation: of the hold-out, as `decision` says; more: further metrics."""

    evaluation: Evaluation
    more: dict[str, float]
    decision: "Decision"
    findings: list[Finding]
    report: Report


@dataclass(frozen=True)
class Decision:
    """How logits become an answer, all of it chosen on validation. thresholds: one a label for multilabel, else empty; abstain_below: the
    confidence (`refract.models.prediction.confidences`) below which an answer is left to a person, None without validation images."""

    temperature: float
    thresholds: tuple[float, ...]
    abstain_below: float | None


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
    """classifier: in eval mode, on any device. name: for the report's title; doctor, history: of the training. DataError names an image
    that cannot be read."""
    test, task = manifest.of("test"), manifest.task
    decision = _decided(classifier, preprocess, manifest, config.evaluation)
    answering: dict[str, Any] = {
        "task": task, "temperature": decision.temperature, "thresholds": decision.thresholds
    }  # fmt: skip
    evaluation = evaluate(classifier, preprocess, test, labels=manifest.labels, **answering)
    more = {}
    if config.trainer.tta != "none":  # beside the figures without it, which `refract evaluate` and the server give
        tta = config.trainer.tta
        again = evaluate(classifier, preprocess, test, labels=manifest.labels, tta=tta, **answering)
        more = {f"tta_{metric}": value for metric, value in again.metrics.items()}
    robustness = None
    effort = _effort(classifier, config, seen=len(manifest.of("train")) * len(history), available=len(test))
    if effort is not None:
        count = min(len(test), effort.images or len(test))
        log.info("measuring robustness to 19 corruptions on %s images", f"{count:,}")
        robustness = measure_robustness(
            classifier, preprocess, test, effort, seed=config.trainer.seed, **answering
        )  # fmt: skip
        more["corruption_error"] = robustness.mean_error
    facts = {
        "network": config.model.name,
        "hold-out": f"{len(test):,} images of {manifest.source}",
        "training": f"{len(manifest.of('train')):,} images, {config.trainer.max_epochs} epochs, seed {config.trainer.seed}",
        "temperature": f"{decision.temperature:.3f}",
        "time an image": f"{_milliseconds(classifier, config.data.sides()):.2f} ms, the network alone in batches of 64",
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
        abstain_below=decision.abstain_below, robustness=robustness, near=manifest.near_of(test),
        findings=[finding.to_dict() for finding in findings],
        notes=notes_on(evaluation, drawn="test" in manifest.drawn),
    )  # fmt: skip
    return Assessment(evaluation, more, decision, findings, report)


def _effort(classifier: Classifier, config: Config, *, seen: int, available: int) -> Effort | None:
    """What of robustness is measured. seen, available: see `refract.pipeline.evaluation.robustness_cost.affordable`."""
    wanted, (height, width) = config.evaluation.robustness, config.data.sides()
    if wanted == "none" or "images" not in classifier.reads:
        return None
    if wanted != "auto":
        return EFFORTS[wanted]
    inputs = _blank_inputs(classifier, (height, width), 1)
    flops = flops_of(lambda: classifier(*inputs)) if inputs[0].device.type == "cpu" else 0
    return affordable(seen=seen, available=available, pixels=height * width, flops=flops)


def _shares(indices: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(indices, minlength=len(labels))
    return dict(zip(labels, (counts / max(1, len(indices))).tolist(), strict=True))


def write_predictions(run_dir: Path, evaluation: Evaluation, history: Sequence[Mapping[str, float]]) -> None:
    """What `refract compare` needs: each hold-out sample's path with its text, truth and probabilities, and the metrics of each epoch."""
    import io

    buffer = io.BytesIO()
    paths = np.array([f"{sample.path} {sample.text[:200]}".rstrip() for sample in evaluation.samples])
    np.savez_compressed(buffer, paths=paths, truth=evaluation.truth, probabilities=evaluation.probabilities)
    write_atomically(run_dir / ANSWERS, buffer.getvalue())
    write_atomically(run_dir / HISTORY, json.dumps(list(history), indent=1).encode())


def _decided(classifier: Classifier, preprocess: Preprocess, manifest: Manifest, config: EvaluationConfig) -> Decision:
    samples, multilabel = manifest.of("val"), manifest.task == "multilabel"
    if not samples:
        return Decision(1.0, (0.5,) * len(manifest.labels) if multilabel else (), None)
    truth = truth_of(samples, manifest.task, len(manifest.labels))
    soft = probabilities_of(classifier, preprocess, samples, task=manifest.task, temperature=SOFT)
    temperature = _fitted_temperature(soft, truth, multilabel)
    given = measures.at_temperature(soft, temperature / SOFT, multilabel=multilabel)
    if not multilabel:
        return Decision(temperature, (), measures.abstain_below(given, truth, config.precision))
    given = given.astype(np.float32)  # as the server computes them
    thresholds = _thresholds(given, truth, manifest.labels, config)
    errors = set_errors(given_labels(given, manifest.task, thresholds), truth)
    curve = measures.risk_curve(confidences(given, manifest.task, thresholds), errors)
    return Decision(temperature, thresholds, measures.lowest_confidence(curve, config.precision))


def _fitted_temperature(soft: np.ndarray, truth: np.ndarray, multilabel: bool) -> float:
    """soft: probabilities at the temperature SOFT."""
    given = measures.at_temperature(soft, 1 / SOFT, multilabel=multilabel)
    wrong = ((given >= 0.5) != truth).sum() if multilabel else (given.argmax(axis=1) != truth).sum()
    if wrong >= FEWEST_ERRORS:
        return measures.fit_temperature(soft, truth, multilabel=multilabel, given_at=SOFT)
    log.info("not calibrated: %d wrong answers on validation are too few to fit a temperature", wrong)
    return 1.0


def _thresholds(
    given: np.ndarray, truth: np.ndarray, labels: Sequence[str], config: EvaluationConfig
) -> tuple[float, ...]:
    """Of a multi-label classifier, with a warning of labels that miss `evaluation.threshold_target`."""
    chosen = choose_thresholds(given, truth, aim=config.threshold, target=config.threshold_target)
    if chosen.missed:
        named = ", ".join(labels[k] for k in chosen.missed[:10]) + (" …" if len(chosen.missed) > 10 else "")
        log.warning(
            "no threshold gives %d of %d labels the %s %g on validation: %s",
            len(chosen.missed), len(labels), config.threshold, config.threshold_target, named,
        )  # fmt: skip
    return chosen.values


def _blank_inputs(classifier: Classifier, size: tuple[int, int], batch: int) -> tuple[Any, ...]:
    """What the classifier is called with: black images, and a page of words or as much as is read of one."""
    import torch

    device = next(classifier.parameters()).device
    images = torch.zeros(batch, 3, *size, device=device) if "images" in classifier.reads else None
    tokens = classifier.tokens
    if tokens is None:
        return (images,)
    return images, torch.ones(batch, min(32, tokens.most), dtype=torch.int32, device=device)


def _milliseconds(classifier: Classifier, size: tuple[int, int], batch: int = 64) -> float:
    """For one image, the best of three batches after one to warm up."""
    import torch

    inputs, times = _blank_inputs(classifier, size, batch), []
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            classifier(*inputs).sum().item()
            times.append(time.perf_counter() - began)
    return 1000 * min(times[1:]) / batch
