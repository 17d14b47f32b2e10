"""Assess a trained classifier before it becomes a bundle: calibrate it on the validation set, measure it on the test set, report."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refract.augment import Preprocess
from refract.models.classifier import Classifier, probabilities
from refract.models.head import head_inputs
from refract.models.prediction import confidences, predicted_labels
from refract.pipeline.config.config import Config
from refract.pipeline.config.sections import EvaluationConfig, ModelConfig, TrainerConfig
from refract.pipeline.data.manifest import Manifest
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.advice import notes_on
from refract.pipeline.evaluation.evaluate import Evaluation, Predictions, evaluate, probabilities_of, truth_of
from refract.pipeline.evaluation.hierarchy import back_off_metrics, back_off_threshold, with_levels
from refract.pipeline.evaluation.label_errors import noise_evidence
from refract.pipeline.evaluation.multilabel import set_errors
from refract.pipeline.evaluation.report import Report, make_report
from refract.pipeline.evaluation.robustness import EFFORTS, Effort, measure_robustness
from refract.pipeline.evaluation.robustness_cost import affordable, flops_of
from refract.pipeline.evaluation.thresholds import choose_thresholds
from refract.pipeline.files import write_atomically
from refract.pipeline.finding import Finding

if TYPE_CHECKING:
    from torch import Tensor

    from refract.pipeline.doctor.watch import Doctor
    from refract.pipeline.features.out_of_fold import OutOfFold
    from refract.pipeline.features.training import EmbeddedFit

log = logging.getLogger(__name__)

SOFT = 20.0
"""The temperature of the validation predictions, at which float32 still distinguishes the most confident ones."""

FEWEST_ERRORS = 5
"""Wrong validation predictions that a fitted temperature needs: without errors the likelihood does not bound the confidence."""

PREDICTIONS, HISTORY = "holdout.npz", "history.json"
"""Files of a run: the predictions on the test set, and the metrics of each epoch."""


@dataclass(frozen=True)
class Assessment:
    """evaluation: on the test set, with `decision`; more: metrics of test-time augmentation and robustness."""

    evaluation: Evaluation
    more: dict[str, float]
    decision: "Decision"
    findings: list[Finding]
    report: Report


@dataclass(frozen=True)
class Decision:
    """The parameters that turn logits into predictions, chosen on the validation set.

    thresholds: one per label for multi-label, else empty; abstain_below: the confidence (`refract.models.prediction.confidences`) below
    which the bundle abstains, None without validation images; back_off: the probability at which it predicts an inner node of the hierarchy
    instead, None without validation images or a hierarchy.
    """

    temperature: float
    thresholds: tuple[float, ...]
    abstain_below: float | None
    back_off: float | None = None


def assess(
    classifier: Classifier,
    preprocess: Preprocess,
    manifest: Manifest,
    config: Config,
    *,
    name: str,
    doctor: "Doctor | None",
    history: list[dict[str, float]],
    embedded: "EmbeddedFit | None" = None,
) -> Assessment:
    """Calibrate, evaluate and report a trained classifier.

    classifier: in eval mode, on any device. name: the name of the run, for the report's title. doctor, history: the record and history of
    the training, None and empty for an average of runs. embedded: the fit of the head on embeddings, None for other modes. Raises DataError
    with the path of an unreadable image.
    """
    test, task = manifest.of("test"), manifest.task
    decision = _choose_decision(classifier, preprocess, manifest, config.evaluation)
    decision_options: dict[str, Any] = {
        "task": task, "temperature": decision.temperature, "thresholds": decision.thresholds
    }  # fmt: skip
    recording: AbstractContextManager[list[Tensor]] = (
        nullcontext([]) if embedded is None else head_inputs(classifier.network)
    )
    with recording as features:
        evaluation = evaluate(classifier, preprocess, test, labels=manifest.labels, **decision_options)
    evaluation = with_levels(evaluation, manifest.hierarchy)
    checked = None
    if embedded is not None:
        manifest, checked = _checked_on_embeddings(embedded, manifest, config.trainer.seed, evaluation, features)
    more = {}
    if config.trainer.tta != "none":  # the metrics without it stay, as `refract evaluate` and the server report those
        tta = config.trainer.tta
        tta_evaluation = evaluate(classifier, preprocess, test, labels=manifest.labels, tta=tta, **decision_options)
        more = {f"tta_{metric}": value for metric, value in tta_evaluation.metrics.items()}
    robustness = None
    size = config.data.sides()
    seen = len(manifest.of("train")) * len(history)
    effort = _effort(classifier, config.evaluation.robustness, size, seen=seen, available=len(test))
    if effort is not None:
        count = min(len(test), effort.images or len(test))
        log.info("measuring robustness to 19 corruptions on %s images", f"{count:,}")
        robustness = measure_robustness(
            classifier, preprocess, test, effort, seed=config.trainer.seed, **decision_options
        )  # fmt: skip
        more["corruption_error"] = robustness.mean_error
    facts = {
        "network": config.model.name,
        "test set": f"{len(test):,} images of {manifest.source}",
        "training": f"{len(manifest.of('train')):,} images, {_effort_of_training(config.model, config.trainer)}",
        "temperature": f"{decision.temperature:.3f}",
        "time per image": f"{_milliseconds(classifier, size):.2f} ms, the network alone in batches of 64",
    }
    findings = [] if doctor is None else _findings(doctor, evaluation, manifest, history)
    report = make_report(
        f"Run {name}", evaluation, manifest.labels, facts=facts, precision=config.evaluation.precision,
        abstain_below=decision.abstain_below, back_off=decision.back_off, robustness=robustness, near=manifest.near_of(test),
        findings=None if doctor is None else [finding.to_dict() for finding in findings],
        notes=notes_on(evaluation, drawn="test" in manifest.drawn),
        checked=checked, images=config.evaluation.images,
        subject=f"The network {config.model.name}, trained on {len(manifest.of('train')):,} samples,",
    )  # fmt: skip
    if "back_off" in report.numbers:
        more |= back_off_metrics(report.numbers["back_off"])
    return Assessment(evaluation, more, decision, findings, report)


def _checked_on_embeddings(
    fit: "EmbeddedFit", manifest: Manifest, seed: int, evaluation: Evaluation, features: "list[Tensor]"
) -> tuple[Manifest, Predictions]:
    """Return (the manifest with the near-duplicates that embeddings show, predictions by which all labels are checked).

    features: the features of the evaluation's samples, on the CPU.
    """
    import torch

    from refract.pipeline.features.near_duplicates import with_near_duplicates
    from refract.pipeline.features.training import out_of_fold

    manifest = with_near_duplicates(manifest, fit, torch.cat(features).numpy())
    return manifest, _with_held_out(evaluation, out_of_fold(fit, manifest, seed))


def _with_held_out(evaluation: Evaluation, held_out: "OutOfFold") -> Predictions:
    """Return the predictions `held_out`, then those on the test set."""
    truth = truth_of(held_out.samples, evaluation.task, evaluation.probabilities.shape[1])
    calibrated = calibrated_probabilities(held_out.logits, truth, evaluation.task)
    return Predictions(
        [*held_out.samples, *evaluation.samples],
        np.concatenate([calibrated, evaluation.probabilities]),
        np.concatenate([truth, evaluation.truth]),
    )


def calibrated_probabilities(logits: np.ndarray, truth: np.ndarray, task: str) -> np.ndarray:
    """Return probabilities float32 (N, C) at the temperature that fits the truth best. A single wrong prediction bounds it."""
    import torch

    soft = probabilities(torch.from_numpy(logits), task=task, temperature=SOFT).numpy()
    if not len(soft):
        return soft
    multilabel = task == "multilabel"
    temperature = measures.fit_temperature(soft, truth, multilabel=multilabel, given_at=SOFT)
    return measures.at_temperature(soft, temperature / SOFT, multilabel=multilabel)


def _findings(
    doctor: "Doctor", evaluation: Evaluation, manifest: Manifest, history: list[dict[str, float]]
) -> list[Finding]:
    """Add the predictions on the test set to the doctor's record, and return its findings."""
    if manifest.task != "multilabel":
        predicted = evaluation.probabilities.argmax(axis=1)
        doctor.record.said, doctor.record.truth = (
            _class_fractions(indices, manifest.labels) for indices in (predicted, evaluation.truth)
        )
        doctor.record.noise = noise_evidence(evaluation.probabilities, evaluation.truth)
        doctor.record.answered = len(evaluation.truth)
        doctor.record.wrong = float((~evaluation.right).mean())
    return doctor.findings(history)


def _effort(classifier: Classifier, setting: str, size: tuple[int, int], *, seen: int, available: int) -> Effort | None:
    """Choose the effort of the robustness measurement, None to skip it.

    setting: `evaluation.robustness`; size: (height, width) of the network's input; seen, available: see
    `refract.pipeline.evaluation.robustness_cost.affordable`.
    """
    height, width = size
    if setting == "none" or "images" not in classifier.reads:
        return None
    if setting != "auto":
        return EFFORTS[setting]
    inputs = _blank_inputs(classifier, (height, width), 1)
    flops = flops_of(lambda: classifier(*inputs)) if inputs[0].device.type == "cpu" else 0
    return affordable(seen=seen, available=available, pixels=height * width, flops=flops)


def _effort_of_training(model: ModelConfig, trainer: TrainerConfig) -> str:
    if model.on_embeddings:
        return f"{model.mode} on embeddings"
    return f"{trainer.max_epochs} epochs, seed {trainer.seed}"


def _class_fractions(indices: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(indices, minlength=len(labels))
    return dict(zip(labels, (counts / max(1, len(indices))).tolist(), strict=True))


def write_predictions(run_dir: Path, evaluation: Evaluation, history: Sequence[Mapping[str, float]]) -> None:
    """Write the inputs of `refract compare` to the run's folder.

    PREDICTIONS holds each test sample's path with its text, its truth and its probabilities. HISTORY holds the metrics of each epoch.
    """
    import io
    import zipfile

    buffer = io.BytesIO()
    paths = np.array([f"{sample.path} {sample.text[:200]}".rstrip() for sample in evaluation.samples])
    arrays = {"paths": paths, "truth": evaluation.truth, "probabilities": evaluation.probabilities}
    # np.savez_compressed has no level: it compresses at 6, which takes several times as long for little less.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_atomically(run_dir / PREDICTIONS, buffer.getvalue())
    write_atomically(run_dir / HISTORY, json.dumps(list(history), indent=1).encode())


def _choose_decision(
    classifier: Classifier, preprocess: Preprocess, manifest: Manifest, config: EvaluationConfig
) -> Decision:
    samples, multilabel = manifest.of("val"), manifest.task == "multilabel"
    if not samples:
        return Decision(1.0, (0.5,) * len(manifest.labels) if multilabel else (), None)
    truth = truth_of(samples, manifest.task, len(manifest.labels))
    soft = probabilities_of(classifier, preprocess, samples, task=manifest.task, temperature=SOFT)
    temperature = _fitted_temperature(soft, truth, multilabel)
    calibrated = measures.at_temperature(soft, temperature / SOFT, multilabel=multilabel)
    if not multilabel:
        below, back_off = measures.abstain_below(calibrated, truth, config.precision), None
        if manifest.hierarchy is not None:
            back_off = back_off_threshold(manifest.hierarchy, calibrated, truth, below, config.precision)
        return Decision(temperature, (), below, back_off)
    thresholds = _thresholds(calibrated, truth, manifest.labels, config)
    errors = set_errors(predicted_labels(calibrated, manifest.task, thresholds), truth)
    curve = measures.risk_curve(confidences(calibrated, manifest.task, thresholds), errors)
    return Decision(temperature, thresholds, measures.lowest_confidence(curve, config.precision))


def _fitted_temperature(soft: np.ndarray, truth: np.ndarray, multilabel: bool) -> float:
    """soft: probabilities at the temperature SOFT."""
    probabilities = measures.at_temperature(soft, 1 / SOFT, multilabel=multilabel)
    wrong = ((probabilities >= 0.5) != truth).sum() if multilabel else (probabilities.argmax(axis=1) != truth).sum()
    if wrong >= FEWEST_ERRORS:
        return measures.fit_temperature(soft, truth, multilabel=multilabel, given_at=SOFT)
    log.info(
        "not calibrated: fitting a temperature needs %d wrong validation predictions, got %d", FEWEST_ERRORS, wrong
    )
    return 1.0


def _thresholds(
    probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str], config: EvaluationConfig
) -> tuple[float, ...]:
    """Choose the thresholds of a multi-label classifier, and warn about labels that miss `evaluation.threshold_target`."""
    chosen = choose_thresholds(probabilities, truth, aim=config.threshold, target=config.threshold_target)
    if chosen.missed:
        missed = ", ".join(labels[k] for k in chosen.missed[:10]) + (" …" if len(chosen.missed) > 10 else "")
        log.warning(
            "%d of %d labels reach the %s %g on the validation set at no threshold: %s",
            len(chosen.missed), len(labels), config.threshold, config.threshold_target, missed,
        )  # fmt: skip
    return chosen.values


def _blank_inputs(classifier: Classifier, size: tuple[int, int], batch: int) -> tuple[Any, ...]:
    """Build blank inputs for the classifier: black images, and up to 32 tokens of text."""
    import torch

    device = next(classifier.parameters()).device
    images = torch.zeros(batch, 3, *size, device=device) if "images" in classifier.reads else None
    tokens = classifier.tokens
    if tokens is None:
        return (images,)
    return images, torch.ones(batch, min(32, tokens.max_numbers), dtype=torch.int32, device=device)


def _milliseconds(classifier: Classifier, size: tuple[int, int], batch: int = 64) -> float:
    """Measure the milliseconds per image: the fastest of three batches after one warm-up batch."""
    import torch

    inputs, times = _blank_inputs(classifier, size, batch), []
    with torch.inference_mode():
        for _ in range(4):
            started = time.perf_counter()
            classifier(*inputs).sum().item()
            times.append(time.perf_counter() - started)
    return 1000 * min(times[1:]) / batch
