"""The samples of any source, with labels where the source has them."""

import logging
from pathlib import Path

from refract.pipeline.data.manifest import DataError, Sample, load_manifest
from refract.pipeline.data.new_data import read_data

log = logging.getLogger(__name__)


def samples_of(source: str) -> tuple[list[Sample], list[tuple[str, ...]]]:
    """Return (samples, class names of each). A source that training refuses for its labels is read without labels.

    DataError for a source without samples.
    """
    try:
        manifest = load_manifest(source, to_train=False)
    except DataError as error:
        if source != "digits" and not Path(source).exists():
            raise
        log.info("reading the samples without labels: %s", error)
        samples = read_data(source, (), multilabel=False, unlabelled=True).samples
        return samples, [()] * len(samples)
    return list(manifest.samples), [tuple(manifest.labels[i] for i in sample.labels) for sample in manifest.samples]
