"""A folder of images as a source."""

from pathlib import Path
from typing import ClassVar

from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.folders import LOCAL, Files, read_folder, unreadable
from refract.pipeline.data.sources.source import Rows, Source


class FolderSource(Source):
    accepts: ClassVar[str] = "a folder"

    @classmethod
    def recognises(cls, name: str) -> bool:
        return Path(name).is_dir()

    def rows(self, *, labelled: bool) -> Rows:
        root = Path(self.name)
        return labelled_rows(str(root), str(root)) if labelled else image_rows(str(root), str(root))

    def check_task(self, task: str) -> None:
        if task == "multilabel":
            raise one_class_per_image(self.name)


def labelled_rows(source: str, root: str, files: Files = LOCAL, notes: tuple[str, ...] = ()) -> Rows:
    """Read CLASS/… or SPLIT/CLASS/…: class by class, each in the order of the paths.

    source: as the user named it; root: the folder to read; notes: further notes for the user.
    """
    folder = read_folder(root, files)
    images = [(path, one.label, one.split) for one in folder.classes for path in one.images]
    paths, labels, splits = zip(*images, strict=True) if images else ((), (), ())
    return Rows(
        source,
        paths,
        labels=labels,
        splits=splits,
        classes=tuple(one.label for one in folder.classes),
        folder=folder.root,
        empty=tuple(one.path for one in folder.classes if not one.images),
        loose=tuple(folder.loose),
        skipped=folder.skipped,
        notes=(*notes, *folder.notes),
    )


def image_rows(source: str, root: str, files: Files = LOCAL) -> Rows:
    """List the images at any depth, in the order of the paths; broken links are among the skipped entries."""
    try:
        tree = files.walk(root)
    except OSError as error:
        raise unreadable(error, root) from error
    return Rows(source, tree.images, folder=root, skipped=tree.skipped)


def one_class_per_image(source: str) -> DataError:
    """Return the error for `data.task: multilabel` with class folders."""
    return DataError(
        f"{source.rstrip('/')}: data.task is multilabel, but a folder gives each image one class; use a manifest with labels such as "
        "`cat;dog`"
    )
