"""Read the texts of a manifest, without images and labels."""

from pathlib import Path

from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.tables import is_table, read_table


def texts_of(file: Path, split: str) -> list[str]:
    """Return the texts that are not blank, in the manifest's order.

    split: `train` (all texts of a manifest without splits) or `all`. DataError for another kind of file, or a table without texts.
    """
    if not is_table(file):
        raise DataError(f"{file}: expected a CSV, TSV or Parquet file with a column text")
    table = read_table(file)
    if "text" not in table.columns:
        raise table.lacks("text", needed="text")
    splits = table.texts("split")
    wanted = split if split != "all" and any(splits) else ""
    texts = [
        text
        for text, row_split in zip(table.texts("text"), splits, strict=True)
        if trimmed(text) and (not wanted or row_split == wanted)
    ]
    if not texts:
        raise DataError(f"{file}: no texts in the split {split}")
    return texts
