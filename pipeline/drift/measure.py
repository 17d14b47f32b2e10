"""Measure the drift of new data from a bundle's reference, for `refract drift` and retraining."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.augment import Preprocess
from refract.models.bundle.bundle import Bundle
from refract.models.classifier import Classifier
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.data.new_data import MOST, NewData, read_data
from refract.pipeline.drift.compare import Drift, compare, far_from
from refract.pipeline.drift.log import is_log, read_log
from refract.pipeline.drift.outputs import stored_outputs_suffice
from refract.pipeline.drift.profile import MOST_IMAGES, Profile, ProfiledSamples, profile
from refract.pipeline.drift.report import SHOWN, drift_numbers, furthest_images, make_drift_report
from refract.pipeline.drift.thresholds import FEWEST, THRESHOLDS, Threshold
from refract.pipeline.evaluation.report import Report

if TYPE_CHECKING:
    from refract.pipeline.features.embed import Stored
    from refract.pipeline.features.model import EmbeddingModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """The drift of new data, with what its report shows.

    title, facts: the title and facts of the report; reference, new: the compared profiles; shown: the new samples with their predictions,
    or the images of a server's log, None if it has none.
    """

    title: str
    facts: Mapping[str, Any]
    drift: Drift
    reference: Profile
    new: Profile
    shown: ProfiledSamples | None
    from_log: bool

    @property
    def bad(self) -> Mapping[str, str]:
        """Path → why it could not be read."""
        return self.shown.bad if self.shown else {}

    @property
    def profiled(self) -> ProfiledSamples | None:
        """The new samples with their predictions, None for rows of a server's log."""
        return None if self.from_log else self.shown

    @property
    def numbers(self) -> dict[str, Any]:
        """The JSON values of the report."""
        return drift_numbers(self.drift, self.facts, self.profiled.samples if self.profiled else ())

    @cached_property
    def report(self) -> Report:
        """The report. Drawing its charts takes seconds."""
        profiles = self.title, self.drift, self.reference, self.new
        if self.profiled is None:
            return make_drift_report(*profiles, facts=self.facts, galleries=_unsure(self.reference, self.shown))
        samples, probabilities = self.profiled.samples, self.profiled.probabilities
        return make_drift_report(*profiles, facts=self.facts, samples=samples, probabilities=probabilities)


def reference_of(classifier: Classifier, preprocess: Preprocess, manifest: Manifest, **kinds: Any) -> Profile:
    """Build the reference of a bundle: the profile of at most MOST_IMAGES samples of the test set, filled up from validation.

    Training samples are excluded: a network has fitted them, so their features and confidences differ from those of all other images,
    and data of the same distribution would seem to drift. Validation only chose the epoch and the temperature, the test set nothing.
    kinds: task, labels, temperature, thresholds, and `stored` for embeddings of a feature store.
    """
    held = NewData(manifest.of("test"), None).drawn(MOST_IMAGES).samples
    chosen = held + NewData(manifest.of("val"), None).drawn(max(1, MOST_IMAGES - len(held))).samples
    chosen = chosen[:MOST_IMAGES]
    names = [[manifest.labels[i] for i in sample.labels] for sample in chosen]
    return profile(classifier, preprocess, chosen, names, labels=manifest.labels, **kinds).profile


def measure_drift(
    bundle: Bundle,
    data: str,
    *,
    reference: str | None = None,
    test: str = "mmd",
    thresholds: Mapping[str, Threshold] = THRESHOLDS,
    images: int = MOST,
    unlabelled: bool = False,
    features: Path | None = None,
) -> Measured:
    """Measure the drift of data (see `read_data`, or a server's sampled inputs) from the bundle's reference, or from other data.

    reference: data that the bundle was not trained on; of its training data the validation and test samples are used. images: the
    largest number of samples, drawn at random; 0 for all. features: the feature store, which keeps embeddings; None computes all of them.
    DataError or BundleError for unusable input.
    """
    from refract.pipeline.features.model import bundle_model

    info = bundle.info
    multilabel = info.task == "multilabel"
    kinds: dict[str, Any] = {"task": info.task, "labels": info.labels, "temperature": info.temperature}
    kinds["thresholds"] = info.thresholds
    model = bundle_model(bundle)
    classifier, preprocess = model.classifier, model.preprocess
    kinds["stored"] = None if features is None else _stored(model, features)
    stored = bundle.reference()
    if reference is not None:
        known = _reference_data(info, reference, multilabel).drawn(images or MOST)
        base = profile(classifier, preprocess, known.samples, known.names, **kinds).profile
    elif stored is not None:
        base = Profile.from_bytes(stored, info.labels, multilabel=multilabel)
    else:
        raise DataError(
            f"{bundle.path}: the bundle has no reference; an older version wrote it, or a user. Add --reference DATA, with data like "
            "its training data, but held out"
        )
    facts = {
        "bundle": f"{info.name} ({bundle.digest[:12]})",
        "reference": reference or "the bundle's own test and validation samples",
    }
    from_log = is_log(Path(data))
    if from_log:
        new, stored_images, others = read_log(Path(data), info, bundle.digest)
        if others:
            log.warning("%s: skipped %d rows of other models", data, others)
        shown = profile(classifier, preprocess, stored_images, **kinds) if stored_images else None
        facts["new data"] = f"{new.count:,} sampled inputs of a server, {data}"
    else:
        all_data = read_data(data, info.labels, multilabel=multilabel, unlabelled=unlabelled)
        drawn = all_data.drawn(images)
        facts["new data"] = f"{len(drawn.samples):,} of {len(all_data.samples):,} samples of {data}"
        shown = profile(classifier, preprocess, drawn.samples, drawn.names, **kinds)
        new = shown.profile
    bad = shown.bad if shown else {}
    if new.count < FEWEST or base.count < FEWEST:
        why = f" ({len(bad)} cannot be read, such as {next(iter(bad))}: {next(iter(bad.values()))})" if bad else ""
        hint = "; name a larger one with --reference" if base.count < FEWEST else ""
        raise DataError(
            f"{data}: {new.count} new samples{why} and {base.count} of the reference; {FEWEST} of each are needed{hint}"
        )
    drift = compare(base, new, test=test, thresholds=thresholds)
    return Measured(f"Drift of {data} from {info.name}", facts, drift, base, new, shown, from_log)


def _stored(model: "EmbeddingModel", features: Path) -> "Stored | None":
    """Open the store. None if it cannot be written, or if the network computes more after its head."""
    from refract.pipeline.features.embed import Stored
    from refract.pipeline.features.store import FeatureStore

    if not stored_outputs_suffice(model):
        log.info("the network computes more after its last layer, so that its stored embeddings do not suffice")
        return None
    try:
        store = FeatureStore(features, model.key, model.record)
        if os.access(store.folder, os.W_OK):
            return Stored(model, store)
        reason = "read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    log.warning("%s: cannot be written (%s); no embedding is stored", features, reason)
    return None


def _reference_data(info: Any, source: str, multilabel: bool) -> NewData:
    """Read the reference data; of data that the bundle was trained on, only the held-out samples."""
    from refract.pipeline.data.manifest import load_manifest
    from refract.pipeline.data.prepare import split_as_trained

    data = read_data(source, info.labels, multilabel=multilabel)
    if data.names is None or not {name for row in data.names for name in row} <= set(info.labels) or not info.config:
        return data
    try:
        manifest = load_manifest(source, info.task if info.task == "multilabel" else "multiclass")
    except DataError:  # for example data of one class
        return data
    manifest = manifest if "test" in manifest.splits() else split_as_trained(info, manifest)
    samples: list[Sample] = [sample for sample in manifest.samples if sample.split in ("test", "val")]
    if not samples:
        return data
    return NewData(samples, [tuple(manifest.labels[i] for i in sample.labels) for sample in samples])


def _unsure(base: Profile, shown: ProfiledSamples | None) -> dict[str, list[dict[str, str]]]:
    """Build a gallery of the images that a server stored, the farthest from the reference first."""
    title = "Images of low confidence that the server stored"
    if shown is None or base.features is None or shown.profile.features is None:
        return {title: []}
    distances, usual = far_from(base.features, shown.profile.features)
    indices = (-distances).argsort(kind="stable")[:SHOWN].tolist()
    return {title: furthest_images(shown.samples, distances, usual, indices, shown.probabilities, base.labels)}
