"""Calibrate an export in 8-bit integers, and measure what it costs in accuracy."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refract.augment import ImageError, Preprocess
from refract.models.bundle.bundle import Bundle, BundleInfo
from refract.models.conversion.int8 import MOST_THUMBNAILS, calibration_images
from refract.models.prediction import predicted_labels
from refract.pipeline.data.manifest import DataError, Sample, load_manifest
from refract.pipeline.data.new_data import read_data
from refract.pipeline.data.prepare import split_as_trained
from refract.pipeline.evaluation.evaluate import truth_of
from refract.pipeline.evaluation.test_data import labelled_data, samples_of
from refract.pipeline.export.target import ExportError, Run
from refract.progress import tracked

MOST_CALIBRATION = 256
"""Images of `--calibrate` that are used, evenly spread: the ranges of activations change little with more."""

BATCH = 16

FEW_SAMPLES = 1000
"""Of fewer samples, a single one counts visibly in percentage points."""

TRAIN_FOR_8_BITS = (
    "fine-tune the model for 8 bits: refract train CONFIG --model.weights BUNDLE --trainer.quantization_aware true"
)
"""The remedy for a network that 8-bit integers change too much."""


@dataclass(frozen=True)
class Int8:
    """The options of `--int8`.

    calibrate, data: sources of images, None without; max_loss: in percentage points; samples: the training samples of `calibrate`, if the
    caller has read them.
    """

    calibrate: str | None
    data: str | None
    max_loss: float
    samples: Sequence[Sample] = ()


@dataclass(frozen=True)
class Accuracy:
    """before, after: accuracies in 0…1 of the bundle and of the export; samples: their number; of: what was measured, for people."""

    before: float
    after: float
    samples: int
    of: str

    @property
    def loss(self) -> float:
        """The loss in percentage points, negative for a gain."""
        return 100 * (self.before - self.after)


def calibration(
    bundle: Bundle, preprocess: Preprocess, golden_images: np.ndarray, source: str | None, samples: Sequence[Sample]
) -> tuple[np.ndarray, str]:
    """Return the images for the ranges of activations, uint8 N×H×W×3, and what they are.

    source, samples: `--calibrate` and its `calibration_samples`; without them, the bundle's thumbnails of training images, and the golden
    images with their variants. DataError for an unreadable image.
    """
    if source is None:
        training = bundle.training_features()
        images = calibration_images(golden_images, training, replace(preprocess, resize="squash"))
        thumbnails = 0 if training is None else sum(map(bool, training.thumbnails))
        of = "golden samples" + (f" and {min(thumbnails, MOST_THUMBNAILS)} training thumbnails" if thumbnails else "")
        return images, of
    return np.stack([prepared(preprocess, sample) for sample in samples]), f"{len(samples)} images of {source}"


def calibration_samples(options: Int8, info: BundleInfo) -> Sequence[Sample]:
    """Return up to MOST_CALIBRATION samples of the split train, of all if the data have no splits; none without `--calibrate`.

    DataError for a source that cannot be read, without images, or with splits but without a split train.
    """
    if options.calibrate is None:
        return ()
    samples = options.samples or _training_samples(options.calibrate, info)
    samples = [sample for sample in samples if sample.has_image]
    if not samples:
        raise DataError(f"{options.calibrate}: has no images; --calibrate needs training images")
    return samples[:: max(1, -(-len(samples) // MOST_CALIBRATION))]


def _training_samples(source: str, info: BundleInfo) -> Sequence[Sample]:
    try:
        manifest = load_manifest(source, to_train=False)
    except DataError:
        if source != "digits" and not Path(source).exists():
            raise
        return read_data(source, (), multilabel=False, unlabelled=True).samples
    if (
        "test" not in manifest.splits()
    ):  # as `labelled_data`: the training drew a test split, perhaps from the split train
        manifest = split_as_trained(info, manifest, "calibrating on its training split")
    if (splits := manifest.splits()) and "train" not in splits:
        raise DataError(
            f"{source}: has images of the split {', '.join(splits)}, and none of the split train, which --calibrate needs"
        )
    return manifest.of("train") or manifest.samples


def measured_samples(source: str | None, info: BundleInfo, calibrated: Sequence[Sample]) -> tuple[list[Sample], str]:
    """Return the labelled samples of `--data` and what they measure; no samples without a source.

    calibrated: samples of the calibration. DataError as `labelled_data`, for a text without an image, and for calibrated samples.
    """
    if source is None:
        return [], "agreement on the golden samples"
    samples, split = samples_of(labelled_data(source, info)[0], info.labels)
    if texts := sum(not sample.has_image for sample in samples):
        raise DataError(f"{source}: {texts:,} rows have a text and no image; --data needs images")
    if shared := len({_place(sample) for sample in samples} & {_place(sample) for sample in calibrated}):
        raise DataError(
            f"{source}: --calibrate uses {shared:,} of these images, so they cannot measure the accuracy; name other images, or "
            "data with the splits train and test"
        )
    return samples, f"accuracy on {source} ({split or 'all'})"


def _place(sample: Sample) -> str:
    return sample.path if sample.data is not None else os.path.realpath(sample.path)


def accuracy(
    bundle: Bundle,
    preprocess: Preprocess,
    golden_images: np.ndarray,
    before: Run,
    after: Run,
    samples: list[Sample],
    of: str,
) -> Accuracy:
    """Measure the bundle's network (`before`) and the export (`after`).

    samples, of: the result of `measured_samples`, on which the accuracy is measured, for multi-label over all labels of all images. Without
    samples, the agreement with the bundle on the golden samples. DataError for an unreadable image.
    """
    info = bundle.info
    if not samples:
        expected, got = before(golden_images)[0], after(golden_images)[0]
        same = _labels(got, info) == _labels(expected, info)
        return Accuracy(1.0, float(same.mean()), len(golden_images), of)
    rows = [(before(batch)[0], after(batch)[0]) for batch in prepared_batches(preprocess, samples)]
    truth = truth_of(samples, info.task, len(info.labels))
    right = [_labels(np.concatenate(each), info) == truth for each in zip(*rows, strict=True)]
    return Accuracy(float(right[0].mean()), float(right[1].mean()), len(samples), of)


def training_remedy(info: BundleInfo) -> list[str]:
    """Return TRAIN_FOR_8_BITS in a list, or [] for a bundle that was trained so."""
    return [] if info.config.get("trainer", {}).get("quantization_aware") else [TRAIN_FOR_8_BITS]


def check_loss(measured: Accuracy, options: Int8, name: str, info: BundleInfo) -> None:
    """Raise ExportError if the loss exceeds the accepted one. info: of the exported bundle."""
    if measured.loss <= options.max_loss + 1e-9:
        return
    remedies = [] if options.calibrate else ["calibrate on training images by --calibrate SOURCE"]
    remedies += [] if options.data else ["measure on test images by --data SOURCE, as golden samples are few"]
    enough = math.ceil(10 * measured.loss - 1e-6) / 10
    remedies += training_remedy(info)
    remedies += [f"accept more by --max-loss {enough:.1f}", "export without --int8"]
    one = f", of which one is {100 / measured.samples:.2f} points" if measured.samples < FEW_SAMPLES else ""
    raise ExportError(
        f"--int8 for {name} loses {measured.loss:.2f} points: {measured.of} {measured.before:.4f} before, {measured.after:.4f} after, "
        f"{measured.samples:,} samples{one}; at most {options.max_loss:g} are accepted. Nothing was written; {', or '.join(remedies)}"
    )


def _labels(probabilities: np.ndarray, info: BundleInfo) -> np.ndarray:
    """Return the predicted labels in the form of `truth_of`."""
    if info.task == "multilabel":
        return predicted_labels(probabilities, "multilabel", info.thresholds)
    return probabilities.argmax(axis=1)


def prepared_batches(preprocess: Preprocess, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    """Yield the samples as inputs of an export, up to BATCH in each uint8 N×H×W×3. DataError for an unreadable image."""
    starts = range(0, len(samples), BATCH)
    for start in tracked(starts, "measuring 8-bit integers", len(starts), unit="batches"):
        yield np.stack([prepared(preprocess, sample) for sample in samples[start : start + BATCH]])


def prepared(preprocess: Preprocess, sample: Sample) -> np.ndarray:
    """Return a sample as input of an export, uint8 H×W×3. DataError for an unreadable image."""
    try:
        return preprocess(sample.read())
    except (ImageError, OSError) as err:
        raise DataError(f"{sample.path}: cannot be read: {err}") from err
