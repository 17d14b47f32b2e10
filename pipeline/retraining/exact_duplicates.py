"""Exact duplicates: the digests that identify a sample by content, and the removal of copies of the holdout."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from refract.augment.decoding.decode import decode
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import Sample
from refract.pipeline.data.near_duplicates import difference_hash
from refract.pipeline.data.scan import Scan
from refract.progress import tracked

log = logging.getLogger(__name__)


def contents(sample: Sample) -> frozenset[str]:
    """Return the SHA-256 of the image and of the text that the sample has; one of them is its `Scan.groups`. OSError."""
    data_of_sample = [sample.read()] if sample.has_image else []
    if text := trimmed(sample.text):
        data_of_sample.append(text.encode("utf-8", "replace"))
    return frozenset(hashlib.sha256(data).hexdigest() for data in data_of_sample)


def without_copies(
    samples: Sequence[Sample], held: Sequence[Sample], scanned: Scan, reads: frozenset[str]
) -> list[Sample]:
    """Exclude copies of held-out samples: under another name, with another text, or with the same pixels in another file.

    scanned: the scan of the samples; reads: `images`, `texts` or both, which the network reads. OSError.
    """
    with ThreadPoolExecutor() as pool:
        known = frozenset[str]().union(*tracked(pool.map(contents, held), "reading the holdout", len(held)))
    rest = [sample for sample in samples if scanned.groups[sample.key] not in known]
    if "images" not in reads:
        return rest
    copies = _same_pixels(rest, held, scanned)
    if copies:
        log.warning(
            "data: excluded %d images that the holdout has in another file, such as %s", len(copies), next(iter(copies))
        )
    return [sample for sample in rest if sample.path not in copies]


def _same_pixels(samples: Sequence[Sample], held: Sequence[Sample], scanned: Scan) -> dict[str, None]:
    """Return the paths of samples with the pixels of a held-out one. Only samples with an equal perceptual hash are decoded again."""
    with ThreadPoolExecutor() as pool:
        pixels = set(pool.map(_pixels, [sample for sample in held if sample.has_image]))
        hashes = {perceptual_hash for perceptual_hash, _ in pixels}
        alike = [sample for sample in samples if sample.has_image and scanned.difference_hashes[sample.path] in hashes]
        decoded = zip(alike, pool.map(_pixels, alike), strict=True)
        return {sample.path: None for sample, digest in decoded if digest in pixels}


def _pixels(sample: Sample) -> tuple[bytes, str]:
    """Return (the perceptual hash, the SHA-256 of the decoded pixels)."""
    image = decode(sample.read())
    return difference_hash(image), hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
