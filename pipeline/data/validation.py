"""The look at every image before training: what cannot be read, what is in two splits, which classes cannot be learned."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from refract.augment.decoding.decode import decode_part
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import SPLITS, DataError, Manifest, Sample
from refract.pipeline.data.near_duplicates import look_of
from refract.pipeline.data.sources.folders import skipped_lines

SHOWN = 20


@dataclass(frozen=True)
class Scan:
    """hashes: a sample's key → SHA-256 of what the network reads of it, for every image that could be decoded; groups: key → that of the
    image alone, where there is one; looks: path → `refract.pipeline.data.near_duplicates.look_of` of it; bad: path →
    why not; remarks: path → what its owner should know of an image that was decoded, such as what was repaired."""

    hashes: dict[str, str]
    groups: dict[str, str]
    looks: dict[str, bytes]
    bad: dict[str, str]
    remarks: dict[str, str] = field(default_factory=dict)

    def content(self, manifest: Manifest) -> str:
        """SHA-256 over every sample's content and labels, however it is split."""
        lines = sorted(f"{self.hashes[s.key]} {[manifest.labels[i] for i in s.labels]}" for s in manifest.samples)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def fingerprint(self, manifest: Manifest) -> str:
        """SHA-256 over every sample's content, labels and split; the same wherever the files lie, and in whatever order."""
        lines = sorted(
            f"{self.hashes[s.key]} {[manifest.labels[i] for i in s.labels]} {s.split}" for s in manifest.samples
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


IMAGES = frozenset({"images"})


def scan(samples: Sequence[Sample], *, reads: frozenset[str] = IMAGES, progress: bool = True) -> Scan:
    """Hash and decode every image, on all cores (decoding releases the GIL). reads: `images`, `texts`, or both, by what the network
    reads; texts that it does not read make no difference."""
    from tqdm import tqdm

    hashes, groups, looks, bad, remarks = {}, {}, {}, {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(_look, samples, chunksize=16)
        for sample, (digest, look, problem, remark) in zip(
            samples,
            tqdm(results, "checking samples", len(samples), disable=not progress or None, leave=False),
            strict=True,
        ):
            if problem:
                bad[sample.path] = problem
            else:
                looks[sample.path] = look
                if remark:
                    remarks[sample.path] = remark
                text = hashlib.sha256(trimmed(sample.text).encode("utf-8", "replace")).hexdigest()
                seen = digest if "images" in reads and sample.has_image else ""
                groups[sample.key] = seen or text
                hashes[sample.key] = (
                    seen if "texts" not in reads else hashlib.sha256(f"{seen}{text}".encode()).hexdigest()
                )
    return Scan(hashes, groups, looks, bad, remarks)


def drop_bad(manifest: Manifest, found: Scan, on_bad_file: str) -> Manifest:
    """The manifest without unreadable images; DataError lists them where `on_bad_file` is `error`."""
    if found.bad and on_bad_file == "error":
        raise DataError(
            f"{manifest.source}: {len(found.bad)} of {len(manifest.samples)} images cannot be read:\n"
            + _listed(f"{path}: {why}" for path, why in found.bad.items())
            + "\nMend or remove them, or leave them out with --data.on_bad_file skip."
        )
    return manifest.with_samples([sample for sample in manifest.samples if sample.path not in found.bad])


def drop_shared(manifest: Manifest, found: Scan, on_bad_file: str) -> Manifest:
    """The manifest without training images that are held out as well (by content); DataError lists them under `error`."""
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in manifest.samples:
        splits[found.groups[sample.key]].setdefault(sample.split, sample.path)
    shared = {digest: where for digest, where in splits.items() if len(where) > 1}
    if shared and on_bad_file == "error":
        raise DataError(
            f"{manifest.source}: {len(shared)} images are in more than one split, so the hold-out would not be one:\n"
            + _listed(
                " = ".join(f"{where[split]} ({split})" for split in SPLITS if split in where)
                for where in shared.values()
            )
            + "\nKeep each in one split, or leave the copies out with --data.on_bad_file skip."
        )
    # The most held-out split keeps its copy.
    kept = {digest: max(where, key=SPLITS.index) for digest, where in shared.items()}
    return manifest.with_samples([s for s in manifest.samples if kept.get(found.groups[s.key], s.split) == s.split])


def drop_contradictory(manifest: Manifest, found: Scan, on_bad_file: str) -> Manifest:
    """The manifest without images whose copies carry other labels; DataError lists them under `error`."""
    labels: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for sample in manifest.samples:
        labels[found.hashes[sample.key]].setdefault(tuple(sorted(sample.labels)), sample.path)
    torn = {digest: where for digest, where in labels.items() if len(where) > 1}
    if torn and on_bad_file == "error":
        named = (
            " = ".join(f"{path} ({';'.join(manifest.labels[i] for i in own) or '-'})" for own, path in where.items())
            for where in torn.values()
        )
        raise DataError(
            f"{manifest.source}: {len(torn)} images have copies with other labels, and cannot be both:\n"
            + _listed(named)
            + "\nMend the labels, or leave these images out with --data.on_bad_file skip."
        )
    return manifest.with_samples([sample for sample in manifest.samples if found.hashes[sample.key] not in torn])


def check_classes(manifest: Manifest) -> list[str]:
    """Warnings about classes, after the splits are known; DataError for classes that cannot be learned."""
    counts, trained = manifest.counts(), manifest.counts("train")
    if manifest.empty:
        raise DataError(
            f"{manifest.source}: {len(manifest.empty)} class folders hold no image:\n"
            + _listed(manifest.empty)
            + "\nAdd images or remove the folders."
        )
    gone = [label for label, count in counts.items() if count == 0]
    if gone:
        raise DataError(f"{manifest.source}: no readable image is left of {len(gone)} classes:\n{_listed(gone)}")
    single = [label for label, count in counts.items() if count == 1]
    if single:
        raise DataError(
            f"{manifest.source}: {len(single)} classes have one image, which cannot both be learned and be measured:\n"
            + _listed(single)
            + "\nAdd images or leave these classes out."
        )
    unlearned = [label for label, count in trained.items() if count == 0]
    if unlearned:
        raise DataError(
            f"{manifest.source}: {len(unlearned)} classes are held out but never trained on:\n"
            + _listed(unlearned)
            + "\nThe label sets of the splits differ: add training images, remove these classes, or move images without a label away."
        )
    missing = [split for split in SPLITS if not manifest.of(split)]
    if missing:
        raise DataError(
            f"{manifest.source}: {len(manifest.samples)} images are too few to draw the split {missing[0]} from; add images, or raise "
            "data.val_fraction and data.test_fraction"
        )
    warnings = []
    for split in manifest.splits():
        absent = [label for label, count in manifest.counts(split).items() if count == 0]
        if absent:
            warnings.append(f"{split}: no image of {', '.join(absent[:SHOWN])}; its score says nothing about them")
    warnings += [*manifest.notes, *(f"{line}; they are skipped" for line in skipped_lines(manifest.skipped))]
    if manifest.loose:
        warnings.append(
            f"{len(manifest.loose)} images lie in no class's folder and were left out, as {manifest.loose[0]}"
        )
    return warnings


def remark_lines(remarks: Mapping[str, str]) -> list[str]:
    """One line for each kind of remark on decoded images: how many, and one of them. remarks: path → remark, `KIND: details`."""
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, remark in remarks.items():
        kind, _, details = remark.partition(": ")
        kinds[kind].append((path, details))
    return [
        f"{kind}: {len(shown)} image{'s' * (len(shown) > 1)}, such as {shown[0][0]} ({shown[0][1]})"
        for kind, shown in kinds.items()
    ]


def _look(sample: Sample) -> tuple[str, bytes, str, str]:
    """(SHA-256, look, "", remark or "") or ("", b"", why the image cannot be used, "")."""
    try:
        data = sample.read()
        part = decode_part(data, None)
        look = look_of(part.pixels)
    except OSError as error:
        return "", b"", error.strerror or str(error), ""
    except ValueError as error:  # an ImageError, or a path with a NUL in it
        return "", b"", str(error), ""
    return hashlib.sha256(data).hexdigest(), look, "", "; ".join(part.remarks)


def _listed(lines: Iterable[str]) -> str:
    shown = list(lines)
    rest = [f"  … and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    return "\n".join([f"  {line}" for line in shown[:SHOWN]] + rest)
