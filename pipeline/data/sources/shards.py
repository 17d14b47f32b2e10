"""Data sets in several files, such as `train-{000000..000009}.tar`, and the split in the name of each file."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from refract.augment.image_files import is_hidden, is_image
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.folders import split_of
from refract.remote.address import is_remote

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST = 100_000
"""The largest number of files that a pattern may name."""


class Shard(NamedTuple):
    """path: of the file, relative to the folder of the data set; split: train, val or test by the name of the file, or ""."""

    path: str
    split: str


class Shards(NamedTuple):
    """folder: of the relative paths, None for URLs; files: in their order."""

    folder: Path | None
    files: Sequence[Shard]

    def file(self, shard: Shard) -> str:
        """Return the path or URL of a file."""
        return shard.path if self.folder is None else str(self.folder / shard.path)


def has_range(name: str) -> bool:
    """Return whether a name is a pattern such as `{000000..000009}.tar`."""
    return _RANGE.search(name) is not None


def shards_of(name: str, suffix: str) -> Shards:
    """Return the files of a pattern, a file, a URL, or a folder with files of the suffix. DataError as `shards_of_pattern`."""
    if has_range(name):
        return shards_of_pattern(name)
    if is_remote(name):
        return Shards(None, [Shard(name, "")])
    path = Path(name)
    shards = Shards(path.parent, [Shard(path.name, "")]) if path.is_file() else shards_of_folder(name, suffix)
    assert shards is not None  # the source recognises no other name
    return shards


def shards_of_pattern(name: str) -> Shards:
    """Return the files of a pattern with one or more ranges `{FIRST..LAST}`. DataError for an invalid range and for missing files."""
    names = [name]
    while has_range(names[0]):
        match = _RANGE.search(names[0])
        assert match is not None
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + MOST:
            raise DataError(f"{name}: {match[0]} is not a range; write {{000000..000009}}, of at most {MOST:,} numbers")
        numbers = [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
        names = [_RANGE.sub(number, one, count=1) for one in names for number in numbers]
        if len(names) > MOST:
            raise DataError(f"{name}: names more than {MOST:,} files; use a smaller range")
    if is_remote(name):
        return Shards(None, with_splits(name, names))
    missing = [one for one in names if not Path(one).is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file ({len(missing)} of the {len(names)} files of {name} are missing)")
    folder = Path(name.partition("{")[0] + "_").parent
    return Shards(folder, with_splits(name, [str(Path(one).relative_to(folder)) for one in names]))


def shards_of_folder(name: str, suffix: str) -> Shards | None:
    """Return the files with a suffix in a folder, or in its folder `data`, if it has no other folders and no images; else None."""
    root = Path(name)
    files = _files(root, suffix, only="data")
    if files == []:
        root = root / "data"
        files = _files(root, suffix)
    return Shards(root, with_splits(name, sorted(files))) if files else None


def _files(folder: Path, suffix: str, only: str = "") -> list[str] | None:
    """Return the names of the files with a suffix. None for a folder that is missing, or has images or a folder other than `only`."""
    files, inner = list[str](), False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if is_image(entry.name) or (entry.is_dir() and entry.name != only):
                    return None  # at the first entry of most folders, however many they have
                inner = inner or entry.is_dir()
                if entry.name.lower().endswith(suffix):
                    files.append(entry.name)
    except OSError:
        return None  # which is reported when the folder is read
    return None if inner and files else files


def with_splits(name: str, files: Sequence[str]) -> list[Shard]:
    """Return the shards with the splits in their names. DataError if only some names have one."""
    splits = [_split_in(file) for file in files]
    if any(splits) and not all(splits):
        odd = files[splits.index("")]
        raise DataError(
            f"{name}: {odd} names no split, but {files[next(i for i, split in enumerate(splits) if split)]} does; "
            "start each name with train, validation or test, or none"
        )
    return [Shard(file, split) for file, split in zip(files, splits, strict=True)]


def _split_in(file: str) -> str:
    """Return the split at the start of a file name: `train-00000-of-00002.parquet` → train."""
    return split_of(re.split(r"[-_.]", file.rpartition("/")[2], maxsplit=1)[0])
