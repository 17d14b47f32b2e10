"""Findings of trainings that start from weights: mismatched normalisation, and a transfer that learned nothing."""

from collections.abc import Iterator

from refract.pipeline.doctor.record import Record
from refract.pipeline.finding import Cure, Finding, Setting, cure

SUITED_LR = {
    ("head", "sgd"): 0.1, ("head", "adaptive"): 3e-3, ("adapters", "sgd"): 3e-2, ("adapters", "adaptive"): 1e-3,
    ("all", "sgd"): 1e-2, ("all", "adaptive"): 3e-4,
}  # fmt: skip
"""Usual learning rates for a new head on frozen weights, for adapters of LoRA, and for a whole pretrained network."""

TRAINED = {"feature-extract": "head", "lora": "adapters"}
"""Mode → what it trains; other modes train all layers."""

OWN_SCALE = ("adagrad", "adadelta", "muon")
"""Optimisers whose learning rates have another scale."""

FEW_STEPS = 100


def normalisation(record: Record) -> Iterator[Finding]:
    """Yield a finding where the run's normalisation differs from that of the weights' training."""
    if record.normalisation is None or record.weights_normalisation is None:
        return
    (mean, std), (weights_mean, weights_std) = record.normalisation, record.weights_normalisation
    shifted = max(abs(a - b) / s for a, b, s in zip(mean, weights_mean, weights_std, strict=True)) > 0.5
    scaled = any(not 0.5 < a / b < 2 for a, b in zip(std, weights_std, strict=True))
    if shifted or scaled:
        yield Finding(
            "normalisation unlike the weights'",
            f"images are normalised by mean {_three(mean)} and std {_three(std)}, but the weights were trained with "
            f"{_three(weights_mean)} and {_three(weights_std)}",
            "null takes the mean and std of the weights",
            (_own_normalisation(),),
        )


def nothing_learned(record: Record) -> Iterator[Finding]:
    """Yield a finding where the test predictions agree with the labels no better than predictions that ignore the image.

    The chance accuracy is Σ said·truth over the classes, that of predictions with the same frequencies but independent of the labels
    (as in Cohen 1960's kappa). For a constant prediction it is the fraction of that class. The finding needs the chance accuracy inside
    or above the Wilson interval of the accuracy, and an interval whose upper end is below (1 + chance) / 2: small test sets give none.
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
        f"the accuracy on {record.answered} test samples is {right / record.answered:.1%} (95 % interval {interval.low:.1%} to "
        f"{interval.high:.1%}), and predictions that ignore the image reach {chance:.1%}{trained}",
        "check that model.weights belongs to this network, and that data.mean and data.std are those of its training",
        tuple(_memorised_cures(record) if memorised else _cures(record)),
    )


def _memorised_cures(record: Record) -> Iterator[Cure]:
    """Yield cures for a network that memorised the training samples: train less of it, or more slowly."""
    yield cure("model.mode", "feature-extract")
    yield cure("optim.lr", one_digit(record.lr / 10))


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
    """Return the usual learning rate of the mode and the optimiser, or a tenth of the current one if there is none."""
    if record.optimizer in OWN_SCALE:
        return one_digit(record.lr / 10)
    return SUITED_LR[TRAINED.get(record.mode, "all"), _kind(record)]


def _kind(record: Record) -> str:
    return "sgd" if record.optimizer == "sgd" else "adaptive"


def _own_normalisation() -> Cure:
    return (Setting("data.mean", None), Setting("data.std", None))


def _train_accuracy(record: Record) -> float | None:
    """Return the last epoch's training accuracy, or None where mixed or smoothed targets make it meaningless."""
    if record.soft or not record.history:
        return None
    return record.history[-1].get("train_accuracy")


def _three(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"


def one_digit(value: float) -> float:
    """Return the value rounded to one significant digit, as users write learning rates."""
    return float(f"{value:.1g}")
