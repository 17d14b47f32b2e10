"""Convert probabilities to rows of a Parquet file: one row per input row, with its prediction or an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refract.models.prediction import confidences, predicted_labels
from refract.pipeline.files import printable
from refract.pipeline.inference.batch.listing import Shard

if TYPE_CHECKING:
    import pyarrow as pa

    from refract.models.bundle.bundle import BundleInfo
    from refract.pipeline.inference.scoring import Scored

KEY, ABOUT = b"refract.key", b"refract"
"""Keys of a file's metadata: the digest of all that the rows depend on, and a description of the scoring as JSON."""


def schema_of(
    info: BundleInfo,
    *,
    texts: bool,
    truths: bool,
    embeddings: bool = False,
    familiarity: bool = False,
    key: str,
    about: dict[str, Any],
) -> pa.Schema:
    """Return the schema of the file. texts, truths, embeddings, familiarity: whether it has the columns text, truth, embedding and
    familiarity."""
    import pyarrow as pa

    columns = [("row", pa.int64()), ("path", pa.string())]
    columns += [("text", pa.string())] if texts else []
    columns += [("label", pa.string())]
    columns += [("labels", pa.list_(pa.string()))] if info.task == "multilabel" else []
    columns += [("confidence", pa.float32()), ("probabilities", pa.list_(pa.float32()))]
    columns += [("embedding", pa.list_(pa.float32()))] if embeddings else []
    columns += [("familiarity", pa.float32())] if familiarity else []
    if info.hierarchy is not None:
        columns += [
            ("backed_off", pa.string()),
            ("backed_off_confidence", pa.float32()),
            ("backed_off_level", pa.int32()),
        ]
    columns += [("abstain", pa.bool_()), ("error", pa.string())]
    columns += [("truth", pa.string())] if truths else []
    return pa.schema(columns, {KEY: key.encode(), ABOUT: json.dumps(about, ensure_ascii=False).encode()})


def table_of(shard: Shard, answers: Sequence[Scored | str], info: BundleInfo, schema: pa.Schema) -> pa.Table:
    """Build the table of a shard. answers: for each row its outputs, or an error message."""
    import pyarrow as pa

    rows = [answer for answer in answers if not isinstance(answer, str)]
    scored = np.array([not isinstance(answer, str) for answer in answers])
    probabilities = np.stack([row.probabilities for row in rows] or [_placeholder(info)])
    # The first of equal probabilities, as in `refract.models.prediction.prediction`.
    best = probabilities.argmax(1)
    confidence = probabilities[np.arange(len(probabilities)), best]
    index = np.maximum(scored.cumsum() - 1, 0)  # of each row in `probabilities`
    columns: dict[str, Any] = {
        "row": np.arange(shard.start, shard.start + len(shard.rows)),
        "path": [None if row.path is None else printable(row.path) for row in shard.rows],
        "text": [row.text for row in shard.rows],
        "label": [info.labels[best[i]] if ok else None for i, ok in zip(index, scored, strict=True)],
        "confidence": pa.array(confidence[index], mask=~scored),
        "probabilities": _lists(probabilities, scored),
        "error": [None if ok else str(answer) for answer, ok in zip(answers, scored, strict=True)],
        "truth": [row.truth for row in shard.rows],
    }
    if "familiarity" in schema.names:
        familiarities = np.array([row.familiarity for row in rows] or [np.nan], np.float32)
        columns["familiarity"] = pa.array(familiarities[index], mask=~scored | np.isnan(familiarities[index]))
    if "embedding" in schema.names:
        embeddings = [row.embedding for row in rows if row.embedding is not None]
        columns["embedding"] = _lists(np.stack(embeddings or [np.zeros(0, np.float32)]), scored)
    if info.task == "multilabel":
        predicted = predicted_labels(probabilities, info.task, info.thresholds)
        names = [[info.labels[i] for i in np.flatnonzero(row)] for row in predicted]
        columns["labels"] = [names[i] if ok else None for i, ok in zip(index, scored, strict=True)]
    below = info.abstain_below
    if info.hierarchy is not None:
        back_offs = info.back_offs(probabilities)
        placed = [back_offs[i] if ok else None for i, ok in zip(index, scored, strict=True)]
        for name, field in (("", "label"), ("_confidence", "confidence"), ("_level", "level")):
            columns[f"backed_off{name}"] = [None if node is None else getattr(node, field) for node in placed]
    if below is None:
        columns["abstain"] = [None] * len(answers)
    else:  # in double precision, as `refract.models.prediction.prediction`
        unsure = (confidences(probabilities, info.task, info.thresholds).astype(float) < below) | (below >= 1)
        columns["abstain"] = pa.array(unsure[index], mask=~scored)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _lists(values: np.ndarray, scored: np.ndarray) -> pa.Array:
    """Return a list for each scored row and null for the others, without a Python object for each number."""
    import pyarrow as pa

    ends = np.concatenate([[0], scored.cumsum() * values.shape[1]]).astype(np.int32)
    flat = pa.array(values[: scored.sum()].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(ends), flat, mask=pa.array(~scored))


def _placeholder(info: BundleInfo) -> np.ndarray:
    """Return a row of zeros, so that a shard without any prediction has an array too."""
    return np.zeros(len(info.labels), np.float32)
