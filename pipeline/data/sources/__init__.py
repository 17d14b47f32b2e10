"""Data sources: a folder, an archive, a table, or an embedded data set. A further kind is a file here and an entry in SOURCES."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from refract.augment.image_files import is_image
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.archive import ArchiveSource
from refract.pipeline.data.sources.custom import fetched
from refract.pipeline.data.sources.digits import DigitsSource
from refract.pipeline.data.sources.image_folder import FolderSource
from refract.pipeline.data.sources.manifest_table import TableSource
from refract.pipeline.data.sources.remote import RemoteFolderSource, RemoteTableSource
from refract.pipeline.data.sources.saved_dataset import SavedDatasetSource
from refract.pipeline.data.sources.source import Source
from refract.pipeline.data.sources.table_images import ParquetImagesSource
from refract.pipeline.data.sources.webdataset import WebDatasetSource
from refract.remote.address import checked, is_remote

SOURCES: Mapping[str, type[Source]] = MappingProxyType({
    "saved": SavedDatasetSource, "parquet": ParquetImagesSource, "webdataset": WebDatasetSource, "folder": FolderSource,
    "archive": ArchiveSource, "table": TableSource, "remote table": RemoteTableSource, "remote": RemoteFolderSource,
    "digits": DigitsSource,
})  # fmt: skip
"""Kind → class; the first that recognises a name opens it."""


def open_source(name: str | Path, *, embedded: bool = True) -> Source:
    """Return the source of a name. embedded: accept data sets without files. DataError for a name that no kind recognises."""
    name = fetched(name)
    if is_remote(str(name)):
        name = checked(str(name))
    kinds = [kind for kind in SOURCES.values() if embedded or not kind.embedded]
    for kind in kinds:
        if kind.recognises(str(name)):
            return kind(str(name))
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{path}: no such folder or file (current folder: {Path.cwd()})")
    *others, last = [kind.accepts for kind in kinds if kind.accepts]
    comma = "," if len(others) > 1 else ""
    hint = "; `refract predict` takes single images" if is_image(path.name) else ""
    raise DataError(f"{path}: got a {path.suffix or 'plain'} file; expected {', '.join(others)}{comma} or {last}{hint}")
