"""Class folders in a zip or tar: `photos.zip`, or the folder `photos.zip/2024` in it."""

from typing import ClassVar

from refract.pipeline.data.archives.archive import COMPRESSED, TARS, ZIPS, archive_path, index_of_archive, suffix_of
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.folders import split_of
from refract.pipeline.data.sources.image_folder import image_rows, labelled_rows, one_class_per_image
from refract.pipeline.data.sources.listed_files import ListedFiles
from refract.pipeline.data.sources.source import Rows, Source
from refract.remote.address import is_remote

SUFFIXES = (*ZIPS, *TARS, *COMPRESSED)


class ArchiveSource(Source):
    accepts: ClassVar[str] = "a .zip, .tar or .tar.gz archive"

    @classmethod
    def recognises(cls, name: str) -> bool:
        where = archive_path(name)
        return where is not None and suffix_of(where.archive) in SUFFIXES

    def rows(self, *, labelled: bool) -> Rows:
        """Read the members as the files of a folder, in the same order."""
        files, root = listed(self.name)
        if not labelled:
            return image_rows(self.name, root, files)
        inner = _only_folder(files, root)
        note = (f"the classes are read from {inner}, the only folder in {root}",) if inner != root else ()
        return labelled_rows(self.name, inner, files, note)

    def check_task(self, task: str) -> None:
        if task == "multilabel":
            raise one_class_per_image(self.name)


def listed(name: str) -> tuple[ListedFiles, str]:
    """Return (the members of the archive that a path leads into, the path). DataError for an archive that cannot be read."""
    where = archive_path(name)
    assert where is not None
    try:
        names = index_of_archive(where.archive).names
    except OSError as error:
        raise unreadable_archive(error, where.archive) from error
    files, root = ListedFiles(where.archive, names), name.rstrip("/")
    try:
        files.list_folder(root)
    except OSError as error:
        raise DataError(f"{name}: no such folder in the archive {where.archive}") from error
    return files, root


def unreadable_archive(error: OSError, archive: str) -> DataError:
    """Return the error for an archive that cannot be opened or unpacked."""
    if isinstance(error, DataError):
        return error
    remedy = "check the URL" if is_remote(archive) else "make it readable, or copy it again"
    return DataError(f"{archive}: cannot be read ({error.strerror or error}); {remedy}")


def _only_folder(files: ListedFiles, root: str) -> str:
    """Return the folder with the classes: below folders that contain nothing else, as `zip -r photos.zip photos` writes."""
    folder = root
    while True:
        level = files.list_folder(folder)
        if level.images or len(level.folders) != 1 or split_of(level.folders[0].rpartition("/")[2]):
            return folder
        if not files.list_folder(level.folders[0]).folders:  # one class
            return folder
        folder = level.folders[0]
