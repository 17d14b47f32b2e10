"""Folders and tables at URLs: their files stay remote, and are fetched into the cache when they are read."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from refract.augment.image_files import is_hidden, is_image
from refract.pipeline.data import storage
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.pack_record import NAME, PackRecord, check_complete, parsed_record
from refract.pipeline.data.sources import table_images, webdataset
from refract.pipeline.data.sources.folders import no_images
from refract.pipeline.data.sources.image_folder import image_rows, labelled_rows, one_class_per_image
from refract.pipeline.data.sources.listed_files import ListedFiles
from refract.pipeline.data.sources.manifest_table import TableSource
from refract.pipeline.data.sources.shards import Shard, Shards, with_splits
from refract.pipeline.data.sources.source import Rows, Source
from refract.pipeline.data.sources.tables import TABLES
from refract.remote.address import AddressError, is_remote, joined

_FOLDERS = ("", "data/")
"""Folders of a data set in which Parquet files and tars are found."""


class RemoteTableSource(Source):
    accepts: ClassVar[str] = ""

    @classmethod
    def recognises(cls, name: str) -> bool:
        return is_remote(name) and name.lower().endswith(TABLES)

    def rows(self, *, labelled: bool) -> Rows:
        """Read the table as a local one. Its paths are URLs, or relative to the URL of the table."""
        try:
            content = storage.read(self.name)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror or error}); check the URL") from error
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / self.name.rpartition("/")[2]
            file.write_bytes(content)
            try:
                rows = TableSource(str(file)).rows(labelled=labelled)
            except DataError as error:
                raise DataError(str(error).replace(str(file), self.name)) from error
        base = self.name.rpartition("/")[0]
        paths = [self._url(base, path, row) if path.strip() else path for row, path in enumerate(rows.paths)]
        return replace(rows, source=self.name, paths=paths, root=None)

    def _url(self, base: str, path: str, row: int) -> str:
        try:
            return joined(base, path)
        except AddressError as error:
            raise DataError(f"{self.name}, row {row + 1}, column 'path': {error}") from error


class RemoteFolderSource(Source):
    accepts: ClassVar[str] = ""

    @classmethod
    def recognises(cls, name: str) -> bool:
        return is_remote(name)

    @cached_property
    def _names(self) -> list[str]:
        from refract.pipeline.data.remote_files import list_files

        names = [item.url.removeprefix(f"{self.name}/") for item in list_files(self.name)]
        odd = next((name for name in names if {"", ".", ".."} & {*name.split("/")}), None)
        if odd is not None:
            raise DataError(f"{self.name}/{odd}: the name has an empty part, `.` or `..`; rename the file")
        return names

    def rows(self, *, labelled: bool) -> Rows:
        """Read a folder of images, of Parquet files with images, or of WebDataset tars, by the names of its files."""
        names = self._names
        if not names:
            raise DataError(f"{self.name}: no such folder or file, or it is empty")
        if shards := self._shards(names, ".parquet"):
            if table_images.has_images(shards.files[0].path):
                return table_images.rows_of(self.name, shards, labelled=labelled)
        elif (shards := self._shards(names, ".tar")) and NAME in names:
            return replace(
                webdataset.rows_of(self.name, shards, labelled=labelled), classes=self._complete_record().labels
            )
        elif shards and webdataset.has_samples(shards.files[0].path):
            return webdataset.rows_of(self.name, shards, labelled=labelled)
        files = ListedFiles(self.name, names)
        rows = labelled_rows(self.name, self.name, files) if labelled else image_rows(self.name, self.name, files)
        if not len(rows):
            raise no_images(self.name)
        return rows

    def _complete_record(self) -> PackRecord:
        """Return the record of the pack at the URL. DataError if it lacks a shard."""
        from refract.pipeline.data.remote_files import list_files

        url = f"{self.name}/{NAME}"
        record = parsed_record(storage.read(url), url)
        sizes = {item.url.removeprefix(f"{self.name}/"): item.size for item in list_files(self.name)}
        check_complete(record, sizes, self.name)
        return record

    def check_task(self, task: str) -> None:
        if task == "multilabel" and not (self._shards(self._names, ".parquet") or self._shards(self._names, ".tar")):
            raise one_class_per_image(self.name)

    def _shards(self, names: Sequence[str], suffix: str) -> Shards | None:
        """Return the files with a suffix, if the folder has no images and they are not in further folders; else None."""
        visible = [name for name in names if not any(map(is_hidden, name.split("/")))]
        files = [name for name in visible if name.lower().endswith(suffix)]
        if not files or any(map(is_image, visible)):
            return None
        if any(name[: name.rfind("/") + 1] not in _FOLDERS for name in files):
            return None
        shards = with_splits(self.name, files)
        return Shards(None, [Shard(f"{self.name}/{shard.path}", shard.split) for shard in shards])
