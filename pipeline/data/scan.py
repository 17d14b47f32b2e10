"""Read and decode all images of a data set: content hashes, perceptual hashes, unreadable files, remarks."""

import hashlib
import logging
import time
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar, cast

import numpy as np

from refract.augment.decoding.decode import decode_part
from refract.cores import mapped
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.near_duplicates import difference_hash
from refract.pipeline.data.scan_cache import HASH, RECORD, ScanCache
from refract.progress import Progress

log = logging.getLogger(__name__)

IMAGES = frozenset({"images"})

MEASURED = 8
"""Images whose time decides on the number of threads."""
SMALL_S = 0.0005
"""Seconds for an image, below which one thread is faster than several, which wait for Python's lock. On two cores, a training on a million
images of 32×32 pixels reached the doctor's check after 137 s with one thread and 169 s with two (`benchmarks.growth`)."""

Value = TypeVar("Value")


class _Column(Mapping[str, Value]):
    """Key → value, whose values are rows of bytes. rows: key → row of `blob`."""

    def __init__(self, rows: Mapping[str, int], blob: bytes) -> None:
        self.rows, self.blob = rows, blob

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class Digests(_Column[str]):
    """Key → SHA-256 in hexadecimal, stored in 32 bytes."""

    def __getitem__(self, key: str) -> str:
        start = 32 * self.rows[key]
        return self.blob[start : start + 32].hex()


class DifferenceHashes(_Column[bytes]):
    """Path → `difference_hash` of the image, stored as in RECORD."""

    def __getitem__(self, path: str) -> bytes:
        start = (1 + HASH) * self.rows[path]
        return self.blob[start + 1 : start + 1 + HASH] if self.blob[start] else b""


@dataclass(frozen=True)
class Scan:
    """The results of `scan`.

    hashes: sample key → SHA-256 of the inputs that the network reads, for each readable sample; groups: sample key → SHA-256 of the image,
    or of the text of a sample without an image; difference_hashes: path → `difference_hash` of the image; bad: path of an unreadable
    image → reason; remarks: path → remark on a decoded image, such as a repair; images: path → SHA-256 of the image's bytes.
    """

    hashes: Mapping[str, str]
    groups: Mapping[str, str]
    difference_hashes: Mapping[str, bytes]
    bad: dict[str, str]
    remarks: dict[str, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)

    def joined(self, other: "Scan", keys: Iterable[str]) -> "Scan":
        """Return the scan with the results of another one for the samples with these keys, which have an image and no text."""
        added = list(keys)
        return Scan(
            _extended(self.hashes, other.hashes, added),
            _extended(self.groups, other.groups, added),
            _extended(self.difference_hashes, other.difference_hashes, added),
            self.bad,
            self.remarks | {key: other.remarks[key] for key in added if key in other.remarks},
            _extended(self.images, other.images, added),
        )

    def content(self, manifest: Manifest) -> str:
        """Return the SHA-256 over the content and labels of all samples, independent of the splits."""
        lines = sorted(f"{self.hashes[s.key]} {[manifest.labels[i] for i in s.labels]}" for s in manifest.samples)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def fingerprint(self, manifest: Manifest) -> str:
        """Return the SHA-256 over the content, labels and splits of all samples, independent of paths and order."""
        lines = sorted(
            f"{self.hashes[s.key]} {[manifest.labels[i] for i in s.labels]} {s.split}" for s in manifest.samples
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _extended(values: Mapping[str, Value], others: Mapping[str, Value], keys: Iterable[str]) -> Mapping[str, Value]:
    return ChainMap({key: others[key] for key in keys}, cast(MutableMapping[str, Value], values))  # only read


def scan(samples: Sequence[Sample], *, reads: frozenset[str] = IMAGES) -> Scan:
    """Hash and decode every image once, on all cores (decoding releases the GIL). `ScanCache` has the results of unchanged files.

    reads: the network's inputs: `images`, `texts`, or both. The hashes ignore inputs that the network does not read.
    """
    images: dict[str, Sample] = {}
    for sample in samples:
        images.setdefault(sample.path, sample)
    records, bad, remarks = _scan_images(list(images.values()))
    rows = {path: row for row, path in enumerate(images) if path not in bad}
    hashes = groups = scanned = Digests(rows, records["digest"].tobytes())
    remarks = {path: remarks[path] for path in images if path in remarks}  # in the order of the samples
    if "texts" in reads or any(sample.text or not sample.has_image for sample in samples):
        hashes, groups = _with_texts([sample for sample in samples if sample.path in rows], scanned, reads)
        scanned = Digests({path: row for path, row in rows.items() if images[path].has_image}, scanned.blob)
    return Scan(hashes, groups, DifferenceHashes(rows, records["difference"].tobytes()), bad, remarks, scanned)


def _with_texts(samples: Sequence[Sample], images: Digests, reads: frozenset[str]) -> tuple[Digests, Digests]:
    """Return `hashes` and `groups` of samples with texts. images: path → SHA-256 of the image."""
    rows = {sample.key: row for row, sample in enumerate(samples)}
    hashes, groups = bytearray(), bytearray()
    for sample in samples:
        text = hashlib.sha256(trimmed(sample.text).encode("utf-8", "replace"))
        image = images[sample.path] if "images" in reads and sample.has_image else ""
        content = bytes.fromhex(image) if image else text.digest()
        groups += content
        hashes += hashlib.sha256(f"{image}{text.hexdigest()}".encode()).digest() if "texts" in reads else content
    return Digests(rows, bytes(hashes)), Digests(rows, bytes(groups))


def _scan_images(samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, str], dict[str, str]]:
    """Return (a RECORD for each sample, path of an unreadable image → reason, path → remark). Each sample has another path."""
    records = np.zeros(len(samples), RECORD)
    bad: dict[str, str] = {}
    remarks: dict[str, str] = {}
    with Progress("checking samples", len(samples), unit="samples") as progress, ScanCache() as cache:
        states = cache.states(samples)
        unknown = np.ones(len(samples), bool)
        for row, record, remark in cache.known(samples, states):
            records[row : row + 1] = np.frombuffer(record, RECORD)
            unknown[row] = False
            if remark:
                remarks[samples[row].path] = remark
            progress.update()
        rows = np.flatnonzero(unknown).tolist()
        log.debug("unchanged since an earlier check: %d of %d images", len(samples) - len(rows), len(samples))
        for row, result in zip(rows, _scan_all([samples[row] for row in rows]), strict=True):
            progress.update()
            path = samples[row].path
            if isinstance(result, str):
                bad[path] = result
                continue
            digest, image_hash, remark = result
            record = digest + (b"\1" + image_hash if image_hash else bytes(1 + HASH))
            records[row : row + 1] = np.frombuffer(record, RECORD)
            if remark:
                remarks[path] = remark
            cache.add(path, states[row], record, remark)
    return records, bad, remarks


def _scan_all(samples: Sequence[Sample]) -> Iterator[tuple[bytes, bytes, str] | str]:
    """Yield the result of `_scan_one` for each sample, computed by one thread if they are small, else by one for each core."""
    seconds = []
    for sample in samples[:MEASURED]:
        started = time.perf_counter()
        yield _scan_one(sample)
        seconds.append(time.perf_counter() - started)
    threads = 1 if seconds and median(seconds) < SMALL_S else None
    yield from mapped(_scan_one, samples[MEASURED:], threads=threads)


def _scan_one(sample: Sample) -> tuple[bytes, bytes, str] | str:
    """Return (SHA-256, difference hash, remark or ""), or why the image is unreadable."""
    try:
        data = sample.read()
        part = decode_part(data, None)
        image_hash = difference_hash(part.pixels)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # an ImageError, or a path with a NUL character
        return str(error)
    return hashlib.sha256(data).digest(), image_hash, "; ".join(part.remarks)
