"""The preprocessing of validation, evaluation and serving: of the config, of loaded weights, or measured on the training images."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from refract.errors import first_line
from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.sections import DataConfig, ModelConfig, Normalize

if TYPE_CHECKING:
    from refract.augment import Preprocess
    from refract.pipeline.data.manifest import Manifest

log = logging.getLogger(__name__)


def make_preprocess(data: DataConfig, model: ModelConfig) -> "Preprocess":
    """Build the preprocessing of validation, evaluation and serving.

    Mean and std come from `data`, else from the pretrained weights, else from ImageNet.
    """
    from refract.augment.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

    recorded = _weights_preprocess(model) if model.reads_images else {}
    if recorded and data.normalize == "fixed" and not (data.mean and data.std):
        kind = recorded.get("normalize", "mean and standard deviation")
        log.info("images are normalised by the %s recorded with the weights", kind)
    height, width = data.sides()
    return Preprocess(
        height,
        width,
        resize=data.resize,
        crop_ratio=data.crop_ratio,
        mean=data.mean or tuple(recorded.get("mean", IMAGENET_MEAN)),
        std=data.std or tuple(recorded.get("std", IMAGENET_STD)),
        normalize="channel" if data.mean else recorded.get("normalize", "channel"),
        color_profile=data.color_profile,
        interpolation=data.interpolation,
    )


def with_normalisation(
    preprocess: "Preprocess", manifest: "Manifest", normalize: Normalize, weights: str
) -> tuple["Preprocess", dict[str, Any]]:
    """Return (preprocess with the normalisation of `data.normalize`, the normalisation arrays of the classifier's first layer).

    For `fixed` the arrays are those of `weights`, the bundle that training starts from. Otherwise one pass measures them on the
    training images, preprocessed without augmentation. Raises ConfigError where images are too large for whitening.
    """
    import torch

    from refract.augment.statistics import measure
    from refract.models.pretrained.weights import folder_arrays
    from refract.pipeline.data.datasets import ImageDataset, targets_of

    if normalize == "fixed":
        if preprocess.normalize == "channel":
            return preprocess, {}
        try:
            return preprocess, folder_arrays(weights, preprocess.normalize)
        except (ValueError, OSError) as error:
            raise ConfigError(f"model: {first_line(error)}") from error
    samples = [sample for sample in manifest.of("train") if sample.has_image]
    images = ImageDataset(samples, preprocess, targets_of(samples, manifest))
    kind = "channel" if normalize == "data" else normalize
    try:
        statistics = measure((images.pixels(i) for i in range(len(images))), kind)
    except ValueError as error:
        raise ConfigError(f"data.normalize: {error}") from error
    arrays = {"mean_image": statistics.mean_image, "whitening": statistics.whitening}
    mean, std = _three(statistics.mean), _three(statistics.std)
    log.info("measured on %d training images: mean %s, std %s", len(samples), mean, std)
    return (
        dataclasses.replace(preprocess, mean=mean, std=std, normalize=kind),
        {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None},
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 6) for value in values)
    return red, green, blue


def _weights_preprocess(model: ModelConfig) -> Mapping[str, Any]:
    """Return the preprocessing that is recorded with the weights, empty if there is none."""
    from refract.models.registry import weights_preprocess

    try:
        return weights_preprocess(model.name, model.weights) or {}
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from error
