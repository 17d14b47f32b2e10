"""Which files below a folder are images, and which entries are hidden, broken or lead in a circle."""

import os
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from refract.augment.decoding.decode import SUFFIXES

SYSTEM_NAMES = frozenset({
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found",  # Windows, ext4
    "__macosx", "network trash folder", "temporary items", "icon\r",  # macOS
    "@eadir", "@tmp", "#recycle", "#snapshot", "~snapshot", "@recycle", "@recently-snapshot",  # Synology, NetApp, QNAP
    "__pycache__",
})  # fmt: skip
"""Names, in lower case, of what systems and tools write next to a user's files. Names that begin with a dot need no entry."""


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's name is hidden (`.ipynb_checkpoints`, `._cat.jpg`) or written by a system (`@eaDir`, `Thumbs.db`)."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether Refract reads files of this name's suffix, in any letter case."""
    return name.lower().endswith(SUFFIXES)


def path_order(path: str) -> str:
    """The sort key of paths: folder by folder, by code points, whatever the file system's or the locale's order is."""
    return path.replace(os.sep, "\0")  # which is less than any character of a name


@dataclass
class Skipped:
    """Paths of entries that are not read.

    hidden: see `is_hidden`; others: files that are not images by their suffix; broken: links whose target is missing; loops: links to a
    folder above them, or to one that is read already; special: pipes, sockets and devices.
    """

    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)

    def add(self, other: "Skipped") -> None:
        for name, paths in vars(other).items():
            getattr(self, name).extend(paths)

    def unreadable_images(self) -> list[str]:
        """Broken links and special files that have an image's suffix."""
        return [path for path in (*self.broken, *self.special) if is_image(path)]


@dataclass
class Level:
    """What lies in one folder, not in those below. folders, linked: folders, and links to folders. Paths, sorted by name."""

    folders: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


@dataclass
class Tree:
    """images: paths of all image files below a folder, sorted by `path_order`; skipped: the other entries."""

    images: list[str] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


def level_of(folder: str | Path) -> Level:
    """Read one folder. OSError where the folder cannot be read."""
    level = Level()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=attrgetter("name")):
            if not is_hidden(entry.name) and entry.is_file(follow_symlinks=False):  # most entries; no `stat`
                (level.images if is_image(entry.name) else level.skipped.others).append(entry.path)
            else:
                _kind(entry, level).append(entry.path)
    return level


def walk(root: str | Path) -> Tree:
    """Find the images below `root` at any depth. One `os.scandir` a folder; only links and folders cost a `stat`.

    Links to files and folders are followed, out of `root` too. Each folder is read once: under its own path where it lies below `root`,
    else under the first link to it. OSError where a folder cannot be read.
    """
    tree = Tree()
    seen = {*identities_above(root), identity(root)}
    folders, linked = [os.fspath(root)], list[str]()
    while folders or linked:
        if folders:
            folder = folders.pop()
        else:
            linked.sort(key=path_order, reverse=True)
            folder = linked.pop()
            if identity(folder) in seen:
                tree.skipped.loops.append(folder)
                continue
            seen.add(identity(folder))
        level = level_of(folder)
        below = {subfolder: identity(subfolder) for subfolder in level.folders}
        folders += [
            subfolder for subfolder, own in below.items() if own not in seen
        ]  # those of a linked folder may be known
        seen.update(below.values())
        linked += level.linked
        tree.images += level.images
        tree.skipped.add(level.skipped)
    tree.images.sort(key=path_order)
    return tree


def image_files(root: str | Path) -> list[str]:
    """The images below `root`. Broken links and special files of an image's name are among them, to be reported where they are opened.
    OSError where a folder cannot be read."""
    tree = walk(root)
    unreadable = tree.skipped.unreadable_images()
    return sorted([*tree.images, *unreadable], key=path_order) if unreadable else tree.images


def identity(folder: str | Path) -> tuple[int, int]:
    """(device, inode), which tells a folder from all others, whatever link leads to it."""
    status = os.stat(folder)  # noqa: PTH116 — called for each folder, a third of Path's time
    return status.st_dev, status.st_ino


def identities_above(folder: str | Path) -> set[tuple[int, int]]:
    """Those of the folders that hold `folder`, by its path and, where it is a link, by its target's."""
    return {identity(parent) for path in (Path(folder).absolute(), Path(folder).resolve()) for parent in path.parents}


def _kind(entry: "os.DirEntry[str]", level: Level) -> list[str]:
    """The list of `level` that an entry belongs to."""
    skipped = level.skipped
    if is_hidden(entry.name):
        return skipped.hidden
    try:
        link = entry.is_symlink()
        if entry.is_dir():
            return level.linked if link else level.folders
        if entry.is_file():
            return level.images if is_image(entry.name) else skipped.others
        return skipped.broken if link and not os.path.exists(entry.path) else skipped.special  # noqa: PTH110
    except OSError:  # a link to itself
        return skipped.broken
