"""Findings of trainings that start from weights: a normalisation unlike theirs, and a transfer that learned nothing."""

from collections.abc import Iterator

from refract.pipeline.doctor.finding import Cure, Finding, Setting, cure
from refract.pipeline.doctor.record import Record

SUITED_LR = {("head", "sgd"): 0.1, ("head", "adaptive"): 3e-3, ("all", "sgd"): 1e-2, ("all", "adaptive"): 3e-4}
"""Learning rates that are usual for a new head on frozen weights, and for all of a pretrained network."""

OWN_SCALE = ("adagrad", "adadelta", "muon")
"""Optimisers whose learning rates are on another scale."""

FEW_STEPS = 100


def normalisation(record: Record) -> Iterator[Finding]:
    """The network reads images on another scale than its weights know."""
    if record.normalisation is None or record.weights_normalisation is None:
        return
    (mean, std), (own_mean, own_std) = record.normalisation, record.weights_normalisation
    shifted = max(abs(a - b) / s for a, b, s in zip(mean, own_mean, own_std, strict=True)) > 0.5
    scaled = any(not 0.5 < a / b < 2 for a, b in zip(std, own_std, strict=True))
    if shifted or scaled:
        yield Finding(
            "normalisation unlike the weights'",
            f"images are normalised by mean {_three(mean)} and std {_three(std)}, and the weights were trained with {_three(own_mean)} and "
            f"{_three(own_std)}",
            "null takes the weights' own numbers",
            (_own_normalisation(),),
        )


def nothing_learned(record: Record) -> Iterator[Finding]:
    """The predictions on the test set agree with the labels no better than if they ignored the image.

    Predictions as frequent as these, but independent of the labels, are right in Σ said·truth (as in Cohen 1960's kappa); of a constant
    prediction that is its class's fraction. The finding needs that number inside or above the Wilson interval of the accuracy, and an
    interval that ends in the lower half of what is left to learn, so that small test sets give none.
    """
    if not (record.pretrained and record.answered and record.said and record.truth):
        return
    from scipy.stats import binomtest

    chance = sum(fraction * record.truth.get(name, 0.0) for name, fraction in record.said.items())
    right = round((1 - record.wrong) * record.answered)
    interval = binomtest(right, record.answered).proportion_ci(method="wilson")
    if interval.low > chance or interval.high > (1 + chance) / 2:
        return
    accuracy = _train_accuracy(record)
    trained = "" if accuracy is None else f"; training accuracy is {accuracy:.1%}"
    memorised = accuracy is not None and accuracy > (1 + chance) / 2
    yield Finding(
        "the transfer learned nothing",
        f"{right / record.answered:.1%} of {record.answered} test samples are right (95 % interval {interval.low:.1%} to "
        f"{interval.high:.1%}), and {chance:.1%} would be without looking at them{trained}",
        "check that model.weights is the file of this network, and that data.mean and data.std are those it was trained with",
        tuple(_memorised_cures(record) if memorised else _cures(record)),
    )


def _memorised_cures(record: Record) -> Iterator[Cure]:
    """The training samples are known, and nothing carries over: train less of the network, or more slowly."""
    yield cure("model.mode", "feature-extract")
    yield cure("optim.lr", _nice(record.lr / 10))


def _cures(record: Record) -> Iterator[Cure]:
    if any(normalisation(record)):
        yield _own_normalisation()
    suited = suited_lr(record)
    if not suited / 3 <= record.lr <= suited * 3:
        yield cure("optim.lr", suited)
    if 0 < len(record.losses) < FEW_STEPS:
        yield cure("trainer.max_epochs", max(2, 4 * len(record.history)))
    if record.mode == "fine-tune":
        yield cure("model.mode", "linear-then-fine-tune")
    elif record.mode == "feature-extract":
        yield (Setting("model.mode", "fine-tune"), Setting("optim.lr", SUITED_LR["all", _kind(record)]))


def suited_lr(record: Record) -> float:
    """A learning rate that is usual for the record's mode and optimiser; a tenth of its own where none is."""
    if record.optimizer in OWN_SCALE:
        return _nice(record.lr / 10)
    return SUITED_LR["head" if record.mode == "feature-extract" else "all", _kind(record)]


def _kind(record: Record) -> str:
    return "sgd" if record.optimizer == "sgd" else "adaptive"


def _own_normalisation() -> Cure:
    return (Setting("data.mean", None), Setting("data.std", None))


def _train_accuracy(record: Record) -> float | None:
    """Of the last epoch; None where mixed or smoothed targets make it meaningless."""
    if record.soft or not record.history:
        return None
    return record.history[-1].get("train_accuracy")


def _three(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"


def _nice(value: float) -> float:
    return float(f"{value:.1g}")
