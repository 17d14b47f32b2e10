"""The sections of the config: their keys, defaults, meanings, and the ranges that a type cannot say."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

LONGEST_TEXT = 4096
"""Words or tokens: a server holds so many numbers for each sample that waits."""

Rules = Iterator[tuple[str, object, bool, str]]
"""(key, value, whether it can be, what could be) of each value that has a range."""


@dataclass
class DataConfig:
    """The images and how they reach the network.

    Args:
        source: a folder (CLASS/… or train|val|test/CLASS/…), a CSV, TSV or Parquet manifest (path,label and/or text[,split]), or `digits`.
        task: auto takes multilabel where a label holds `;`, binary for two classes, else multiclass.
        image_size: the network's input, pixels: one side of a square or [height, width].
        resize: outside training; crop keeps the ratio of the sides and takes the centre, squash takes the whole image.
        crop_ratio: share of the shorter side that the centre crop takes, in (0, 1].
        color_profile: convert takes images to sRGB by their embedded ICC profile (Display P3, Adobe RGB, CMYK); ignore does not.
        normalize: zero-centring by fixed mean and std, those of the data, its mean_image, or pca or zca whitening (small images).
        mean: of R, G, B in 0…1, for fixed; null takes the pretrained weights' own, else ImageNet's.
        std: as mean.
        val_fraction: share of the training images drawn for validation where the data has no `val` split.
        test_fraction: share drawn for the hold-out where the data has no `test` split.
        batch_size: images a step; of the whole training set, one step an epoch.
        repeats: draws of each training image beside each other in a batch; an epoch then takes 1/repeats of the images.
        sampler: shuffle takes each image once an epoch; balanced draws each class equally often, images of small ones repeatedly.
        memory: keep the images decoded; auto does so where they have one size and take at most 1 GiB together.
        workers: processes that load images; null chooses for this machine, none for images in memory.
        on_bad_file: error stops before training; skip leaves unreadable files, and training images that are in val or test too, out.
    """

    source: str = "digits"
    task: Literal["auto", "binary", "multiclass", "multilabel"] = "auto"
    image_size: int | tuple[int, int] = 32
    resize: Literal["crop", "squash"] = "crop"
    crop_ratio: float = 0.875
    color_profile: Literal["convert", "ignore"] = "convert"
    normalize: Literal["fixed", "data", "mean_image", "pca", "zca"] = "fixed"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    batch_size: int = 64
    repeats: int = 1
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    memory: Literal["auto", "never", "always"] = "auto"
    workers: int | None = None
    on_bad_file: Literal["error", "skip"] = "error"

    def sides(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def rules(self) -> Rules:
        yield "data.image_size", self.image_size, min(self.sides()) >= 8, "at least 8 pixels"
        yield "data.crop_ratio", self.crop_ratio, 0 < self.crop_ratio <= 1, "in (0, 1]"
        yield "data.val_fraction", self.val_fraction, 0 < self.val_fraction < 1, "in (0, 1)"
        yield "data.test_fraction", self.test_fraction, 0 < self.test_fraction < 1, "in (0, 1)"
        yield "data.batch_size", self.batch_size, self.batch_size >= 1, "at least 1"
        yield "data.repeats", self.repeats, 1 <= self.repeats <= self.batch_size, "in 1…data.batch_size"
        yield "data.workers", self.workers, self.workers is None or self.workers >= 0, "at least 0, or null"
        yield "data.std", self.std, self.std is None or min(self.std) > 0, "positive"


@dataclass
class AugmentConfig:
    """What happens to the training images.

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
        frozen_norms: keep the statistics of batch norms as the weights have them; null does so with loaded weights but a bundle's.
        head: the last layer: linear, mlp (one hidden layer) or cosine (of the angle to each class).
        init: default is the network's own; else how linear and convolutional layers start, as he_normal; with weights, those of the head.
        args: further arguments of the network.
    """

    name: str = "resnet20"
    weights: str = "none"
    mode: Literal["fine-tune", "feature-extract", "gradual", "linear-then-fine-tune"] = "fine-tune"
    unfreeze_epochs: int = 1
    frozen_norms: bool | None = None
    head: Literal["linear", "mlp", "cosine"] = "linear"
    init: str = "default"
    args: dict = field(default_factory=dict)

    def rules(self) -> Rules:
        yield "model.unfreeze_epochs", self.unfreeze_epochs, self.unfreeze_epochs >= 1, "at least 1"


@dataclass
class TextConfig:
    """The network that reads the samples' texts, beside that of the images or, with model.name none, alone.

    Args:
        name: none, hashing (n-grams by their hashes, no download), or a transformer of Hugging Face by folder or hub name.
        weights: of a transformer: default, its own, or none, fresh ones.
        max_length: of a text, in words for hashing, else in tokens; the rest is not read.
        pooling: of a transformer's states: mean, cls, last, or auto, last for decoders, else mean.
        fusion: how both come together: concat, gated or film.
        width: of what comes of it.
        drop_image: share of the training's samples that are shown without their image, so that texts alone are answered too.
        drop_text: share that are shown without their text.
        args: of hashing: buckets, width, dropout.
    """

    name: str = "none"
    weights: Literal["default", "none"] = "default"
    max_length: int = 64
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    fusion: Literal["concat", "gated", "film"] = "concat"
    width: int = 256
    drop_image: float = 0.15
    drop_text: float = 0.15
    args: dict = field(default_factory=dict)

    def rules(self) -> Rules:
        yield "text.max_length", self.max_length, 1 <= self.max_length <= LONGEST_TEXT, f"in 1…{LONGEST_TEXT}"
        yield "text.width", self.width, self.width >= 1, "at least 1"
        yield "text.drop_image", self.drop_image, 0 <= self.drop_image <= 1, "in [0, 1]"
        yield "text.drop_text", self.drop_text, 0 <= self.drop_text <= 1, "in [0, 1]"


@dataclass
class OptimConfig:
    """How the weights move.

    Args:
        name: the optimiser: sgd, adagrad, adadelta, rmsprop, adam, adamw, lion or muon.
        lr: peak learning rate; null chooses by optimiser and model.mode.
        head_lr: times the rate for the head; null takes 10 for the new head of loaded weights, else 1.
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
    lr: float | None = None
    head_lr: float | None = None
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
        class_weights: balanced weighs each class by one over its number of training images.
        consistency: weight of the divergence between three views of each image (12 in the paper of AugMix, which the policy must have).
        penalty: weight of the elastic net on the weights.
        l1_ratio: of that, in [0, 1]: 1 is L1, 0 is L2.
        teacher: a bundle to learn from besides, of the same labels and image size; where it reads texts, by the same tokens.
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
        max_epochs: passes over the training images.
        seed: of the split, the weights, the order and every augmentation.
        device: auto takes a GPU where there is one.
        devices: processes that train together, each on a device of its own with batches of data.batch_size; torchrun says it instead.
        precision: auto takes bf16 or fp16 where the device computes faster in it, else fp32.
        accumulate: batches whose gradients make one step.
        ema: decay of an average of the weights, as 0.999, which is then what is measured and kept; 0 for none.
        swa_start: share of the epochs after which the weights are averaged evenly, as 0.75; null for never.
        patience: epochs without a better validation figure after which training stops; null for never.
        checkpoint_seconds: between checkpoints to go on from after an interruption, within an epoch too.
        compile: compile the network; pays on a GPU and in long runs.
        gradient_checkpointing: keep only the inputs of each block and compute the rest again in the backward pass: a third more time.
        start_size: share of the images' sides that the first epoch sees, rising to all of them at three quarters of the epochs.
        tta: further figures of the hold-out, tta_…, of the mean answer to the image and its mirror image, or also shifts by a pixel.
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
    gradient_checkpointing: bool = False
    start_size: float = 1.0
    tta: Literal["none", "flip", "flip-shift"] = "none"
    runs_dir: str = "runs"
    run_name: str | None = None

    def rules(self) -> Rules:
        swa, patience, name = self.swa_start, self.patience, self.run_name
        yield "trainer.devices", self.devices, self.devices >= 1, "at least 1"
        yield "trainer.checkpoint_seconds", self.checkpoint_seconds, self.checkpoint_seconds >= 0, "at least 0"
        yield "trainer.accumulate", self.accumulate, self.accumulate >= 1, "at least 1"
        yield "trainer.ema", self.ema, 0 <= self.ema < 1, "in [0, 1)"
        yield "trainer.swa_start", swa, swa is None or 0 <= swa < 1, "in [0, 1), or null"
        yield "trainer.patience", patience, patience is None or patience >= 1, "at least 1, or null"
        yield "trainer.start_size", self.start_size, 0.25 <= self.start_size <= 1, "in [0.25, 1]"
        yield "trainer.max_epochs", self.max_epochs, self.max_epochs >= 1, "at least 1"
        yield "trainer.seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2**32)"
        yield "trainer.run_name", name, name is None or _is_name(name), "a plain folder name"


@dataclass
class EvaluationConfig:
    """What is measured on the hold-out at the end.

    Args:
        precision: wanted of the answers that are given; sets the confidence below which the bundle says to leave an answer to a person.
        threshold: of multi-label labels: f1 (best F1 on validation), precision or recall (reach threshold_target, best other), fixed (0.5).
        threshold_target: precision or recall wanted of each label on validation.
        robustness: to corruptions: auto (up to 1/3 of training's cost), none, quick (50 images, 3 severities), full (all images, 5).
    """

    precision: float = 0.95
    threshold: Literal["f1", "precision", "recall", "fixed"] = "f1"
    threshold_target: float = 0.9
    robustness: Literal["auto", "none", "quick", "full"] = "auto"

    def rules(self) -> Rules:
        yield "evaluation.precision", self.precision, 0 < self.precision <= 1, "in (0, 1]"
        target = self.threshold_target
        yield "evaluation.threshold_target", target, 0 < target <= 1, "in (0, 1]"


@dataclass
class TrackingConfig:
    """MLflow.

    Args:
        enabled: false trains without MLflow.
        uri: the tracking server; null takes MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.
        experiment: the experiment's name.
        model_name: the registered model that gets the bundle as a new version; null registers nothing. No / : @ or backslash in it.
        alias: of the model's first version; challenger leaves the champion to `refract promote`. Later versions are challenger anyway.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "refract"
    model_name: str | None = None
    alias: Literal["champion", "challenger"] = "champion"

    def rules(self) -> Rules:
        name, experiment = self.model_name, self.experiment
        yield "tracking.model_name", name, name is None or _is_model_name(name), MODEL_NAME
        shown = bool(experiment.strip()) and experiment.isprintable() and len(experiment) <= 250
        yield "tracking.experiment", experiment, shown, "a name of 1 to 250 printable characters"


MODEL_NAME = (
    "a name that MLflow, folders and models:/NAME@ALIAS take: 1 to 200 bytes, printable, without / : @ and \\, "
    "without blanks at its ends, not with both ' and \""
)


def _is_model_name(name: str) -> bool:
    return (
        _is_name(name)
        and len(name.encode()) <= 200
        and name.isprintable()
        and name == name.strip()
        and not set(name) & set("/:@\\")
        and not {"'", '"'} <= set(name)
    )


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name
