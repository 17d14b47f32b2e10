"""Pack a data set: write its samples, in their order, to a few large tars in the WebDataset format, with smaller images if asked for.

Each sample is an image `00000000.jpg` and a `00000000.json` with its label, split, text and original path. The source `webdataset` reads
the folder, in the same order, so that training on the pack draws the same batches.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from refract.augment import ImageError, Preprocess
from refract.augment.decoding.decode import image_size
from refract.augment.image_files import is_image
from refract.cores import mapped
from refract.pipeline.data.archives.archive import archive_path
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import Manifest, Sample, load_manifest
from refract.pipeline.data.pack_record import NAME, PackRecord, ShardRecord, digest, read_record
from refract.pipeline.data.storage import scheme_of
from refract.pipeline.files import locked, written_atomically
from refract.pipeline.stopping import Stop, Stopped
from refract.progress import Progress

LONGEST_JPEG = 65_500
"""The longest side of a JPEG that libjpeg writes, in pixels."""


@dataclass(frozen=True)
class StoredImages:
    """How images are stored.

    resize: pixels of the shorter side, to which larger images are reduced; None keeps all sizes. quality: of the JPEG, 1 to 100, for
    reduced images. raw: as BMP, without compression. Other images keep their bytes, and so does one whose JPEG would exceed LONGEST_JPEG.
    """

    resize: int | None = None
    quality: int = 90
    raw: bool = False

    def __call__(self, data: bytes) -> tuple[bytes, str]:
        """Return (the stored bytes, their suffix, "" for that of the original). ImageError for bytes that cannot be decoded."""
        height, width = image_size(data)
        shorter = min(height, width)
        if self.resize is not None and shorter > self.resize:
            scale = self.resize / shorter
            height, width = round(height * scale), round(width * scale)
            if max(height, width) > LONGEST_JPEG and not self.raw:
                return data, ""
        elif not self.raw:
            return data, ""
        # The stored files have no color profile, and stand upright.
        pixels = Preprocess(height, width, resize="squash", color_profile="convert")(data)
        return (_bmp(pixels), ".bmp") if self.raw else (_jpeg(pixels, self.quality), ".jpg")


class Packed(NamedTuple):
    """record: of the complete pack; written: number of shards that this call wrote; the others were complete."""

    record: PackRecord
    written: int


def pack(
    manifest: Manifest, images: StoredImages, folder: Path, stop: Stop, *, shard_size: int, fingerprint: str = ""
) -> Packed:
    """Write the samples to `folder`, which appears when it is complete and verified; until then the shards are in `FOLDER.partial`.

    shard_size: samples in a tar; fingerprint: that of the training data, for `pack.json`. A repeated call with the same arguments keeps
    the shards that are complete. DataError for a folder with other files, inside the data or on a mount point, for files that change
    meanwhile, and for samples that the tars cannot represent; Stopped after a stop request; OSError.
    """
    folder = _target(folder, manifest)
    record = PackRecord(
        _identity(manifest, images, shard_size), manifest.source, asdict(images), manifest.task, manifest.labels,
        len(manifest.samples), shard_size, fingerprint,
    )  # fmt: skip
    present = read_record(folder) if folder.is_dir() else None
    if present is not None and present.identity == record.identity:
        _verify(folder, present, manifest)
        return Packed(present, 0)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        other = "is a pack of other data or settings" if present is not None else "exists and is not empty"
        raise DataError(f"{folder}: {other}; name a new folder")
    unfinished = folder.with_name(f"{folder.name}.partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = unfinished / ".lock"
    with locked(lock, DataError(f"{unfinished}: another process is packing into it; wait for its end")):
        record = _resumed(unfinished, record)
        complete_shards = len(record.shards)
        record = _write_shards(unfinished, record, manifest, images, stop)
        if _identity(manifest, images, shard_size) != record.identity:
            raise DataError(
                f"{manifest.source}: files have changed while they were packed; delete {unfinished} and pack again"
            )
        _verify(unfinished, record, manifest)
        lock.unlink()
        unfinished.replace(folder)  # an empty folder is replaced
    return Packed(record, len(record.shards) - complete_shards)


def _target(folder: Path, manifest: Manifest) -> Path:
    """Return the folder without symbolic links, which the finished pack cannot replace. DataError for a folder that cannot be one."""
    target, source = Path(os.path.realpath(folder)), Path(os.path.realpath(manifest.source))
    if source.is_dir() and source in target.parents:
        raise DataError(
            f"{folder}: is inside the data {manifest.source}, which would be read with the pack as a class; name a folder outside of it"
        )
    if target.is_mount():
        raise DataError(
            f"{folder}: is a mount point, which a pack cannot replace; name a new folder in it: {folder / 'pack'}"
        )
    return target


def _write_shards(folder: Path, record: PackRecord, manifest: Manifest, images: StoredImages, stop: Stop) -> PackRecord:
    """Write the shards that the record lacks, and the record after each."""
    for path in (*folder.glob(".shard-*"), *folder.glob(f".{NAME}.*")):  # of a process that was killed
        path.unlink()
    record.write(folder)  # before the first shard, so that a process killed after it leaves a pack
    start = sum(shard.samples for shard in record.shards)
    with Progress("packing", len(manifest.samples), unit="samples", count=start) as progress:
        while start < len(manifest.samples):
            if stop.signal is not None:
                raise Stopped(stop.signal)
            samples = manifest.samples[start : start + record.shard_size]
            file = folder / f"shard-{len(record.shards):06}.tar"
            record = record.with_shard(_write_shard(file, start, samples, manifest.labels, images, progress))
            record.write(folder)
            start += len(samples)
    return record


def _identity(manifest: Manifest, images: StoredImages, shard_size: int) -> str:
    sha = hashlib.sha256(json.dumps([asdict(images), shard_size, manifest.task, manifest.labels]).encode())
    for sample in manifest.samples:
        facts = [sample.path, sample.labels, sample.split, sample.text, dict(sample.metadata), _state(sample)]
        sha.update(json.dumps(facts).encode())
    return sha.hexdigest()


def _state(sample: Sample) -> list[int]:
    """Return numbers that change with the content of a local file or its archive; [] for other samples."""
    if sample.data is not None or scheme_of(sample.path):
        return []
    where = archive_path(sample.path)
    with suppress(OSError):  # a missing file is reported when it is read
        facts = os.stat(sample.path if where is None else where.archive)  # noqa: PTH116 — runs for each image
        return [facts.st_size, facts.st_mtime_ns]
    return []


def _resumed(folder: Path, record: PackRecord) -> PackRecord:
    """Return the record with the shards of an interrupted call that are whole. DataError if the folder has another pack or other files."""
    before = read_record(folder)
    if before is None:
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise DataError(f"{folder}: exists and is not a pack; move it away, or name another folder")
        return record
    if before.identity != record.identity:
        raise DataError(
            f"{folder}: is an interrupted pack of other data or settings; repeat them to resume it, or delete the folder to pack anew"
        )
    for shard in before.shards:
        file = folder / shard.file
        if not file.is_file() or digest(file) != shard.sha256:
            break  # the disk lost it: it and all after it are written again
        record = record.with_shard(shard)
    return record


def _write_shard(
    file: Path, first: int, samples: Sequence[Sample], labels: Sequence[str], images: StoredImages, progress: Progress
) -> ShardRecord:
    """Write a tar. first: number of its first sample. OSError names an image that cannot be read."""
    undecodable = 0
    with written_atomically(file) as target:
        hashed = _Hashed(target)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]  # writes alone
            for number, (sample, stored) in enumerate(
                zip(samples, mapped(partial(_stored, images), samples), strict=True), first
            ):
                if stored is not None:
                    data, suffix, as_it_was = stored
                    undecodable += as_it_was
                    _add(tar, f"{number:08}{suffix}", data)
                _add(tar, f"{number:08}.json", _fields(sample, labels))
                progress.update()
    return ShardRecord(file.name, hashed.sha.hexdigest(), hashed.bytes, len(samples), undecodable)


def _stored(images: StoredImages, sample: Sample) -> tuple[bytes, str, bool] | None:
    """Return (bytes, suffix, whether they cannot be decoded) of a sample's image, None without one."""
    if not sample.has_image:
        return None
    try:
        data = sample.read()
    except OSError as error:
        error.filename = error.filename or sample.path
        raise
    suffix = Path(sample.path).suffix.lower()
    suffix = suffix if is_image(f"0{suffix}") else ".jpg"  # the content decides how it is decoded
    try:
        stored, new_suffix = images(data)
    except ImageError:
        return data, suffix, True  # training reports it, as it does in the original data
    return stored, new_suffix or suffix, False


def _fields(sample: Sample, labels: Sequence[str]) -> bytes:
    fields: dict[str, Any] = {**sample.metadata, "label": ";".join(labels[i] for i in sample.labels)}
    if sample.split:
        fields["split"] = sample.split
    captioned = any(name.strip().casefold() == "caption" for name in fields)  # which would be read as the text
    if sample.text or captioned:
        fields["text"] = sample.text
    fields["path"] = sample.path
    return json.dumps(fields, ensure_ascii=False).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without a time or an owner: equal samples give equal tars
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


class _Hashed:
    """A file for writing that knows the number and the SHA-256 of the written bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _verify(folder: Path, record: PackRecord, manifest: Manifest) -> None:
    """Read all shards again. DataError for a shard whose bytes differ, and if the samples differ from those of the data."""
    for shard in record.shards:
        if digest(folder / shard.file) != shard.sha256:
            raise DataError(
                f"{folder / shard.file}: differs from what was written; check the disk, delete {folder} and pack again"
            )
    packed = load_manifest(str(folder), manifest.task, to_train=False)
    if packed.labels != manifest.labels:
        raise DataError(
            f"{folder}: has the labels {', '.join(packed.labels)}, not {', '.join(manifest.labels)}; rename them"
        )
    for wanted, packed_row in zip(_rows(manifest), _rows(packed), strict=True):
        if wanted != packed_row:
            raise DataError(
                f"{folder}: the sample of {wanted[0]} is read as {packed_row[1:]}, not {wanted[1:]}; rename its label or column"
            )


def _rows(manifest: Manifest) -> Iterator[tuple[Any, ...]]:
    """Yield (path, labels, split, text) of each sample."""
    for sample in manifest.samples:
        path = sample.metadata.get("path (original)", sample.path)
        yield path, [manifest.labels[i] for i in sample.labels], sample.split, sample.text


def _jpeg(pixels: Any, quality: int) -> bytes:
    import simplejpeg

    if (pixels[..., :1] == pixels).all():
        return simplejpeg.encode_jpeg(pixels[..., :1].copy(), quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")


def _bmp(pixels: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()
