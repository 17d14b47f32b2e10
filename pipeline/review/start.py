"""Start a review from what the user names: a config, a run or a bundle."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refract.pipeline.config.config import Config, config_from_dict, load_config
from refract.pipeline.config.model_weights import bundle_folder
from refract.pipeline.config.sections import ModelConfig
from refract.pipeline.data.manifest import DataError
from refract.pipeline.labels.address import split_address
from refract.pipeline.stopping import stop_requests

if TYPE_CHECKING:
    from refract.models.bundle.bundle import Bundle
    from refract.pipeline.features.model import EmbeddingModel
    from refract.pipeline.review.session import ReviewSession

log = logging.getLogger(__name__)

LABELS, COLLECTED = "labels.db", "collected"
SNAPSHOT = "snapshot.json"
"""The file next to the data of a retraining run, see `refract.pipeline.retraining.snapshot`."""


@dataclass(frozen=True)
class ReviewOptions:
    """What the user names.

    subject: a config, or the folder of a run or bundle; data: replaces the data of the subject; labels: address of the label history, None
    for `data.labels`, else LABELS next to the data; captured, feedback: folders of a server; unlabelled: a source of new images;
    challenger: folder of another run or bundle; collect: folder for added images, None for COLLECTED next to the label history.
    """

    subject: str
    data: str | None = None
    labels: str | None = None
    captured: Path | None = None
    feedback: Path | None = None
    unlabelled: str | None = None
    challenger: str | None = None
    collect: Path | None = None


def start_review(options: ReviewOptions) -> "tuple[ReviewSession, str]":
    """Open the label history, create it if it is missing, and rank the images. Returns (the session, the history's address).

    DataError or ConfigError for unusable options, Stopped after a stop signal.
    """
    from refract.pipeline.labels.history import LabelHistory
    from refract.pipeline.review.decisions import Decisions
    from refract.pipeline.review.gather import Sources, gather
    from refract.pipeline.review.images import HeatMaps
    from refract.pipeline.review.session import ReviewSession

    config, bundle = _subject(options)
    address, number = split_address(options.labels)
    if number is not None:
        raise DataError(
            f"--labels {options.labels}: a review reads and extends the whole history; name it without @{number}"
        )
    applied = split_address(config.data.labels)[0]
    address = address or applied or _beside(config.data.source, options.subject)
    history = LabelHistory(address, create=True)
    if applied is None:
        log.warning(
            "review: to train with these decisions, set data.labels: %s in the config",
            history.address,  # without a password
        )
    config = config.changed({"data.labels": address})
    splits = bundle.path.parent / "splits.csv" if bundle is not None else None
    sources = Sources(
        options.captured, options.feedback, options.unlabelled, splits if splits and splits.is_file() else None, bundle,
        _bundle(options.challenger, "--challenger") if options.challenger else None,
    )  # fmt: skip
    if bundle is not None and sources.splits is None:
        log.warning("review: %s is not in a run with splits.csv, so its confident errors are not listed", bundle.path)
    with stop_requests("after this shard; finished embeddings are kept") as stop:
        model = _model(config.model, config.data.sides(), bundle, options.subject)
        data = gather(config, model, sources, history, stop)
    reads_images_alone = bundle is not None and bundle.info.text is None
    session = ReviewSession(
        Path(config.data.source).name,
        data,
        Decisions(history),
        heat_maps=HeatMaps(bundle) if bundle is not None and reads_images_alone else None,
        collected=options.collect or _collected(address),
    )
    return session, history.address


def _subject(options: ReviewOptions) -> "tuple[Config, Bundle | None]":
    changes: dict[str, str | None] = {} if options.data is None else {"data.source": options.data}
    if Path(options.subject).is_file():
        return load_config(options.subject).changed(changes), None
    bundle = _bundle(options.subject, options.subject)
    changes |= {"data.hierarchy": None}  # the bundle has it, and its file may be on another machine
    return config_from_dict(bundle.info.config).changed(changes), bundle


def _bundle(name: str, where: str) -> "Bundle":
    from refract.models.bundle.bundle import load_bundle

    folder = bundle_folder(name)
    if folder is None:
        raise DataError(f"{where}: {name} is neither a config file nor the folder of a run or bundle")
    return load_bundle(folder)


def _model(model: ModelConfig, size: tuple[int, int], bundle: "Bundle | None", subject: str) -> "EmbeddingModel":
    from refract.pipeline.features.model import bundle_model, open_model

    if bundle is not None:
        return bundle_model(bundle)
    if model.weights == "none":
        raise DataError(
            f"{subject}: model.weights is none, so it has no features yet; train it and name its run, or set model.weights: default"
        )
    try:
        return open_model(model.name, model.weights, size)
    except DataError as error:
        raise DataError(f"{subject}: model: {str(error).removeprefix(f'--model {model.name}: ')}") from error


def _beside(source: str, subject: str) -> str:
    """Return the label history next to the data, relative to the working directory where that is shorter.

    DataError for the snapshot of a retraining run, next to which no training reads a history.
    """
    if (Path(source).parent / SNAPSHOT).is_file():
        raise DataError(
            f"{subject}: was trained on a snapshot of a retraining run; name the label history that the retraining applies (data.labels) "
            "with --labels"
        )
    if not Path(source).exists():  # digits, or a plugin's source
        return LABELS
    file = Path(source).resolve().parent / LABELS
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _collected(address: str) -> Path:
    return Path(COLLECTED) if "://" in address else Path(address).parent / COLLECTED
