"""Train on embeddings: fit the head of the network, whose other layers stay as they are loaded."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from refract.models.classifier import Classifier
from refract.models.head import called_head, head_inputs
from refract.pipeline.config.config import ConfigError
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.features.embed import Options, Stored, embed, source_name
from refract.pipeline.features.heads import Part, fit_head
from refract.pipeline.features.model import EmbeddingModel, embedding_model, values_of
from refract.pipeline.features.out_of_fold import OutOfFold, predict_out_of_fold
from refract.pipeline.features.store import FeatureStore, Key
from refract.pipeline.stopping import stop_requests

if TYPE_CHECKING:
    from refract.pipeline.tracking.tracker import Tracker
    from refract.pipeline.training.fit import Assembly

log = logging.getLogger(__name__)

CHECKED = 4
"""Images on which the network with its new head is compared with the head alone."""


@dataclass(frozen=True)
class EmbeddedFit:
    """A head that was fitted on embeddings.

    history: its metrics, as those of one epoch; mode: `model.mode`; balanced: whether the classes are weighted; choice: its setting, see
    `refract.pipeline.features.heads`; samples: the training and validation samples; keys: of their embeddings in `store`; device: the
    device of the training; model: with the fitted head.
    """

    history: list[dict[str, float]]
    mode: str
    balanced: bool
    choice: str
    samples: list[Sample]
    keys: list[Key]
    store: FeatureStore
    device: str
    model: EmbeddingModel

    @property
    def stored(self) -> Stored:
        """The source of embeddings for the bundle's profile and training features."""
        return Stored(self.model, self.store, "cuda" if self.device == "cuda" else "cpu")


def fit_on_embeddings(assembly: "Assembly", run_dir: Path, tracker: "Tracker | None") -> EmbeddedFit:
    """Fit the head by `model.mode`, and track its metrics as those of one epoch. Arguments and errors: see `fitted_head`."""
    fit = fitted_head(assembly, assembly.config.model.mode, run_dir)
    if tracker is not None:
        tracker.log_metrics(fit.history[0], step=1)
    return fit


def fitted_head(assembly: "Assembly", mode: str, run_dir: Path) -> EmbeddedFit:
    """Embed the training and validation samples, fit the head and install it.

    mode: `probe`, `knn` or `prototype`; run_dir: where the training writes its bundle.
    Embeddings come from the store `data.features` where it has them. The classifier is in eval mode afterwards. Raises DataError for an
    image that cannot be embedded, ConfigError for a network whose head cannot be set, and Stopped after SIGTERM or Ctrl-C.
    """
    config, manifest, module = assembly.config, assembly.manifest, assembly.module
    classifier = module.classifier.to(assembly.device).eval()
    started = time.perf_counter()
    preprocess = assembly.data.preprocess
    values = values_of(config.model, assembly.weights, preprocess, run_dir)
    model = embedding_model(classifier, preprocess, assembly.network_record, assembly.text, values)
    store = FeatureStore(Path(config.data.features), model.key, model.record)
    samples = [*manifest.of("train"), *manifest.of("val")]
    needed = len(samples)
    samples += manifest.of("test")  # which the list of the source in the store keeps
    names = [tuple(manifest.labels[i] for i in sample.labels) for sample in samples]
    with stop_requests("after this shard; finished embeddings are kept") as stop:
        options = Options(device="cuda" if assembly.device == "cuda" else "cpu")
        embedded = embed(model, samples, names, store, source_name(manifest.source), options, stop, first=needed)
    if embedded.failed:
        path, reason = next(iter(embedded.failed.items()))
        raise DataError(
            f"{path}: {reason} ({len(embedded.failed)} such images); remove them, or set data.on_bad_file: skip"
        )
    log.info("%s embeddings computed, %s from %s", f"{embedded.computed:,}", f"{embedded.reused:,}", store.folder)
    samples, keys = samples[:needed], [key for key in embedded.keys[:needed] if key is not None]
    count = len(manifest.of("train"))
    parts = slice(count), slice(count, needed)
    balanced = config.loss.class_weights == "balanced"
    train, val = (_part(store, keys[rows], manifest, samples[rows]) for rows in parts)
    try:
        fitted = fit_head(
            mode, train, val, multilabel=manifest.task == "multilabel", balanced=balanced,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from error
    install_head(classifier.network, fitted.head.to(assembly.device), config.model.name)
    _check(classifier, fitted.head, assembly, samples[:CHECKED])
    metrics = _named(fitted.metrics, module.monitor) | {"epoch_seconds": time.perf_counter() - started}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "epoch_seconds")
    log.info("%s, %s: %s  %.1f s", mode, fitted.choice, shown, metrics["epoch_seconds"])
    return EmbeddedFit([metrics], mode, balanced, fitted.choice, samples, keys, store, assembly.device, model)


def out_of_fold(fit: EmbeddedFit, manifest: Manifest, seed: int) -> OutOfFold:
    """Predict each training and validation sample by a head of the chosen setting that was not fitted on it."""
    log.info("predicting the %s training and validation samples by cross-validation", f"{len(fit.samples):,}")
    return predict_out_of_fold(
        fit.mode, fit.choice, _part(fit.store, fit.keys, manifest, fit.samples), fit.samples,
        [key.content for key in fit.keys], multilabel=manifest.task == "multilabel",
        balanced=fit.balanced, seed=seed,
    )  # fmt: skip


def _part(store: FeatureStore, keys: Sequence[Key], manifest: Manifest, samples: Sequence[Sample]) -> Part:
    targets = np.zeros((len(keys), len(manifest.labels)), bool)
    for row, sample in zip(targets, samples, strict=True):
        row[list(sample.labels)] = True
    return Part(store.vectors(keys) if keys else np.zeros((0, 1), np.float32), targets)


def _named(metrics: dict[str, float], monitor: str) -> dict[str, float]:
    """Return the metrics under the names of the training loop. The monitored score of multi-label is the mean average precision."""
    if monitor == "val_accuracy":
        return metrics
    losses = {name: value for name, value in metrics.items() if name.endswith("_loss")}
    return losses | {monitor: metrics["val_average_precision"]}


def install_head(network: nn.Module, head: nn.Module, name: str) -> None:
    """Give the network the fitted head, in place. name: the name of the network. ConfigError if its last layer is of another kind."""
    old = called_head(network)
    if isinstance(old, nn.Conv2d) and isinstance(head, nn.Linear) and _is_linear(old):
        with torch.no_grad():
            old.weight.copy_(head.weight[:, :, None, None])
            old.get_parameter("bias").copy_(head.bias)
    elif type(old) is type(head) and {*old.state_dict()} == {*head.state_dict()}:
        place = next(path for path, module in network.named_modules() if module is old)
        parent, _, child = place.rpartition(".")
        setattr(network.get_submodule(parent), child, head)
    else:
        raise ConfigError(
            f"model.mode: the last layer of {name} is a {type(old).__name__} that cannot be fitted on embeddings; "
            "set model.mode: feature-extract"
        )


def _is_linear(layer: nn.Module) -> bool:
    """Whether the layer is a linear function of its features, with a bias, as the fitted head is."""
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    return (pointwise or type(layer) is nn.Linear) and {*layer.state_dict()} == {"weight", "bias"}


def _check(classifier: Classifier, head: nn.Module, assembly: "Assembly", samples: Sequence[Sample]) -> None:
    """Raise ConfigError if the network does more after its head, so that the fitted head would predict something else."""
    pixels = np.stack([assembly.data.preprocess(sample.read()) for sample in samples])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(assembly.device)
    with torch.inference_mode(), head_inputs(classifier.network) as features:
        logits = classifier(images).float().cpu()
        expected = head(features[0].to(assembly.device)).float().cpu()
    if not _agree(logits, expected):
        raise ConfigError(
            f"model.mode: {assembly.config.model.name} computes more after its last layer, so its head cannot be fitted on embeddings; "
            "set model.mode: feature-extract"
        )


def _agree(logits: Tensor, expected: Tensor) -> bool:
    same = logits.shape == expected.shape
    return same and torch.allclose(logits, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def why_not_fitted(classifier: Classifier, size: tuple[int, int]) -> str | None:
    """Return why a linear layer that is fitted on embeddings cannot be the head, as the end of a sentence on the network, None if it can.

    classifier: for images alone, on the CPU; it is left as it was. size: the size of the images. A new head has zeros, so the check gives
    it random weights: they show what follows the head.
    """
    head, training = called_head(classifier.network), classifier.training
    if not _is_linear(head):
        return f"has a {type(head).__name__} as its last layer, not a linear layer with a bias"
    before = [parameter.detach().clone() for parameter in head.parameters()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in head.parameters():
            parameter.normal_()
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        with head_inputs(classifier.network) as features:
            logits = classifier.eval()(images).float()
        weight = head.get_parameter("weight").flatten(1)
        fits = features[0].shape[1] == weight.shape[1]
        fits = fits and _agree(logits, torch.nn.functional.linear(features[0], weight, head.get_parameter("bias")))
        for parameter, value in zip(head.parameters(), before, strict=True):
            parameter.copy_(value)
    classifier.train(training)
    return None if fits else "computes more after its last layer"
