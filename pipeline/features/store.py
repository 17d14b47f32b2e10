"""A folder of embeddings, so that no command embeds an image twice with the same model.

`FOLDER/KEY/` holds the embeddings of one model. KEY is the first part of the model's key, the SHA-256 of its weights below the head, its
network and its preprocessing, see `refract.pipeline.features.model`. The files:
- `model.json`: the key, and the values from which `refract search` builds the model again
- `vectors-*.parquet`: embeddings, float16, with the content's SHA-256; a row with `policy` belongs to an augmented view
- `samples-*.parquet`: for each embedded source, its samples at the last run: content, path, labels, split and text

Files are written atomically, and vectors never change, so that a killed process loses at most the shard that it computes. Embeddings are
found by content: a moved or relabelled image needs no new embedding, and a changed image gets one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refract.pipeline.data.errors import DataError
from refract.pipeline.files import printable, read_file, write_atomically, written_atomically

if TYPE_CHECKING:
    import pyarrow as pa

NAME_DIGITS = 16
"""Hexadecimal digits of a digest in file names."""

LARGEST = float(np.finfo(np.float16).max)


class View(NamedTuple):
    """The pixels that were embedded: those of evaluation, or an augmented view.

    policy: digest of the policy and its seed, "" for the preprocessing of evaluation; epoch, sample: `epoch` and `index` of the draw, see
    `refract.augment.Augmenter`, -1 without a policy.
    """

    policy: str = ""
    epoch: int = -1
    sample: int = -1


PLAIN = View()


class Key(NamedTuple):
    """Identity of an embedding in the store of one model. content: see `content_of`."""

    content: str
    view: View = PLAIN


@dataclass(frozen=True)
class StoredSample:
    """A sample of an embedded source. labels: class names, empty without labels."""

    content: str
    path: str
    labels: tuple[str, ...] = ()
    split: str = ""
    text: str = ""


def content_of(data: bytes, text: str = "") -> str:
    """Return the SHA-256 of a sample's encoded image, and of its text if the model reads texts, in hexadecimal."""
    digest = hashlib.sha256(data)
    if text:
        digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class FeatureStore:
    """The embeddings of one model.

    DataError for a file of the store that cannot be read; the error names the file, which may be deleted: its embeddings are then computed
    again.
    """

    def __init__(self, folder: Path, key: str, model: Mapping[str, Any]) -> None:
        """Open the model's folder, and create it if it is missing. model: values that build the model again, for `model.json`."""
        self.folder = folder / key[:NAME_DIGITS]
        self.key = key
        self._places: dict[Key, tuple[Path, int]] = {}
        self._read: set[Path] = set()
        record = self.folder / "model.json"
        if not record.is_file():
            write_atomically(record, json.dumps({"key": key, "model": dict(model)}, indent=1).encode())

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Read the keys of shards that were written since the last call, also by other processes."""
        for file in sorted(set(self.folder.glob("vectors-*.parquet")) - self._read):
            columns = _columns(file, ["sha256", "policy", "epoch", "index"])
            for row, (content, *view) in enumerate(zip(*columns, strict=True)):
                self._places.setdefault(Key(content, View(*view)), (file, row))
            self._read.add(file)

    def vectors(self, keys: Sequence[Key]) -> np.ndarray:
        """Return the embeddings of the keys, float32 (N, D), N > 0. KeyError for a key that the store lacks."""
        result: np.ndarray | None = None
        for file, places in self.rows(keys).items():
            stored = self.matrix(file)
            if result is None:
                result = np.empty((len(keys), stored.shape[1]), np.float32)
            positions, rows = np.array(places).T
            result[positions] = stored[rows]
        if result is None:
            raise ValueError("keys is empty: expected at least one")
        return result

    def rows(self, keys: Sequence[Key]) -> dict[Path, list[tuple[int, int]]]:
        """Return shard → [(position in `keys`, row in the shard)]. KeyError for a key that the store lacks."""
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            file, row = self._places[key]
            by_file.setdefault(file, []).append((position, row))
        return by_file

    def matrix(self, file: Path) -> np.ndarray:
        """Return all embeddings of a shard, float16 (N, D)."""
        column = _table(file, ["vector"])["vector"].combine_chunks()
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), -1)

    def add_samples(self, source: str, samples: Iterable[StoredSample]) -> None:
        """Replace the list of samples of `source`, the absolute path of the data or another name of it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = list(samples)
        table = pa.table(
            {
                "sha256": pa.array([row.content for row in rows], pa.string()),
                "path": pa.array([printable(row.path) for row in rows], pa.string()),
                "labels": pa.array([list(row.labels) for row in rows], pa.list_(pa.string())),
                "split": pa.array([row.split for row in rows], pa.string()),
                "text": pa.array([row.text for row in rows], pa.string()),
            }
        )
        name = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:NAME_DIGITS]
        with written_atomically(self.folder / f"samples-{name}.parquet") as file:
            pq.write_table(table, file)

    def samples(self) -> list[StoredSample]:
        """Return the samples of all sources, each path once."""
        samples: dict[tuple[str, str], StoredSample] = {}
        for file in sorted(self.folder.glob("samples-*.parquet"), key=lambda file: file.stat().st_mtime):
            for content, path, labels, split, text in zip(
                *_columns(file, ["sha256", "path", "labels", "split", "text"]), strict=True
            ):
                samples[path, text] = StoredSample(content, path, tuple(labels), split, text)
        return list(samples.values())


def write_vectors(folder: Path, keys: Sequence[Key], samples: Sequence[StoredSample], vectors: np.ndarray) -> None:
    """Write one shard. folder: the folder of the model; vectors: float (N, D). ValueError for values that float16 cannot hold."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (np.abs(vectors) <= LARGEST).all():
        raise ValueError(f"an embedding has a value beyond ±{LARGEST:.0f}, the range of float16, or NaN")
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).reshape(-1), pa.float16())
    table = pa.table(
        {
            "sha256": pa.array([key.content for key in keys], pa.string()),
            "path": pa.array([printable(sample.path) for sample in samples], pa.string()),
            "labels": pa.array([list(sample.labels) for sample in samples], pa.list_(pa.string())),
            "split": pa.array([sample.split for sample in samples], pa.string()),
            "policy": pa.array([key.view.policy for key in keys], pa.string()),
            "epoch": pa.array([key.view.epoch for key in keys], pa.int32()),
            "index": pa.array([key.view.sample for key in keys], pa.int64()),
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
    name = hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()[:NAME_DIGITS]
    with written_atomically(folder / f"vectors-{name}.parquet") as file:
        pq.write_table(table, file, use_dictionary=["labels.list.element", "split", "policy"], compression="none")


def stored_models(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, values that build the model) of each model in a store. DataError for a folder that is not a store."""
    records = sorted(folder.glob("*/model.json"))
    if not records:
        raise DataError(
            f"{folder}: is not a feature store; write one with `refract embed DATA --model MODEL -o {folder}`"
        )
    for record in records:
        try:
            stored = json.loads(read_file(record))
            yield str(stored["key"]), dict(stored["model"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{record}: cannot be read ({error}); delete the folder {record.parent} and embed again"
            ) from error


def _columns(file: Path, names: list[str]) -> list[list[Any]]:
    table = _table(file, names)
    return [table[name].to_pylist() for name in names]


def _table(file: Path, names: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # `read_table` would import pyarrow.dataset first, which takes longer than most files.
        with pq.ParquetFile(file) as opened:
            return opened.read(columns=names)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise DataError(
            f"{file}: cannot be read ({reason}); delete it: its embeddings are then computed again"
        ) from error
