"""A folder that Hugging Face `datasets` wrote with `save_to_disk`: of one data set, or of one for each split."""

import json
from pathlib import Path
from typing import Any, ClassVar

from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.folders import split_of
from refract.pipeline.data.sources.shards import Shard, Shards
from refract.pipeline.data.sources.source import Rows, Source
from refract.pipeline.data.sources.table_images import rows_of

SPLITS, STATE = "dataset_dict.json", "state.json"


class SavedDatasetSource(Source):
    accepts: ClassVar[str] = ""

    @classmethod
    def recognises(cls, name: str) -> bool:
        folder = Path(name)
        return (folder / SPLITS).is_file() or ((folder / STATE).is_file() and (folder / "dataset_info.json").is_file())

    def rows(self, *, labelled: bool) -> Rows:
        root = Path(self.name)
        if not (root / SPLITS).is_file():
            return rows_of(self.name, Shards(root, [Shard(file, "") for file in _files(root)]), labelled=labelled)
        splits = _list(root / SPLITS, "splits")
        unknown = [split for split in splits if not split_of(str(split))]
        if unknown:
            raise DataError(
                f"{root / SPLITS}: the split {unknown[0]!r} is not train, validation or test; use {root / str(unknown[0])}, or rename it"
            )
        shards = [Shard(f"{split}/{file}", split_of(split)) for split in splits for file in _files(root / split)]
        return rows_of(self.name, Shards(root, shards), labelled=labelled)


def _files(folder: Path) -> list[str]:
    """Return the Arrow files of a data set, in their order. DataError for names outside the folder, and for selected rows."""
    state = _json(folder / STATE)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: its rows are a selection; call `flatten_indices()` before `save_to_disk`")
    entries = _list(folder / STATE, "_data_files")
    files = [str(entry.get("filename", "")) if isinstance(entry, dict) else "" for entry in entries]
    odd = [file for file in files if "/" in file or not file.endswith(".arrow")]
    if odd or not files:
        raise DataError(f"{folder / STATE}: names {odd[0] if odd else 'no file'!r}, not an .arrow file in the folder")
    return files


def _list(file: Path, key: str) -> list[Any]:
    content = _json(file).get(key, [])
    if not isinstance(content, list):
        raise DataError(f"{file}: {key!r} is not a list; save the data set again")
    return content


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); save the data set again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: is not a JSON object; save the data set again")
    return content
