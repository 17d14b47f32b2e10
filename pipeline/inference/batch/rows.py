"""Probabilities as rows of a Parquet file: one row for each that was asked, with its answer or the reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refract.models.prediction import confidences, predicted_labels
from refract.pipeline.inference.batch.listing import Shard

if TYPE_CHECKING:
    import pyarrow as pa

    from refract.models.bundle.bundle import BundleInfo

KEY, ABOUT = b"refract.key", b"refract"
"""In a file's metadata: what its rows depend on, as one digest; what is told of them, as JSON."""


def schema_of(info: BundleInfo, *, texts: bool, truths: bool, key: str, about: dict[str, Any]) -> pa.Schema:
    """texts, truths: whether there are such columns."""
    import pyarrow as pa

    columns = [("row", pa.int64()), ("path", pa.string())]
    columns += [("text", pa.string())] if texts else []
    columns += [("label", pa.string())]
    columns += [("labels", pa.list_(pa.string()))] if info.task == "multilabel" else []
    columns += [("confidence", pa.float32()), ("probabilities", pa.list_(pa.float32()))]
    columns += [("abstain", pa.bool_()), ("error", pa.string())]
    columns += [("truth", pa.string())] if truths else []
    return pa.schema(columns, {KEY: key.encode(), ABOUT: json.dumps(about, ensure_ascii=False).encode()})


def table_of(shard: Shard, answers: Sequence[np.ndarray | str], info: BundleInfo, schema: pa.Schema) -> pa.Table:
    """answers: one a row, its probabilities as float32 (C,) or the reason why it has none."""
    import pyarrow as pa

    whole = np.array([isinstance(answer, np.ndarray) for answer in answers])
    found = np.stack([answer for answer in answers if isinstance(answer, np.ndarray)] or [_none(info)])
    # The first of equal probabilities, as in `refract.models.prediction.prediction`.
    best = found.argmax(1)
    confidence = found[np.arange(len(found)), best]
    place = np.maximum(whole.cumsum() - 1, 0)  # of a row's answer in `found`
    columns: dict[str, Any] = {
        "row": np.arange(shard.start, shard.start + len(shard.rows)),
        "path": [None if row.path is None else _told(row.path) for row in shard.rows],
        "text": [row.text for row in shard.rows],
        "label": [info.labels[best[at]] if ok else None for at, ok in zip(place, whole, strict=True)],
        "confidence": pa.array(confidence[place], mask=~whole),
        "probabilities": _lists(found, whole),
        "error": [None if ok else str(answer) for answer, ok in zip(answers, whole, strict=True)],
        "truth": [row.truth for row in shard.rows],
    }
    if info.task == "multilabel":
        reached = predicted_labels(found, info.task, info.thresholds)
        names = [[info.labels[i] for i in np.flatnonzero(row)] for row in reached]
        columns["labels"] = [names[at] if ok else None for at, ok in zip(place, whole, strict=True)]
    below = info.abstain_below
    if below is None:
        columns["abstain"] = [None] * len(answers)
    else:  # in double precision, as `refract.models.prediction.prediction`
        unsure = (confidences(found, info.task, info.thresholds).astype(float) < below) | (below >= 1)
        columns["abstain"] = pa.array(unsure[place], mask=~whole)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _lists(found: np.ndarray, whole: np.ndarray) -> pa.Array:
    """A list for each row that has an answer, null for the others, without a Python object for each number."""
    import pyarrow as pa

    ends = np.concatenate([[0], whole.cumsum() * found.shape[1]]).astype(np.int32)
    values = pa.array(found[: whole.sum()].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(ends), values, mask=pa.array(~whole))


def _none(info: BundleInfo) -> np.ndarray:
    return np.zeros(len(info.labels), np.float32)


def _told(path: str) -> str:
    """As text: a byte of a name that is none is written as \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
