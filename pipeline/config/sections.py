"""The sections of the config: keys, types, defaults, meanings and the ranges of values.

The class docstrings are the text of `refract train --help`: one entry `key: meaning` for each field. The sections `optim` and `loss` are in
`refract.models.training.specs`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from refract.models.credentials import masked
from refract.models.fields import Checked, number
from refract.models.modalities import HASHING, NO_IMAGES, NO_TEXTS
from refract.remote.address import has_credentials, is_object_store, is_remote

LONGEST_TEXT = 4096
"""Upper bound of text.max_length, in words or tokens. A server keeps this many integers in memory for each queued sample."""

Rules = Iterator[tuple[str, object, bool, str]]
"""(key, value, whether the value is valid, description of the valid values), for each key whose field cannot declare them."""


Normalize = Literal["fixed", "data", "mean_image", "pca", "zca"]


@dataclass(frozen=True)
class DataConfig(Checked):
    """The data set, and how its images reach the network.

    Args:
        source: data set: a folder or archive (CLASS/… or train|val|test/CLASS/…), a CSV, TSV or Parquet manifest with the columns
            path,label and/or text[,split], a table with images, a WebDataset, the URL of one of these (docs/sources.md), or
            `digits` (embedded).
        task: kind of classification; auto chooses multilabel if a label contains `;`, binary for two classes, else multiclass.
        image_size: size of the network's input in pixels, at least 8: the side of a square, or [height, width].
        resize: how validation, test and served images are resized: crop keeps the aspect ratio and takes the centre; squash keeps the
            whole image and changes its aspect ratio.
        crop_ratio: fraction of the shorter side that the centre crop keeps; used by resize: crop.
        color_profile: convert transforms images to sRGB by their embedded ICC profile (Display P3, Adobe RGB, CMYK); ignore
            skips that.
        interpolation: what resizes images: refract, or the library of an existing client, pillow (also for torchvision's transforms of
            Pillow's images) or torchvision (of tensors); docs/preprocessing.md.
        normalize: input normalisation: fixed (the keys mean and std), data (mean and std of the training images), mean_image
            (subtract the mean training image), or pca or zca whitening (small images only).
        mean: mean of the R, G, B channels in 0…1 for normalize: fixed; null uses the values of the pretrained weights, else ImageNet's.
        std: standard deviation of the R, G, B channels, above 0, for normalize: fixed; null as for mean.
        val_fraction: fraction of the images drawn as the validation set if the data has no `val` split; from `train` if the
            data has splits.
        test_fraction: fraction of the images drawn as the test set if the data has no `test` split; from `train` if the
            data has splits.
        batch_size: images per batch on each rank; the size of the whole training set gives one step per epoch.
        repeats: copies of each training image in a batch, each augmented on its own, in 1…batch_size; an epoch keeps its length
            and so visits 1/repeats of the images.
        sampler: shuffle visits each image once per epoch; balanced draws every class equally often and repeats images of small classes.
        memory: whether decoded images stay in memory; auto does so if all images have one size and take at most 1 GiB together.
        decode_on: where training images that do not stay in memory are decoded and augmented: workers (loader processes), device (the
            GPU, by nvJPEG and the batch executor), or auto, which takes workers, or the faster one for a training on one GPU that
            reads a million images (docs/gpu.md).
        workers: number of data loading processes; null uses 0 for images in memory, else one per CPU core, at most 8.
        on_bad_file: error stops before training; skip excludes unreadable images, and training images that are also in val or test.
        features: folder of the feature store, in which model.mode: probe, knn and prototype keep embeddings.
        labels: label history, whose decisions correct labels, add and exclude images (docs/labels.md): a SQLite file such as labels.db,
            or postgresql://USER@HOST/DATABASE; labels.db@57 applies the decisions up to number 57; null applies none.
        hierarchy: class hierarchy (docs/hierarchy.md), for one label per image: a CSV, TSV or Parquet table with the columns label and
            parent, which is empty for a root; a prediction backs off to a parent where no class is certain enough; null has none.
    """

    source: str = "digits"
    task: Literal["auto", "binary", "multiclass", "multilabel"] = "auto"
    image_size: int | tuple[int, int] = 32
    resize: Literal["crop", "squash"] = "crop"
    crop_ratio: float = number(0.875, gt=0, le=1)
    color_profile: Literal["convert", "ignore"] = "convert"
    interpolation: Literal["refract", "pillow", "torchvision"] = "refract"
    normalize: Normalize = "fixed"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    val_fraction: float = number(0.1, gt=0, lt=1)
    test_fraction: float = number(0.2, gt=0, lt=1)
    batch_size: int = number(64, ge=1)
    repeats: int = 1
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    memory: Literal["auto", "never", "always"] = "auto"
    decode_on: Literal["auto", "workers", "device"] = "auto"
    workers: int | None = number(None, ge=0)
    on_bad_file: Literal["error", "skip"] = "error"
    features: str = "features"
    labels: str | None = None
    hierarchy: str | None = None

    def sides(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def rules(self) -> Rules:
        clean = not (is_remote(self.source) and has_credentials(self.source))
        yield "data.source", masked(self.source), clean, "a URL without credentials, which runs would store"
        yield "data.image_size", self.image_size, min(self.sides()) >= 8, "at least 8 pixels"
        yield "data.repeats", self.repeats, 1 <= self.repeats <= self.batch_size, "in 1…data.batch_size"
        secret = self.labels is not None and "://" in self.labels and _has_password(self.labels)
        where = "an address without a password, which runs would store; set PGPASSWORD or write ~/.pgpass"
        yield "data.labels", masked(self.labels or ""), not secret, where
        yield "data.std", self.std, self.std is None or min(self.std) > 0, "positive"


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images and texts.

    Args:
        policy: name of a preset, path of a YAML file, a list of ops such as [{HorizontalFlip: {p: 0.5}}], or {exact: true, ops: […]}.
    """

    policy: str | list | dict = "none"


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The image network.

    Args:
        name: architecture: lenet5, resnet20, fastnet, cnn, mlp, rbf, linear, perceptron, a plugin's network, a torchvision or timm
            name (timm/NAME forces timm), or none for a text-only model.
        weights: initial weights: none (random), default (pretrained: those of the extra `pretrained` if it has the network, else the
            download of torchvision or timm), a file, a folder that holds one, the URL of a file, hf://OWNER/NAME of the Hugging Face Hub,
            or a model: the folder of a bundle or a run, the URL of a bundle, models:/NAME@ALIAS, models:/NAME/VERSION, or runs:/RUN_ID of
            MLflow.
        mode: trained layers: fine-tune (all), feature-extract (only the head), gradual (unfreezes from the head down),
            linear-then-fine-tune (the head first, then all), lora (the head and low-rank adapters of a transformer's attention); or a
            head fitted on stored embeddings: probe (logistic regression), knn or prototype (class means; for one to five images per class).
        unfreeze_epochs: epochs until gradual and linear-then-fine-tune train all layers. 0 with linear-then-fine-tune fits the head as
            probe does, then trains all; null is 0 where that is possible, else 1.
        lora_rank: rank of the adapters of mode: lora.
        lora_alpha: scale of these adapters; their output is multiplied by lora_alpha / lora_rank.
        frozen_norms: freeze the running statistics of batch normalisation; null freezes them for loaded weights, except a bundle's.
        head: last layer: linear, mlp (one hidden layer) or cosine (cosine similarity to a vector per class).
        init: initialisation of linear and convolutional layers, such as he_normal; default keeps the architecture's own. With
            loaded weights it applies only to the head.
        args: further keyword arguments of the architecture.
    """

    name: str = "resnet20"
    weights: str = "none"
    mode: Literal[
        "fine-tune", "feature-extract", "gradual", "linear-then-fine-tune", "lora", "probe", "knn", "prototype"
    ] = "fine-tune"
    unfreeze_epochs: int | None = number(None, ge=0)
    lora_rank: int = number(8, ge=1, le=256)
    lora_alpha: int = number(16, ge=1, le=1024)
    frozen_norms: bool | None = None
    head: Literal["linear", "mlp", "cosine"] = "linear"
    init: str = "default"
    args: dict = field(default_factory=dict)

    @property
    def reads_images(self) -> bool:
        """Whether there is an image network."""
        return self.name != NO_IMAGES

    @property
    def on_embeddings(self) -> bool:
        """Whether the head is fitted on embeddings, without epochs."""
        return self.mode in EMBEDDING_HEADS

    @property
    def starts_from_probe(self) -> bool:
        """Whether a head that is fitted on embeddings replaces the epochs of the head alone."""
        return self.mode == "linear-then-fine-tune" and self.unfreeze_epochs == 0

    @property
    def head_name(self) -> str:
        """The head of the network, which some modes determine."""
        return EMBEDDING_HEADS.get(self.mode, self.head)

    def record(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """Return a bundle's record of the network: name, image_size as [height, width], and arguments, enough to build it again."""
        head = {} if self.head_name == "linear" else {"head": self.head_name}
        return {"name": self.name, "image_size": list(image_size), "args": self.args | head}


EMBEDDING_HEADS: Mapping[str, str] = MappingProxyType({"probe": "linear", "knn": "knn", "prototype": "cosine"})
"""Modes that fit the head on embeddings → the head, see `refract.models.head.HEADS`."""


@dataclass(frozen=True)
class TextConfig(Checked):
    """The text network, combined with the image network, or used alone if model.name is none.

    Args:
        name: none, hashing (hashed n-grams, no download), or a Hugging Face transformer by folder or hub name.
        weights: weights of a transformer: default (pretrained) or none (random).
        max_length: longest text that is read: words for hashing, else tokens; the rest of a text is cut.
        pooling: pooling of a transformer's token states: mean, cls (first token), last, or auto: last for decoders, else mean.
        fusion: how image and text features are combined: concat, gated or film.
        width: number of features after the fusion.
        drop_image: probability that a training sample is shown without its image, so that the model also works on texts alone.
        drop_text: probability that a training sample is shown without its text; the sum with drop_image is at most 1.
        args: arguments of hashing: buckets, width, dropout.
    """

    name: str = "none"
    weights: Literal["default", "none"] = "default"
    max_length: int = number(64, ge=1, le=LONGEST_TEXT)
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    fusion: Literal["concat", "gated", "film"] = "concat"
    width: int = number(256, ge=1)
    drop_image: float = number(0.15, ge=0, le=1)
    drop_text: float = number(0.15, ge=0, le=1)
    args: dict = field(default_factory=dict)

    @property
    def reads_texts(self) -> bool:
        """Whether there is a text network."""
        return self.name != NO_TEXTS

    @property
    def loads_weights(self) -> bool:
        """Whether the text network starts from pretrained weights."""
        return self.reads_texts and self.name != HASHING and self.weights != "none"


@dataclass(frozen=True)
class TrainerConfig(Checked):
    """The training loop.

    Args:
        max_epochs: number of passes over the training images.
        folds: number of folds; 2 to 20 trains one model for each fold of the training and validation samples, which is its validation
            set; 0 trains one model.
        fold: trains only this fold, in 1…folds; null trains all.
        seed: random seed for the splits, the weights, the order of the samples and every augmentation.
        device: auto uses a GPU if PyTorch finds one, else the CPU.
        devices: number of ranks, each on its own device with batches of data.batch_size; under
            torchrun, its number of processes is used instead.
        strategy: what several ranks share: ddp (each has the whole model) or fsdp (each has a part of the weights, gradients and
            optimizer state).
        precision: auto uses bf16 or fp16 if the device computes faster in it, else fp32.
        accumulate: batches whose gradients are accumulated for one optimiser step.
        ema: decay of the moving average of the weights, such as 0.999; the average is measured and saved; 0 disables it.
        swa_start: fraction of the epochs after which stochastic weight averaging starts, such as 0.75; null disables it.
        patience: epochs without a better validation metric after which training stops; null never stops early.
        checkpoint_seconds: seconds between checkpoints, also within an epoch; an interrupted run resumes from the newest.
        compile: compile the network with torch.compile; faster on a GPU and in long runs.
        gradient_checkpointing: store only the inputs of each block and recompute the rest in the backward pass: less memory, a
            third more time.
        quantization_aware: round weights and activations as 8-bit integers do while training, so that the model loses less by
            refract export --int8 (docs/export.md).
        start_size: image side in the first epoch as a fraction of data.image_size; it rises to 1 at three quarters
            of the epochs.
        tta: further test metrics named tta_… with test-time augmentation: flip averages the predictions for the image and its
            horizontal flip; flip-shift also averages shifts by one pixel.
        runs_dir: folder that contains all runs.
        run_name: name of the run's folder in runs_dir; null builds it from the config's name and the time.
        copy_to: URL of a folder for copies of runs, such as s3://BUCKET/runs, from which another machine resumes them; null copies none.
    """

    max_epochs: int = number(10, ge=1)
    folds: int = 0
    fold: int | None = None
    seed: int = number(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = number(1, ge=1)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulate: int = number(1, ge=1)
    ema: float = number(0.0, ge=0, lt=1)
    swa_start: float | None = number(None, ge=0, lt=1)
    patience: int | None = number(None, ge=1)
    checkpoint_seconds: float = number(120.0, ge=0, finite=False)
    compile: bool = False
    gradient_checkpointing: bool = False
    quantization_aware: bool = False
    start_size: float = number(1.0, ge=0.25, le=1)
    tta: Literal["none", "flip", "flip-shift"] = "none"
    runs_dir: str = "runs"
    run_name: str | None = None
    copy_to: str | None = None

    def rules(self) -> Rules:
        name = self.run_name
        local = "://" not in self.runs_dir
        yield (
            "trainer.runs_dir",
            masked(self.runs_dir),
            local,
            "a local folder; set trainer.copy_to to copy runs to a URL",
        )
        stores = self.copy_to is None or is_object_store(self.copy_to)
        yield (
            "trainer.copy_to",
            masked(self.copy_to or ""),
            stores,
            "a folder's URL at s3://, gs:// or az:// without credentials, or null",
        )
        yield "trainer.run_name", name, name is None or _is_name(name), "a plain folder name"
        yield "trainer.folds", self.folds, self.folds == 0 or 2 <= self.folds <= 20, "0, or in 2…20"
        within = self.fold is None or 1 <= self.fold <= self.folds
        yield "trainer.fold", self.fold, within, f"null, or in 1…trainer.folds (trainer.folds: {self.folds})"


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """The evaluation on the test set at the end of training.

    Args:
        precision: target precision of accepted predictions; below the resulting confidence the model abstains, and may name a parent
            of data.hierarchy.
        threshold: threshold of each multi-label label, chosen on the validation set: f1 (best F1), precision or recall
            (reaches threshold_target with the best value of the other), or fixed (0.5).
        threshold_target: target of threshold: precision or recall for each label.
        robustness: error under image corruptions: auto (at most a third of the training time), none, quick (50 images,
            3 severities) or full (all images, 5 severities).
        images: false keeps images of the data out of the report, of MLflow's galleries and of the bundle's training features; the
            bundle's golden samples stay.
    """

    precision: float = number(0.95, gt=0, le=1)
    threshold: Literal["f1", "precision", "recall", "fixed"] = "f1"
    threshold_target: float = number(0.9, gt=0, le=1)
    robustness: Literal["auto", "none", "quick", "full"] = "auto"
    images: bool = True


@dataclass(frozen=True)
class TrackingConfig(Checked):
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


def _has_password(address: str) -> bool:
    """Return whether a database's address has a password, before the host or as a parameter."""
    try:
        parts = urlsplit(address)
    except ValueError:  # a host in brackets that is not an address; the label history rejects it
        return False
    return parts.password is not None or "password" in parse_qs(parts.query)
