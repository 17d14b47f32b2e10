"""What samples are known by, whatever their files are called, and which of them are copies of what is held out."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from refract.augment.decoding.decode import decode
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import Sample
from refract.pipeline.data.near_duplicates import look_of
from refract.pipeline.data.validation import Scan

log = logging.getLogger(__name__)


def contents(sample: Sample) -> frozenset[str]:
    """SHA-256 of its image and of its text, as far as it has them: one of them is its `Scan.groups`. OSError."""
    found = [sample.read()] if sample.has_image else []
    if text := trimmed(sample.text):
        found.append(text.encode("utf-8", "replace"))
    return frozenset(hashlib.sha256(data).hexdigest() for data in found)


def without_copies(
    samples: Sequence[Sample], held: Sequence[Sample], found: Scan, reads: frozenset[str]
) -> list[Sample]:
    """The samples but those that are held out under another name, beside another text, or with the same pixels in another file.

    found: of the samples; reads: what the network reads. OSError.
    """
    with ThreadPoolExecutor() as pool:
        known = frozenset[str]().union(*pool.map(contents, held))
    rest = [sample for sample in samples if found.groups[sample.key] not in known]
    if "images" not in reads:
        return rest
    again = _saved_again(rest, held, found)
    if again:
        log.warning(
            "data: left out %d images that the hold-out has in another file, as %s", len(again), next(iter(again))
        )
    return [sample for sample in rest if sample.path not in again]


def _saved_again(samples: Sequence[Sample], held: Sequence[Sample], found: Scan) -> dict[str, None]:
    """Paths of samples that have the pixels of one that is held out. Decoded again are those alone that look as it does."""
    with ThreadPoolExecutor() as pool:
        pixels = set(pool.map(_pixels, [sample for sample in held if sample.has_image]))
        looks = {look for look, _ in pixels}
        alike = [sample for sample in samples if sample.has_image and found.looks[sample.path] in looks]
        return {sample.path: None for sample, own in zip(alike, pool.map(_pixels, alike), strict=True) if own in pixels}


def _pixels(sample: Sample) -> tuple[bytes, str]:
    """(its look, SHA-256 of its decoded pixels)."""
    image = decode(sample.read())
    return look_of(image), hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
