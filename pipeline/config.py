"""The one configuration: typed, read from YAML, overridden on the command line, saved with every run and bundle."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.retraining.settings import GateConfig, RetrainConfig

LONGEST_TEXT = 4096
"""Words or tokens: a server holds so many numbers for each sample that waits."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and what is accepted."""


@dataclass
class DataConfig:
    """The pictures and how they reach the network.

    Args:
        source: a folder (CLASS/… or train|val|test/CLASS/…), a CSV or Parquet manifest (path,label and/or text[,split]), or `digits`.
        task: auto takes multilabel where a label holds `;`, binary for two classes, else multiclass.
        image_size: the network's input, pixels: one side of a square or [height, width].
        resize: outside training; crop keeps the ratio of the sides and takes the centre, squash takes the whole picture.
        crop_ratio: share of the shorter side that the centre crop takes, in (0, 1].
        normalize: zero-centring by fixed mean and std, those of the data, its mean_image, or pca or zca whitening (small pictures).
        mean: of R, G, B in 0…1, for fixed; null takes the pretrained weights' own, else ImageNet's.
        std: as mean.
        val_share: share of the training pictures drawn for validation where the data has no `val` split.
        test_share: share drawn for the hold-out where the data has no `test` split.
        batch_size: pictures a step; of the whole training set, one step an epoch.
        repeats: draws of each training picture beside each other in a batch; an epoch then takes 1/repeats of the pictures.
        sampler: shuffle takes each picture once an epoch; balanced draws each class equally often, pictures of small ones repeatedly.
        memory: keep the pictures decoded; auto does so where they have one size and take at most 1 GiB together.
        workers: processes that load pictures; null chooses for this machine, none for pictures in memory.
        on_bad_file: error stops before training; skip leaves unreadable files, and training pictures that are in val or test too, out.
    """

    source: str = "digits"
    task: Literal["auto", "binary", "multiclass", "multilabel"] = "auto"
    image_size: int | tuple[int, int] = 32
    resize: Literal["crop", "squash"] = "crop"
    crop_ratio: float = 0.875
    normalize: Literal["fixed", "data", "mean_image", "pca", "zca"] = "fixed"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    val_share: float = 0.1
    test_share: float = 0.2
    batch_size: int = 64
    repeats: int = 1
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    memory: Literal["auto", "never", "always"] = "auto"
    workers: int | None = None
    on_bad_file: Literal["error", "skip"] = "error"


@dataclass
class AugmentConfig:
    """What happens to the training pictures.

    Args:
        policy: a preset's name, a YAML file, a list of ops such as [{HorizontalFlip: {p: 0.5}}], or {exact: true, ops: […]}.
    """

    policy: str | list | dict = "none"


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: lenet5, resnet20, fastnet, cnn, mlp, rbf, linear, perceptron, one of torchvision or timm (timm/NAME forces it), or none.
        weights: none, default (the library's pretrained weights), a file, a folder with one, or a URL.
        mode: fine-tune trains all, feature-extract the head, gradual from the head down, linear-then-fine-tune first the head, then all.
        unfreeze_epochs: epochs until gradual and linear-then-fine-tune train all.
        frozen_norms: keep the statistics of batch norms as the weights have them.
        head: the last layer: linear, mlp (one hidden layer) or cosine (of the angle to each class).
        init: default is the network's own; else how linear and convolutional layers begin, as he_normal, orthogonal or lsuv.
        args: further arguments of the network.
    """

    name: str = "resnet20"
    weights: str = "none"
    mode: Literal["fine-tune", "feature-extract", "gradual", "linear-then-fine-tune"] = "fine-tune"
    unfreeze_epochs: int = 1
    frozen_norms: bool = False
    head: Literal["linear", "mlp", "cosine"] = "linear"
    init: str = "default"
    args: dict = field(default_factory=dict)


@dataclass
class TextConfig:
    """The network that reads the samples' texts, beside that of the pictures or, with model.name none, alone.

    Args:
        name: none, hashing (n-grams by their hashes, no download), or a transformer of Hugging Face by folder or hub name.
        weights: of a transformer: default, its own, or none, fresh ones.
        max_length: of a text, in words for hashing, else in tokens; the rest is not read.
        pooling: of a transformer's states: mean, cls, last, or auto, last for decoders, else mean.
        fusion: how both come together: concat, gated or film.
        width: of what comes of it.
        drop_picture: share of the training's samples that are shown without their picture, so that texts alone are answered too.
        drop_text: share that are shown without their text.
        args: of hashing: buckets, width, dropout.
    """

    name: str = "none"
    weights: Literal["default", "none"] = "default"
    max_length: int = 64
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    fusion: Literal["concat", "gated", "film"] = "concat"
    width: int = 256
    drop_picture: float = 0.15
    drop_text: float = 0.15
    args: dict = field(default_factory=dict)


@dataclass
class OptimConfig:
    """How the weights move.

    Args:
        name: the optimiser: sgd, adagrad, adadelta, rmsprop, adam, adamw, lion or muon.
        lr: peak learning rate.
        weight_decay: decoupled for adamw, lion and muon; never on norms and biases.
        momentum: of sgd, rmsprop and muon.
        nesterov: whether sgd looks ahead.
        schedule: of the learning rate, by step: constant, linear, cosine, step, inverse_sqrt or one_cycle.
        warmup: share of all steps in which the rate rises linearly, in [0, 1].
        lr_end: the lowest rate after the warm-up, as a share of the peak.
        norm_lr: times the rate for what norms learn.
        layer_decay: times the rate for each block further from the head, in (0, 1].
        sam: radius of sharpness-aware minimisation, as 0.05; 0 leaves it out. It takes two passes a step.
        clip_norm: bound of the gradient's norm.
        clip_value: bound of each of the gradient's values.
    """

    name: Literal["sgd", "adagrad", "adadelta", "rmsprop", "adam", "adamw", "lion", "muon"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    schedule: Literal["constant", "linear", "cosine", "step", "inverse_sqrt", "one_cycle"] = "cosine"
    warmup: float = 0.1
    lr_end: float = 0.0
    norm_lr: float = 1.0
    layer_decay: float = 1.0
    sam: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None


@dataclass
class LossConfig:
    """What training minimises.

    Args:
        name: auto takes cross_entropy, for multilabel bce; else cross_entropy, bce, focal, mse or perceptron.
        label_smoothing: in [0, 1).
        gamma: of focal.
        class_weights: balanced weighs each class by one over its number of training pictures.
        consistency: weight of the divergence between three views of each picture (12 in the paper of AugMix, which the policy must have).
        penalty: weight of the elastic net on the weights.
        l1_ratio: of that, in [0, 1]: 1 is L1, 0 is L2.
        teacher: a bundle to learn from besides, of the same labels and image size.
        distill: weight of the teacher's answers against the labels, in [0, 1].
        temperature: of both answers in learning from a teacher.
    """

    name: Literal["auto", "cross_entropy", "bce", "focal", "mse", "perceptron"] = "auto"
    label_smoothing: float = 0.0
    gamma: float = 2.0
    class_weights: Literal["none", "balanced"] = "none"
    consistency: float = 0.0
    penalty: float = 0.0
    l1_ratio: float = 0.0
    teacher: str | None = None
    distill: float = 0.5
    temperature: float = 4.0


@dataclass
class TrainerConfig:
    """The training loop.

    Args:
        max_epochs: passes over the training pictures.
        seed: of the split, the weights, the order and every augmentation.
        device: auto takes a GPU where there is one.
        devices: processes that train together, each on a device of its own with batches of data.batch_size; torchrun says it instead.
        precision: auto takes bf16 or fp16 where the device computes in it, else fp32.
        accumulate: batches whose gradients make one step.
        ema: decay of an average of the weights, as 0.999, which is then what is measured and kept; 0 for none.
        swa_start: share of the epochs after which the weights are averaged evenly, as 0.75; null for never.
        patience: epochs without a better validation figure after which training stops; null for never.
        checkpoint_seconds: between checkpoints to go on from after an interruption, within an epoch too.
        compile: compile the network; pays on a GPU and in long runs.
        recompute: keep only what enters each block of the network and compute the rest again going back: less memory, a third more time.
        start_size: share of the pictures' sides that the first epoch sees, rising to all of them at three quarters of the epochs.
        tta: further figures of the hold-out, tta_…, of the mean answer to the picture and its mirror image, or also shifts by a pixel.
        runs_dir: folder that holds the runs.
        run_name: the run's folder; null names it after the config and the time.
    """

    max_epochs: int = 10
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulate: int = 1
    ema: float = 0.0
    swa_start: float | None = None
    patience: int | None = None
    checkpoint_seconds: float = 120.0
    compile: bool = False
    recompute: bool = False
    start_size: float = 1.0
    tta: Literal["none", "flip", "flip-shift"] = "none"
    runs_dir: str = "runs"
    run_name: str | None = None


@dataclass
class EvaluationConfig:
    """What is measured on the hold-out at the end.

    Args:
        precision: wanted of the answers that are given; sets the confidence below which the bundle says to leave an answer to a person.
        robustness: share of errors under the 19 corruptions of ImageNet-C: quick takes 50 pictures and 3 severities, full all and 5.
    """

    precision: float = 0.95
    robustness: Literal["none", "quick", "full"] = "quick"


@dataclass
class TrackingConfig:
    """MLflow.

    Args:
        enabled: false trains without MLflow.
        uri: the tracking server; null takes MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.
        experiment: the experiment's name.
        model_name: the registered model that gets the bundle as a new version; null registers nothing.
        alias: the alias that moves to the new version.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "refract"
    model_name: str | None = None
    alias: str = "champion"


@dataclass
class Config:
    """All of it; `to_dict` is what runs and bundles store."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)

    def image_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        size = self.data.image_size
        return (size, size) if isinstance(size, int) else size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON and YAML values."""
        return _plain(asdict(self))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config (None: all defaults) and apply overrides such as `--optim.lr 3e-3` or `--optim.lr=3e-3`.

    ConfigError names an unknown key and the nearest valid one, or an ill-typed value and its key.
    """
    values = {} if path is None else _read_yaml(Path(path))
    return config_from_dict(values, overrides, where="the config" if path is None else str(path))


def config_from_dict(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "the stored config"
) -> Config:
    """`load_config` for values at hand, such as those that a bundle stores."""
    for key in _unknown_keys(values, Config, ""):
        raise ConfigError(f"{where}: no key {key!r}{_nearest(key)}")
    for key in _override_keys(overrides):
        if key not in _KEYS:
            raise ConfigError(f"command line: no option --{key}{_nearest(key)}")
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="refract train", exit_on_error=False)
    parser.add_class_arguments(Config)
    blamed = where
    try:
        namespace = parser.parse_object(dict(values))
        blamed = "command line"
        namespace = parser.parse_args(list(overrides), namespace=namespace)
        config = Config(**{item.name: parser.instantiate(namespace)[item.name] for item in fields(Config)})
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{blamed}: {_plain_words(str(error))}") from error
    _check(config, where, frozenset(_override_keys(overrides)))
    return config


def help_text() -> str:
    """A line for each key: its default and what it means."""
    lines = []
    for section in fields(Config):
        default = getattr(Config(), section.name)
        notes = dict(re.findall(r"^ +(\w+): (.+)$", type(default).__doc__ or "", re.MULTILINE))
        lines.append(f"{section.name}: {(type(default).__doc__ or '').splitlines()[0]}")
        lines += [
            f"  --{section.name}.{f.name} {getattr(default, f.name)!r}\n        {notes[f.name]}"
            for f in fields(default)
        ]
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    from augment.yaml_text import read_yaml

    try:
        values = read_yaml(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; `refract init FOLDER -o {path}` writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected sections ({', '.join(f.name for f in fields(Config))}), got {type(values).__name__}"
        )
    return values


def _unknown_keys(values: Mapping[str, Any], kind: type, prefix: str) -> Iterator[str]:
    known = {item.name: item for item in fields(kind)}
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
            continue
        section = known[key].default_factory
        if isinstance(section, type) and is_dataclass(section):
            if isinstance(value, Mapping):
                yield from _unknown_keys(value, section, f"{prefix}{key}.")
            elif value is None:
                raise ConfigError(f"{prefix}{key}: the section is empty; leave its line out for the defaults")


def _override_keys(overrides: Sequence[str]) -> list[str]:
    return [part[2:].split("=", 1)[0] for part in overrides if part.startswith("--")]


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        section = item.default_factory
        yield prefix + item.name
        if isinstance(section, type) and is_dataclass(section):
            yield from _keys(section, f"{prefix}{item.name}.")


_KEYS = tuple(_keys(Config))


def _nearest(key: str) -> str:
    match = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.4)
    # A key without its section is the commonest slip: `lr` for `optim.lr`.
    inside = [known for known in _KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    best = inside or match
    return f"; did you mean {best[0]!r}?" if best else f"; known sections: {', '.join(f.name for f in fields(Config))}"


def _check(config: Config, where: str, overridden: frozenset[str]) -> None:
    """The ranges that a type cannot say."""
    data, model, trainer = config.data, config.model, config.trainer
    rules = [
        ("data.image_size", data.image_size, min(config.image_size()) >= 8, "at least 8 pixels"),
        ("data.crop_ratio", data.crop_ratio, 0 < data.crop_ratio <= 1, "in (0, 1]"),
        ("data.val_share", data.val_share, 0 < data.val_share < 1, "in (0, 1)"),
        ("data.test_share", data.test_share, 0 < data.test_share < 1, "in (0, 1)"),
        ("data.batch_size", data.batch_size, data.batch_size >= 1, "at least 1"),
        ("data.repeats", data.repeats, 1 <= data.repeats <= data.batch_size, "in 1…data.batch_size"),
        ("data.workers", data.workers, data.workers is None or data.workers >= 0, "at least 0, or null"),
        ("data.std", data.std, data.std is None or min(data.std) > 0, "positive"),
        (
            "text.max_length",
            config.text.max_length,
            1 <= config.text.max_length <= LONGEST_TEXT,
            f"in 1…{LONGEST_TEXT}",
        ),
        ("text.width", config.text.width, config.text.width >= 1, "at least 1"),
        ("text.drop_picture", config.text.drop_picture, 0 <= config.text.drop_picture <= 1, "in [0, 1]"),
        ("text.drop_text", config.text.drop_text, 0 <= config.text.drop_text <= 1, "in [0, 1]"),
        ("model.unfreeze_epochs", model.unfreeze_epochs, model.unfreeze_epochs >= 1, "at least 1"),
        ("trainer.devices", trainer.devices, trainer.devices >= 1, "at least 1"),
        ("trainer.checkpoint_seconds", trainer.checkpoint_seconds, trainer.checkpoint_seconds >= 0, "at least 0"),
        ("trainer.accumulate", trainer.accumulate, trainer.accumulate >= 1, "at least 1"),
        ("trainer.ema", trainer.ema, 0 <= trainer.ema < 1, "in [0, 1)"),
        (
            "trainer.swa_start",
            trainer.swa_start,
            trainer.swa_start is None or 0 <= trainer.swa_start < 1,
            "in [0, 1), or null",
        ),
        (
            "trainer.patience",
            trainer.patience,
            trainer.patience is None or trainer.patience >= 1,
            "at least 1, or null",
        ),
        ("trainer.start_size", trainer.start_size, 0.25 <= trainer.start_size <= 1, "in [0.25, 1]"),
        ("evaluation.precision", config.evaluation.precision, 0 < config.evaluation.precision <= 1, "in (0, 1]"),
        ("trainer.max_epochs", trainer.max_epochs, trainer.max_epochs >= 1, "at least 1"),
        ("trainer.seed", trainer.seed, 0 <= trainer.seed < 2**32, "in [0, 2**32)"),
        (
            "trainer.run_name",
            trainer.run_name,
            trainer.run_name is None or _is_name(trainer.run_name),
            "a plain folder name",
        ),
        *config.gate.rules(),
        *config.retrain.rules(),
    ]
    for key, value, holds, accepted in rules:
        if not holds:
            blamed = "command line" if key in overridden else where
            raise ConfigError(f"{blamed}: {key}: {value!r} is not {accepted}")
    if trainer.patience is not None and trainer.swa_start is not None:
        raise ConfigError(
            f"{where}: trainer.patience could end the training before trainer.swa_start's average begins; choose one"
        )
    if config.model.weights != "none" and config.model.init != "default":
        raise ConfigError(f"{where}: model.weights and model.init both say how the weights begin; choose one")
    if model.name == "none" and config.text.name == "none":
        raise ConfigError(f"{where}: model.name and text.name are both none: nothing would be read")
    if config.text.name != "none" and config.text.drop_picture + config.text.drop_text > 1:
        raise ConfigError(f"{where}: text.drop_picture and text.drop_text are more than 1 together")
    if trainer.ema and trainer.swa_start is not None:
        raise ConfigError(f"{where}: trainer.ema and trainer.swa_start both average the weights; choose one")


def _plain_words(message: str) -> str:
    """jsonargparse's account of an ill-typed value, on one line and without Python's type syntax."""
    message = " ".join(message.split())
    for pattern, words in (
        (r'Parser key "([^"]+)":', r"\1:"),
        (r"<class '(\w+)'>", r"\1"),
        (r"Expected a (?=[aeiou])", "Expected an "),
        (r"typing\.Literal\[([^]]*)\]", r"one of \1"),
    ):
        message = re.sub(pattern, words, message)
    return message


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
