"""From what was recorded of a training to findings. Plain numbers in, words out: no network, no trainer.

Thresholds are set so that the configs that come with Refract, and the runs of the benchmarks, give no false alarm.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from refract.pipeline.doctor.finding import Cure, Finding, cure
from refract.pipeline.doctor.record import Record
from refract.pipeline.doctor.transfer import normalisation, nothing_learned, suited_lr

WITH_ACTIVATION = ("cnn", "mlp")
"""Networks whose arguments name the activation."""

EXPLAINED = ("class collapse", "underfitting", "the loss does not fall", "learning rate too low")
"""Findings that say less than that a transfer learned nothing."""


def early(record: Record) -> Iterator[Finding]:
    """Findings of the first steps."""
    yield from _first_loss(record)
    yield from _unreached(record)
    yield from _inputs(record)
    yield from normalisation(record)
    yield from _corruptions(record)


def late(record: Record) -> Iterator[Finding]:
    """Findings of a whole training."""
    transfer = list(nothing_learned(record))
    yield from transfer
    for check in (_rate, _gradients, _units, _gap, _collapse, _labels, _time):
        yield from (finding for finding in check(record) if not (transfer and finding.name in EXPLAINED))


def _first_loss(record: Record) -> Iterator[Finding]:
    """An untrained network should know nothing: its cross-entropy is log C."""
    if record.classes < 2 or not record.losses:
        return
    wanted, first = math.log(record.classes), record.losses[0]
    if first > 2 * wanted + 1:
        yield Finding(
            "initial loss",
            f"the first loss is {first:.2f}, and log({record.classes}) = {wanted:.2f} would be knowing nothing",
            "the head begins with too large weights",
            tuple(_first_loss_cures(record)),
        )


def _first_loss_cures(record: Record) -> Iterator[Cure]:
    """`model.init` is for networks without weights: loaded ones say how they begin."""
    if not record.pretrained:
        yield from (cure("model.init", init) for init in ("default", "xavier_normal"))
        return
    if record.mode == "fine-tune":
        yield cure("model.mode", "linear-then-fine-tune")
    yield cure("optim.lr", min(suited_lr(record), _nice(record.lr / 10)))


def _unreached(record: Record) -> Iterator[Finding]:
    if record.unreached:
        yield Finding(
            "no gradient",
            f"{len(record.unreached)} trainable parameters have no gradient after the first step, as {record.unreached[0]}",
            "they are not used by the network's forward pass, or cut off from the loss",
        )


def _inputs(record: Record) -> Iterator[Finding]:
    for split, (mean, deviation) in record.inputs.items():
        if abs(mean) > 2 or not 0.1 < deviation < 5:
            yield Finding(
                "input range",
                f"normalised {split} images have mean {mean:.2f} and deviation {deviation:.2f}, where 0 and 1 are learned from best",
                "or give data.mean and data.std of these images",
                (cure("data.normalize", "data"),),
            )
            return
    if {"train", "val"} <= set(record.inputs):
        (mean, deviation), (other, spread) = record.inputs["train"], record.inputs["val"]
        if abs(mean - other) > 0.75 * max(spread, 1e-6) or not 0.4 < deviation / max(spread, 1e-6) < 2.5:
            yield Finding(
                "augmentation shifts the images",
                f"augmented images have mean {mean:.2f} and deviation {deviation:.2f}, measured ones {other:.2f} and {spread:.2f}",
                "weaken the policy's colour and erasing ops: the network is measured on images that it hardly saw",
            )


CORRUPTING = {
    "GaussianNoise": "gaussian_noise", "PoissonNoise": "shot_noise", "SpeckleNoise": "speckle_noise",
    "SaltAndPepper": "impulse_noise", "GaussianBlur": "defocus_blur", "MotionBlur": "motion_blur",
    "JPEGCompression": "jpeg_compression", "ElasticDeform": "elastic_transform", "Corruption": "all of them",
}  # fmt: skip


def _corruptions(record: Record) -> Iterator[Finding]:
    found = [op for op in record.ops if op in CORRUPTING]
    if found:
        yield Finding(
            "trained on corruptions",
            f"the policy has {', '.join(found)}, near to the robustness test's {', '.join(CORRUPTING[op] for op in found)}",
            "the corruption error is no measure of what the network has never seen; judge it by the other corruptions",
        )


def _rate(record: Record) -> Iterator[Finding]:
    """Is the loss rising, or hardly falling?"""
    if len(record.losses) < 30:
        return
    smooth = _smoothed(record.losses)
    lowest = int(smooth.argmin())
    begin, end = smooth[0], smooth[-1]
    if end > 1.5 * smooth[lowest] and end > 0.9 * begin:
        yield Finding(
            "learning rate too high",
            f"the loss rose {end / smooth[lowest]:.1f} × in {len(smooth) - lowest} steps after its lowest",
            "a longer optim.warmup helps too",
            (cure("optim.lr", _nice(record.lr / 10)), cure("optim.clip_norm", 1.0)),
        )
    elif end > 0.97 * begin and end > (0.3 * math.log(record.classes) if record.classes > 1 else 0.2):
        yield Finding(
            "the loss does not fall",
            f"it is {end:.3f} after {len(smooth)} steps, and was {begin:.3f}",
            "`refract find lr` measures a learning rate; look at the labels",
            tuple(cure("optim.lr", _nice(lr)) for lr in (record.lr * 10, record.lr / 10)),
        )
    elif len(record.history) >= 3 and _steady(smooth) and end > 0.6 * begin:
        yield Finding(
            "learning rate too low",
            f"the loss falls evenly, but in {len(smooth)} steps only from {begin:.3f} to {end:.3f}",
            "`refract find lr` measures one",
            (cure("optim.lr", _nice(record.lr * 10)),),
        )


def _steady(smooth: np.ndarray) -> bool:
    """Whether the last third falls as fast as the first: a training that is far from where it would end."""
    third = len(smooth) // 3
    first, last = smooth[0] - smooth[third], smooth[-third] - smooth[-1]
    return first > 0 and last > 0.6 * first


def _gradients(record: Record) -> Iterator[Finding]:
    """Ratios of gradient to weight, by depth."""
    if not record.gradients:
        return
    layers = list(record.gradients[0])
    if len(layers) < 4:
        return
    middle = {name: float(np.median([row[name] for row in record.gradients if name in row])) for name in layers}
    first, last = np.median([middle[name] for name in layers[:2]]), middle[layers[-1]]
    if last > 0 and first < 1e-4 * last:
        yield Finding(
            "vanishing gradient",
            f"the first layers' gradient over their weights is {first:.1e}, the last one's {last:.1e}",
            "take ReLU or GELU in place of sigmoid and tanh, a norm, or residual connections",
            () if record.pretrained else (cure("model.init", "he_normal"),),
        )
    elif first > 1e4 * last > 0:
        yield Finding(
            "exploding gradient",
            f"the first layers' gradient over their weights is {first:.1e}, the last one's {last:.1e}",
            "take a norm, or a smaller initialisation",
            (cure("optim.clip_norm", 1.0),),
        )


def _units(record: Record) -> Iterator[Finding]:
    dead = {name: share for name, share in record.dead.items() if share > 0.5}
    if dead:
        name, share = max(dead.items(), key=lambda item: item[1])
        yield Finding(
            "dead ReLUs",
            f"{share:.0%} of the units of {name} answer 0 to every image of a batch; {len(dead)} of {len(record.dead)} layers have "
            "more than half of such",
            "a high learning rate early in training is the usual cause",
            (cure("optim.lr", _nice(record.lr / 10)), *_activation(record, "leaky_relu")),
        )
    saturated = {name: share for name, share in record.saturated.items() if share > 0.6}
    if saturated:
        name, share = max(saturated.items(), key=lambda item: item[1])
        yield Finding(
            "saturated units",
            f"{share:.0%} of the answers of {name} lie in the flat ends of its activation",
            "begin with smaller weights",
            (
                *(() if record.pretrained else (cure("model.init", "xavier_normal"),)),
                cure("optim.lr", _nice(record.lr / 10)),
                *_activation(record, "relu"),
            ),
        )


def _activation(record: Record, name: str) -> tuple[Cure, ...]:
    """Another activation, where the network's arguments name one."""
    if record.network not in WITH_ACTIVATION:
        return ()
    kept = {key: value for key, value in record.args.items() if key != "activation_args"}
    return (cure("model.args", {**kept, "activation": name}),)


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
            f"training accuracy is {gap:.1%} above validation, whose loss rose from {min(losses):.3f} in epoch "
            f"{losses.index(min(losses)) + 1} to {losses[-1]:.3f}",
            "augment more, raise optim.weight_decay, or take a smaller network or pretrained weights",
            (cure("trainer.patience", 3), *((cure("model.mode", "feature-extract"),) if record.pretrained else ())),
        )
    last = [row["train_accuracy"] for row in rows[-max(2, len(rows) // 3) :]]
    if not record.soft and abs(gap) < 0.03 and max(last) - min(last) < 0.01 and last[-1] < 0.8:
        yield Finding(
            "underfitting",
            f"training accuracy stays at {last[-1]:.1%}, with no gap to validation",
            "take a larger network, a weaker policy, or less weight decay",
            (cure("trainer.max_epochs", 2 * len(record.history)),),
        )


def _collapse(record: Record) -> Iterator[Finding]:
    if len(record.said) < 2 or not record.truth:
        return
    name, share = max(record.said.items(), key=lambda item: item[1])
    if share > 0.9 and record.truth.get(name, 0) < 0.75 * share:
        yield Finding(
            "class collapse",
            f"{share:.0%} of the hold-out's images are said to be {name}, and {record.truth.get(name, 0):.0%} are",
            "the latter two are for uneven classes",
            (
                cure("optim.lr", _nice(record.lr / 10)),
                cure("data.sampler", "balanced"),
                cure("loss.class_weights", "balanced"),
            ),
        )


def _labels(record: Record) -> Iterator[Finding]:
    """More labels contradict confident predictions than the network's own errors explain: see
    `refract.pipeline.evaluation.label_errors`."""
    noise = record.noise
    if noise is not None and noise.is_noise:
        yield Finding(
            "label noise",
            f"of the surest quarter of the predictions on the test set {noise.contradicted / noise.sure:.0%} contradict the label "
            f"({noise.wrong:.0%} of all do)",
            "look at the report's `Labels that are likely wrong` and correct the labels",
            (cure("loss.label_smoothing", 0.1),),
        )


def _time(record: Record) -> Iterator[Finding]:
    total = sum(record.seconds.values())
    waiting = record.seconds.get("waiting", 0.0)
    if waiting > 30 and waiting > 0.35 * total:  # less is not worth a cure: worker processes take seconds to start
        workers = () if record.workers else (cure("data.workers", 2),)
        yield Finding(
            "the loader is the bottleneck",
            f"{waiting / total:.0%} of the time went to waiting for images, with {record.workers} worker processes",
            "data.memory needs room for all decoded images; smaller files or a cheaper policy help too (`refract explain` times it)",
            (*workers, cure("data.memory", "always")),
        )


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Means over a tenth of the steps, at least ten."""
    width = max(10, len(losses) // 10)
    sums = np.cumsum(np.r_[0.0, losses])
    return (sums[width:] - sums[:-width]) / width


def _nice(value: float) -> float:
    return float(f"{value:.1g}")
