"""List the images of files, folders, archives and URLs that a command names."""

from collections.abc import Sequence
from pathlib import Path

from refract.augment.image_files import is_image
from refract.pipeline.data.archives.archive import archive_path
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources import open_source
from refract.pipeline.data.sources.folders import no_images
from refract.remote.address import path_or_url


def listed_images(paths: Sequence[Path | str]) -> list[Path | str]:
    """Return the files, and all images below the folders and in the archives. DataError if no path exists or a folder has no image."""
    in_archive = [isinstance(path, str) or archive_path(str(path)) is not None for path in paths]
    if not any(inside or Path(path).exists() for path, inside in zip(paths, in_archive, strict=True)):
        raise DataError(f"{paths[0]}: no such file or folder")
    files: list[Path | str] = []
    for path, inside in zip(paths, in_archive, strict=True):
        if Path(path).is_dir() or (inside and not is_image(str(path))):
            rows = open_source(path).rows(labelled=False)
            if not len(rows):
                raise no_images(path)
            files += (path_or_url(rows.file(row)) for row in range(len(rows)))
        else:  # a missing file is reported later, as an unreadable one
            files.append(path)
    return files
