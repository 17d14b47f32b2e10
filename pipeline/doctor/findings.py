"""Derive findings from the record of a training: plain numbers in, findings out, without network or trainer.

The thresholds give no false alarm on the configs that Refract ships and on the runs of the benchmarks.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from refract.pipeline.doctor.record import Record
from refract.pipeline.doctor.transfer import normalisation, nothing_learned, one_digit, suited_lr
from refract.pipeline.finding import Cure, Finding, cure

WITH_ACTIVATION = ("cnn", "mlp")
"""Networks with an `activation` argument."""

EXPLAINED = ("class collapse", "underfitting", "the loss does not fall", "learning rate too low")
"""Findings that `the transfer learned nothing` already explains."""


def early(record: Record) -> Iterator[Finding]:
    """Yield the findings of the first steps."""
    yield from _first_loss(record)
    yield from _unreached(record)
    yield from _inputs(record)
    yield from normalisation(record)
    yield from _corruptions(record)


def late(record: Record) -> Iterator[Finding]:
    """Yield the findings of a whole training."""
    transfer = list(nothing_learned(record))
    yield from transfer
    for check in (_rate, _gradients, _units, _gap, _collapse, _labels, _time):
        yield from (finding for finding in check(record) if not (transfer and finding.name in EXPLAINED))


def _first_loss(record: Record) -> Iterator[Finding]:
    """Compare the first loss with log C, the cross-entropy of uniform predictions over C classes."""
    if record.classes < 2 or not record.losses:
        return
    uniform, first = math.log(record.classes), record.losses[0]
    if first > 2 * uniform + 1:
        yield Finding(
            "initial loss",
            f"the first loss is {first:.2f}, but uniform predictions give log({record.classes}) = {uniform:.2f}",
            "the head starts with weights that are too large",
            tuple(_first_loss_cures(record)),
        )


def _first_loss_cures(record: Record) -> Iterator[Cure]:
    """Yield `model.init` only for networks without loaded weights, which define their own start."""
    if not record.pretrained:
        yield from (cure("model.init", init) for init in ("default", "xavier_normal"))
        return
    if record.mode == "fine-tune":
        yield cure("model.mode", "linear-then-fine-tune")
    yield cure("optim.lr", min(suited_lr(record), one_digit(record.lr / 10)))


def _unreached(record: Record) -> Iterator[Finding]:
    if record.unreached:
        yield Finding(
            "no gradient",
            f"{len(record.unreached)} trainable parameters have no gradient after the first step, such as {record.unreached[0]}",
            "the forward pass does not use them, or they are detached from the loss",
        )


def _inputs(record: Record) -> Iterator[Finding]:
    for split, (mean, deviation) in record.inputs.items():
        if abs(mean) > 2 or not 0.1 < deviation < 5:
            yield Finding(
                "input range",
                f"normalised {split} images have mean {mean:.2f} and standard deviation {deviation:.2f}; networks train best at 0 and 1",
                "data.mean and data.std of these images have the same effect",
                (cure("data.normalize", "data"),),
            )
            return
    if {"train", "val"} <= set(record.inputs):
        (mean, deviation), (val_mean, val_deviation) = record.inputs["train"], record.inputs["val"]
        if (
            abs(mean - val_mean) > 0.75 * max(val_deviation, 1e-6)
            or not 0.4 < deviation / max(val_deviation, 1e-6) < 2.5
        ):
            yield Finding(
                "augmentation shifts the images",
                f"augmented training images have mean {mean:.2f} and standard deviation {deviation:.2f}, "
                f"validation images {val_mean:.2f} and {val_deviation:.2f}",
                "weaken the policy's colour and erasing ops: validation images look unlike those of the training",
            )


CORRUPTING = {
    "GaussianNoise": "gaussian_noise", "PoissonNoise": "shot_noise", "SpeckleNoise": "speckle_noise",
    "SaltAndPepper": "impulse_noise", "GaussianBlur": "defocus_blur", "MotionBlur": "motion_blur",
    "JPEGCompression": "jpeg_compression", "ElasticDeform": "elastic_transform", "Corruption": "all of them",
}  # fmt: skip


def _corruptions(record: Record) -> Iterator[Finding]:
    corrupting = [op for op in record.ops if op in CORRUPTING]
    if corrupting:
        yield Finding(
            "trained on corruptions",
            f"the policy has {', '.join(corrupting)}, similar to the robustness test's {', '.join(CORRUPTING[op] for op in corrupting)}",
            "on these corruptions the error does not measure unseen ones; judge robustness by the other corruptions",
        )


def _rate(record: Record) -> Iterator[Finding]:
    """Yield a finding where the loss rises or hardly falls."""
    if len(record.losses) < 30:
        return
    smooth = _smoothed(record.losses)
    lowest = int(smooth.argmin())
    start, end = smooth[0], smooth[-1]
    if end > 1.5 * smooth[lowest] and end > 0.9 * start:
        yield Finding(
            "learning rate too high",
            f"the loss rose {end / smooth[lowest]:.1f} × in {len(smooth) - lowest} steps after its minimum",
            "a longer optim.warmup helps too",
            (cure("optim.lr", one_digit(record.lr / 10)), cure("optim.clip_norm", 1.0)),
        )
    elif end > 0.97 * start and end > (0.3 * math.log(record.classes) if record.classes > 1 else 0.2):
        yield Finding(
            "the loss does not fall",
            f"the loss is {end:.3f} after {len(smooth)} steps and started at {start:.3f}",
            "`refract find lr` measures a learning rate; check the labels",
            tuple(cure("optim.lr", one_digit(lr)) for lr in (record.lr * 10, record.lr / 10)),
        )
    elif len(record.history) >= 3 and _steady(smooth) and end > 0.6 * start:
        yield Finding(
            "learning rate too low",
            f"the loss falls steadily, but in {len(smooth)} steps only from {start:.3f} to {end:.3f}",
            "`refract find lr` measures a learning rate",
            (cure("optim.lr", one_digit(record.lr * 10)),),
        )


def _steady(smooth: np.ndarray) -> bool:
    """Whether the last third falls at more than 0.6 times the first third's pace, far from convergence."""
    third = len(smooth) // 3
    first, last = smooth[0] - smooth[third], smooth[-third] - smooth[-1]
    return first > 0 and last > 0.6 * first


def _gradients(record: Record) -> Iterator[Finding]:
    """Compare the ratios of gradient norm to weight norm of the first layers and the last one."""
    if not record.gradients:
        return
    layers = list(record.gradients[0])
    if len(layers) < 4:
        return
    medians = {name: float(np.median([row[name] for row in record.gradients if name in row])) for name in layers}
    first, last = np.median([medians[name] for name in layers[:2]]), medians[layers[-1]]
    if last > 0 and first < 1e-4 * last:
        yield Finding(
            "vanishing gradient",
            f"the ratio of gradient norm to weight norm is {first:.1e} in the first layers and {last:.1e} in the last",
            "replace sigmoid and tanh by ReLU or GELU, or add normalisation layers or residual connections",
            () if record.pretrained else (cure("model.init", "he_normal"),),
        )
    elif first > 1e4 * last > 0:
        yield Finding(
            "exploding gradient",
            f"the ratio of gradient norm to weight norm is {first:.1e} in the first layers and {last:.1e} in the last",
            "add normalisation layers, or initialise with smaller weights",
            (cure("optim.clip_norm", 1.0),),
        )


def _units(record: Record) -> Iterator[Finding]:
    dead = {name: fraction for name, fraction in record.dead.items() if fraction > 0.5}
    if dead:
        name, fraction = max(dead.items(), key=lambda item: item[1])
        yield Finding(
            "dead ReLUs",
            f"{fraction:.0%} of the units of {name} output 0 for every image of a batch; in {len(dead)} of {len(record.dead)} ReLU "
            "layers more than half of the units are dead",
            "the usual cause is a high learning rate early in training",
            (cure("optim.lr", one_digit(record.lr / 10)), *_activation(record, "leaky_relu")),
        )
    saturated = {name: fraction for name, fraction in record.saturated.items() if fraction > 0.6}
    if saturated:
        name, fraction = max(saturated.items(), key=lambda item: item[1])
        yield Finding(
            "saturated units",
            f"{fraction:.0%} of the outputs of {name} lie in the flat tails of its activation",
            "initialise with smaller weights",
            (
                *(() if record.pretrained else (cure("model.init", "xavier_normal"),)),
                cure("optim.lr", one_digit(record.lr / 10)),
                *_activation(record, "relu"),
            ),
        )


def _activation(record: Record, name: str) -> tuple[Cure, ...]:
    """Propose another activation where the network has such an argument."""
    if record.network not in WITH_ACTIVATION:
        return ()
    args = {key: value for key, value in record.args.items() if key != "activation_args"}
    return (cure("model.args", {**args, "activation": name}),)


def _gap(record: Record) -> Iterator[Finding]:
    rows = [row for row in record.history if "train_accuracy" in row and "val_accuracy" in row]
    if len(rows) < 4:
        return
    gap = rows[-1]["train_accuracy"] - rows[-1]["val_accuracy"]
    losses = [row["val_loss"] for row in rows]
    risen = losses[-1] > 1.15 * min(losses) and losses.index(min(losses)) < len(losses) - 2
    if gap > 0.1 and risen:
        yield Finding(
            "overfitting",
            f"training accuracy is {gap:.1%} above validation accuracy, and validation loss rose from {min(losses):.3f} in epoch "
            f"{losses.index(min(losses)) + 1} to {losses[-1]:.3f}",
            "augment more, raise optim.weight_decay, or use a smaller network or pretrained weights",
            (cure("trainer.patience", 3), *((cure("model.mode", "feature-extract"),) if record.pretrained else ())),
        )
    last = [row["train_accuracy"] for row in rows[-max(2, len(rows) // 3) :]]
    if not record.soft and abs(gap) < 0.03 and max(last) - min(last) < 0.01 and last[-1] < 0.8:
        yield Finding(
            "underfitting",
            f"training accuracy stays at {last[-1]:.1%}, and validation accuracy is equally low",
            "use a larger network, a weaker policy, or less weight decay",
            (cure("trainer.max_epochs", 2 * len(record.history)),),
        )


def _collapse(record: Record) -> Iterator[Finding]:
    if len(record.said) < 2 or not record.truth:
        return
    name, fraction = max(record.said.items(), key=lambda item: item[1])
    if fraction > 0.9 and record.truth.get(name, 0) < 0.75 * fraction:
        yield Finding(
            "class collapse",
            f"{fraction:.0%} of the test predictions are {name}, but only {record.truth.get(name, 0):.0%} of the labels are",
            "data.sampler and loss.class_weights are for imbalanced classes",
            (
                cure("optim.lr", one_digit(record.lr / 10)),
                cure("data.sampler", "balanced"),
                cure("loss.class_weights", "balanced"),
            ),
        )


def _labels(record: Record) -> Iterator[Finding]:
    """Yield a finding where confident predictions contradict more labels than the network's own errors explain.

    The rule is in `refract.pipeline.evaluation.label_errors`.
    """
    noise = record.noise
    if noise is not None and noise.is_noise:
        yield Finding(
            "label noise",
            f"{noise.contradicted / noise.sure:.0%} of the most confident quarter of the test predictions contradict the label, "
            f"compared with {noise.wrong:.0%} of all test predictions",
            "review `Labels that are likely wrong` in the report and correct them",
            (cure("loss.label_smoothing", 0.1),),
        )


def _time(record: Record) -> Iterator[Finding]:
    total = sum(record.seconds.values())
    waiting = record.seconds.get("waiting", 0.0)
    if waiting > 30 and waiting > 0.35 * total:  # worker processes take seconds to start, so less waiting needs no cure
        workers = () if record.workers else (cure("data.workers", 2),)
        yield Finding(
            "the loader is the bottleneck",
            f"the training waited for images {waiting / total:.0%} of its time, with {record.workers} worker processes",
            "cached images need enough memory for all of them; smaller files or a cheaper policy help too "
            "(`refract explain` times the policy)",
            (*workers, cure("data.memory", "always")),
        )


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Moving mean over a tenth of the steps, at least ten."""
    width = max(10, len(losses) // 10)
    sums = np.cumsum(np.r_[0.0, losses])
    return (sums[width:] - sums[:-width]) / width
