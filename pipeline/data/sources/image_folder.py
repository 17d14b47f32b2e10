"""A folder of images as a source."""

from pathlib import Path
from typing import ClassVar

from refract.augment.image_files import walk
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.folders import read_folder, unreadable
from refract.pipeline.data.sources.source import Rows, Source


class FolderSource(Source):
    accepts: ClassVar[str] = "a folder"

    @classmethod
    def recognises(cls, name: str) -> bool:
        return Path(name).is_dir()

    def rows(self, *, labelled: bool) -> Rows:
        return self._labelled() if labelled else self._every_image()

    def check_task(self, task: str) -> None:
        if task == "multilabel":
            raise DataError(
                f"{Path(self.name)}: data.task is multilabel, but a folder gives each image one class; use a manifest with labels such as "
                "`cat;dog`"
            )

    def _labelled(self) -> Rows:
        """Read CLASS/… or SPLIT/CLASS/…: class by class, each in the order of the paths."""
        root = Path(self.name)
        folder = read_folder(root)
        images = [(path, one.label, one.split) for one in folder.classes for path in one.images]
        paths, labels, splits = zip(*images, strict=True) if images else ((), (), ())
        return Rows(
            str(root),
            paths,
            labels=labels,
            splits=splits,
            classes=tuple(one.label for one in folder.classes),
            folder=folder.root,
            empty=tuple(one.path for one in folder.classes if not one.images),
            loose=tuple(folder.loose),
            skipped=folder.skipped,
            notes=tuple(folder.notes),
        )

    def _every_image(self) -> Rows:
        """List the images at any depth, in the order of the paths; broken links are among the skipped entries."""
        root = Path(self.name)
        try:
            tree = walk(root)
        except OSError as error:
            raise unreadable(error, root) from error
        return Rows(str(root), tree.images, folder=str(root), skipped=tree.skipped)
