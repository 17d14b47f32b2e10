"""The texts of a manifest, for what needs neither pictures nor labels."""

from pathlib import Path

from models.texts.tokens import trimmed
from pipeline.data.manifest import DataError, read_table


def texts_of(file: Path, split: str) -> list[str]:
    """Those that are not blank, in the manifest's order. split: `train`, of a manifest without splits all, or `all`. DataError."""
    if file.suffix.lower() not in (".csv", ".parquet") or not file.is_file():
        raise DataError(f"{file}: expected a CSV or Parquet file with a column text")
    table = read_table(file)
    if "text" not in table.columns:
        raise DataError(f"{file}: no column 'text'; it has {', '.join(map(str, table.columns))}")
    if split != "all" and "split" in table.columns and (table["split"].str.strip() != "").any():
        table = table[table["split"].str.strip() == split]
    texts = [text for text in table["text"] if trimmed(text)]
    if not texts:
        raise DataError(f"{file}: has no texts in the split {split}")
    return texts
