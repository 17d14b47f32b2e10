"""The samples of any source, with labels where the source has them."""

from pathlib import Path

from refract.pipeline.data.manifest import DataError, Sample, load_manifest
from refract.pipeline.drift.new_data import read_data


def samples_of(source: str) -> tuple[list[Sample], list[tuple[str, ...]]]:
    """Return (samples, class names of each). A source that training refuses for its labels is read without labels.

    DataError for a source without samples.
    """
    try:
        manifest = load_manifest(source, to_train=False)
    except DataError:
        if source != "digits" and not Path(source).exists():
            raise
        samples = read_data(source, (), multilabel=False, unlabelled=True).samples
        return samples, [()] * len(samples)
    return list(manifest.samples), [tuple(manifest.labels[i] for i in sample.labels) for sample in manifest.samples]
