"""The texts of a manifest, for what needs neither images nor labels."""

from pathlib import Path

from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.tables import is_table, read_table


def texts_of(file: Path, split: str) -> list[str]:
    """Those that are not blank, in the manifest's order. split: `train`, of a manifest without splits all, or `all`. DataError."""
    if not is_table(file):
        raise DataError(f"{file}: expected a CSV, TSV or Parquet file with a column text")
    table = read_table(file)
    if "text" not in table.columns:
        raise table.lacks("text", needed="text")
    splits = table.texts("split")
    wanted = split if split != "all" and any(splits) else ""
    texts = [
        text
        for text, own in zip(table.texts("text"), splits, strict=True)
        if trimmed(text) and (not wanted or own == wanted)
    ]
    if not texts:
        raise DataError(f"{file}: has no texts in the split {split}")
    return texts
