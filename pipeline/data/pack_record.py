"""`pack.json`, which describes a pack: how its images are stored, and the size and SHA-256 of each of its shards."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from refract.pipeline.data.errors import DataError
from refract.pipeline.files import open_file, read_file, write_atomically

NAME = "pack.json"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class ShardRecord:
    """file: name in the pack; sha256: of the whole file, in hexadecimal; samples, bytes: their numbers; kept: images that could not be
    decoded, and are stored as they were.
    """

    file: str
    sha256: str
    bytes: int
    samples: int
    kept: int = 0


@dataclass(frozen=True)
class PackRecord:
    """The content of `pack.json`.

    identity: SHA-256 over the packed samples, the state of their files and the settings; source: the data or the config that was packed;
    images: how images are stored; fingerprint: that of the training data, if a config was packed.
    """

    identity: str
    source: str
    images: dict[str, Any]
    task: str
    labels: tuple[str, ...]
    samples: int
    shard_size: int
    fingerprint: str = ""
    shards: tuple[ShardRecord, ...] = ()

    def with_shard(self, shard: ShardRecord) -> "PackRecord":
        return replace(self, shards=(*self.shards, shard))

    def write(self, folder: Path) -> None:
        write_atomically(folder / NAME, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())


def read_record(folder: Path) -> PackRecord | None:
    """Return the record of a folder, None without one. DataError for a file that `refract pack` did not write."""
    file = folder / NAME
    try:
        return parsed_record(read_file(file), str(file))
    except FileNotFoundError:
        return None


def parsed_record(content: bytes, where: str) -> PackRecord:
    """Return the record with this JSON. where: its path or URL, for errors. DataError for a file that `refract pack` did not write."""
    try:
        values = json.loads(content)
        shards = tuple(ShardRecord(**shard) for shard in values.pop("shards"))
        return PackRecord(**values | {"labels": tuple(map(str, values["labels"])), "shards": shards})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: is not a file of `refract pack` ({error}); pack again into another folder"
        ) from error


def is_pack(folder: Path) -> bool:
    """Return whether a folder has a `pack.json`. Only this distinguishes tars without images from class folders."""
    return (folder / NAME).is_file()


def complete_record(folder: Path) -> PackRecord | None:
    """Return the record of a folder, None without one. DataError as `check_complete`."""
    record = read_record(folder)
    if record is not None:
        files = [folder / shard.file for shard in record.shards]
        check_complete(record, {file.name: file.stat().st_size for file in files if file.is_file()}, str(folder))
    return record


def check_complete(record: PackRecord, sizes: Mapping[str, int], folder: str) -> None:
    """Raise DataError if a shard is missing or has another size, as after a cut copy. sizes: bytes of the files; folder: path or URL."""
    for shard in record.shards:
        size = sizes.get(shard.file)
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size:,} of {shard.bytes:,} bytes"
            raise DataError(f"{folder}/{shard.file}: {state}, according to {folder}/{NAME}; copy the pack again")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. OSError."""
    sha = hashlib.sha256()
    with open_file(file) as opened:
        while data := opened.read(_BLOCK):
            sha.update(data)
    return sha.hexdigest()
