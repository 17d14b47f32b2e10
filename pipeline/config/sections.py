"""The sections of the config: keys, types, defaults, meanings and the ranges of values.

The class docstrings are the text of `refract train --help`: one entry `key: meaning` for each field.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

LONGEST_TEXT = 4096
"""Upper bound of text.max_length, in words or tokens. A server keeps this many integers in memory for each queued sample."""

LossName = Literal["auto", "cross_entropy", "bce", "focal", "mse", "perceptron"]
"""The names of Refract's losses. Plugins add others, which `models.training.losses.LossSpec` checks."""

Rules = Iterator[tuple[str, object, bool, str]]
"""(key, value, whether the value is valid, description of the valid values), for each key that has a range."""


@dataclass
class DataConfig:
    """The data set, and how its images reach the network.

    Args:
        source: data set: a folder (CLASS/… or train|val|test/CLASS/…), a CSV, TSV or Parquet manifest with the columns
            path,label and/or text[,split], or `digits` (embedded).
        task: kind of classification; auto chooses multilabel if a label contains `;`, binary for two classes, else multiclass.
        image_size: size of the network's input in pixels, at least 8: the side of a square, or [height, width].
        resize: how validation, test and served images are resized: crop keeps the aspect ratio and takes the centre; squash keeps the
            whole image and changes its aspect ratio.
        crop_ratio: fraction of the shorter side that the centre crop keeps, in (0, 1]; used by resize: crop.
        color_profile: convert transforms images to sRGB by their embedded ICC profile (Display P3, Adobe RGB, CMYK); ignore
            skips that.
        normalize: input normalisation: fixed (the keys mean and std), data (mean and std of the training images), mean_image
            (subtract the mean training image), or pca or zca whitening (small images only).
        mean: mean of the R, G, B channels in 0…1 for normalize: fixed; null uses the values of the pretrained weights, else ImageNet's.
        std: standard deviation of the R, G, B channels, above 0, for normalize: fixed; null as for mean.
        val_fraction: fraction of the images, in (0, 1), drawn as the validation set if the data has no `val` split; from `train` if the
            data has splits.
        test_fraction: fraction of the images, in (0, 1), drawn as the test set if the data has no `test` split; from `train` if the
            data has splits.
        batch_size: images per batch on each rank, at least 1; the size of the whole training set gives one step per epoch.
        repeats: copies of each training image in a batch, each augmented on its own, in 1…batch_size; an epoch keeps its length
            and so visits 1/repeats of the images.
        sampler: shuffle visits each image once per epoch; balanced draws every class equally often and repeats images of small classes.
        memory: whether decoded images stay in memory; auto does so if all images have one size and take at most 1 GiB together.
        workers: number of data loading processes, at least 0; null uses 0 for images in memory, else one per CPU core, at most 8.
        on_bad_file: error stops before training; skip excludes unreadable images, and training images that are also in val or test.
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
    """Augmentation of the training images and texts.

    Args:
        policy: name of a preset, path of a YAML file, a list of ops such as [{HorizontalFlip: {p: 0.5}}], or {exact: true, ops: […]}.
    """

    policy: str | list | dict = "none"


@dataclass
class ModelConfig:
    """The image network.

    Args:
        name: architecture: lenet5, resnet20, fastnet, cnn, mlp, rbf, linear, perceptron, a plugin's network, a torchvision or timm
            name (timm/NAME forces timm), or none for a text-only model.
        weights: initial weights: none (random), default (the library's pretrained weights), a file, a folder that holds one, or a URL.
        mode: trained layers: fine-tune (all), feature-extract (only the head), gradual (unfreezes from the head down) or
            linear-then-fine-tune (the head first, then all).
        unfreeze_epochs: epochs until gradual and linear-then-fine-tune train all layers, at least 1.
        frozen_norms: freeze the running statistics of batch normalisation; null freezes them for loaded weights, except a bundle's.
        head: last layer: linear, mlp (one hidden layer) or cosine (cosine similarity to a vector per class).
        init: initialisation of linear and convolutional layers, such as he_normal; default keeps the architecture's own. With
            loaded weights it applies only to the head.
        args: further keyword arguments of the architecture.
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
    """The text network, combined with the image network, or used alone if model.name is none.

    Args:
        name: none, hashing (hashed n-grams, no download), or a Hugging Face transformer by folder or hub name.
        weights: weights of a transformer: default (pretrained) or none (random).
        max_length: longest text that is read, in 1…4096: words for hashing, else tokens; the rest of a text is cut.
        pooling: pooling of a transformer's token states: mean, cls (first token), last, or auto: last for decoders, else mean.
        fusion: how image and text features are combined: concat, gated or film.
        width: number of features after the fusion, at least 1.
        drop_image: probability, in [0, 1], that a training sample is shown without its image, so that the model also works on texts alone.
        drop_text: probability, in [0, 1], that a training sample is shown without its text; the sum with drop_image is at most 1.
        args: arguments of hashing: buckets, width, dropout.
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
    """The optimiser and the learning rate schedule.

    Args:
        name: optimiser: sgd, adagrad, adadelta, rmsprop, adam, adamw, lion or muon.
        lr: peak learning rate, above 0; null chooses it by the optimiser, model.mode and model.weights.
        head_lr: factor on the learning rate for the head, above 0; null uses 10 for the new head of loaded weights, else 1.
        weight_decay: weight decay, at least 0, decoupled for adamw, lion and muon; norms and biases are never decayed.
        momentum: momentum of sgd, rmsprop and muon, in [0, 1).
        nesterov: use Nesterov momentum; applies to sgd.
        schedule: learning rate schedule by step: constant, linear, cosine, step, inverse_sqrt or one_cycle.
        warmup: fraction of all steps, in [0, 1], in which the learning rate rises linearly to its peak.
        lr_end: lowest learning rate after the warm-up, as a fraction of the peak, in [0, 1].
        norm_lr: factor on the learning rate for the parameters of normalisation layers, above 0.
        layer_decay: factor on the learning rate for each block further from the head, in (0, 1].
        sam: radius of sharpness-aware minimisation, such as 0.05; 0 disables it. It takes two forward and backward passes per step.
        clip_norm: upper bound of the gradient's norm, above 0; null does not clip.
        clip_value: upper bound of each gradient element's absolute value, above 0; null does not clip.
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
    """The training loss.

    Args:
        name: auto (bce for multilabel, else cross_entropy), cross_entropy, bce, focal, mse, perceptron, or a plugin's loss.
        label_smoothing: amount of label smoothing, in [0, 1).
        gamma: focusing parameter of the focal loss, at least 0.
        class_weights: balanced weights each class by the inverse of its number of training images; none weights all classes equally.
        consistency: weight, at least 0, of the divergence between the predictions for three views of each image (12 in the
            AugMix paper); the policy must contain AugMix.
        penalty: weight of the elastic net on the weights, at least 0.
        l1_ratio: part of L1 in the elastic net, in [0, 1]: 1 is L1, 0 is L2.
        teacher: bundle to distil from, with the same labels and image size, and the same tokens if it reads texts; null disables it.
        distill: weight of the distillation loss against the loss on the labels, in [0, 1].
        temperature: softmax temperature of teacher and student in the distillation loss, above 0.
    """

    name: LossName | str = "auto"
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
        max_epochs: number of passes over the training images, at least 1.
        seed: random seed, in [0, 2**32), for the splits, the weights, the order of the samples and every augmentation.
        device: auto uses a GPU if PyTorch finds one, else the CPU.
        devices: number of ranks, at least 1, each on its own device with batches of data.batch_size; under
            torchrun, its number of processes is used instead.
        precision: auto uses bf16 or fp16 if the device computes faster in it, else fp32.
        accumulate: batches whose gradients are accumulated for one optimiser step, at least 1.
        ema: decay of the moving average of the weights, such as 0.999, in [0, 1); the average is measured and saved; 0 disables it.
        swa_start: fraction of the epochs, in [0, 1), after which stochastic weight averaging starts, such as 0.75; null disables it.
        patience: epochs without a better validation metric after which training stops, at least 1; null never stops early.
        checkpoint_seconds: seconds between checkpoints, at least 0, also within an epoch; an interrupted run resumes from the newest.
        compile: compile the network with torch.compile; faster on a GPU and in long runs.
        gradient_checkpointing: store only the inputs of each block and recompute the rest in the backward pass: less memory, a
            third more time.
        start_size: image side in the first epoch as a fraction of data.image_size, in [0.25, 1]; it rises to 1 at three quarters
            of the epochs.
        tta: further test metrics named tta_… with test-time augmentation: flip averages the predictions for the image and its
            horizontal flip; flip-shift also averages shifts by one pixel.
        runs_dir: folder that contains all runs.
        run_name: name of the run's folder in runs_dir; null builds it from the config's name and the time.
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
    """The evaluation on the test set at the end of training.

    Args:
        precision: target precision of accepted predictions, in (0, 1]; below the resulting confidence the model abstains.
        threshold: threshold of each multi-label label, chosen on the validation set: f1 (best F1), precision or recall
            (reaches threshold_target with the best value of the other), or fixed (0.5).
        threshold_target: target of threshold: precision or recall for each label, in (0, 1].
        robustness: error under image corruptions: auto (at most a third of the training time), none, quick (50 images,
            3 severities) or full (all images, 5 severities).
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
    """MLflow tracking and model registry.

    Args:
        enabled: false trains without MLflow.
        uri: tracking URI; null uses the variable MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder.
        experiment: name of the experiment, 1 to 250 printable characters.
        model_name: registered model that receives the bundle as a new version, without / : @ and backslash; null registers nothing.
        alias: alias of the model's first version; with challenger, `refract promote` sets the champion. Later versions always
            become challenger.
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
