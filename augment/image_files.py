"""Find the image files below a folder; list hidden entries, broken links and link cycles."""

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
"""Lower-case names of files and folders that operating systems and tools write. Names that start with a dot need no entry."""


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder is hidden (`.ipynb_checkpoints`, `._cat.jpg`) or a system's (`@eaDir`, `Thumbs.db`)."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether Refract reads files with this name's suffix, ignoring case."""
    return name.lower().endswith(SUFFIXES)


def path_order(path: str) -> str:
    """Return the sort key of a path: folder by folder, by code points, independent of file system and locale."""
    return path.replace(os.sep, "\0")  # NUL sorts before every character of a name


@dataclass
class Skipped:
    """Paths of the entries that are not read.

    hidden: see `is_hidden`. others: files without an image suffix. broken: links whose target is missing.
    loops: links to a parent folder or to a folder that was read before. special: pipes, sockets and devices.
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
        """Return the broken links and special files with an image suffix."""
        return [path for path in (*self.broken, *self.special) if is_image(path)]


@dataclass
class FolderEntries:
    """The entries of one folder, without its subfolders' entries: paths, sorted by name.

    folders: real folders. linked: links to folders.
    """

    folders: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


@dataclass
class Tree:
    """The entries below a folder, at any depth. images: paths of the image files, sorted by `path_order`. skipped: other entries."""

    images: list[str] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


def list_folder(folder: str | Path) -> FolderEntries:
    """List one folder. OSError if the folder cannot be read."""
    listing = FolderEntries()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=attrgetter("name")):
            if not is_hidden(entry.name) and entry.is_file(follow_symlinks=False):  # the common case; needs no `stat`
                (listing.images if is_image(entry.name) else listing.skipped.others).append(entry.path)
            else:
                _list_for(entry, listing).append(entry.path)
    return listing


def walk(root: str | Path) -> Tree:
    """Find the images below `root` at any depth, with one `os.scandir` per folder and a `stat` for links and folders only.

    Links to files and folders are followed, also to targets outside `root`. Each folder is read once: under its real path if that is
    below `root`, else under the first link to it. OSError if a folder cannot be read.
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
        listing = list_folder(folder)
        below = {subfolder: identity(subfolder) for subfolder in listing.folders}
        # A linked folder may contain folders that were read before.
        folders += [subfolder for subfolder, inode in below.items() if inode not in seen]
        seen.update(below.values())
        linked += listing.linked
        tree.images += listing.images
        tree.skipped.add(listing.skipped)
    tree.images.sort(key=path_order)
    return tree


def image_files(root: str | Path) -> list[str]:
    """Return the images below `root`, sorted by `path_order`. OSError if a folder cannot be read.

    The list includes broken links and special files with an image suffix, so that opening them reports the error.
    """
    tree = walk(root)
    unreadable = tree.skipped.unreadable_images()
    return sorted([*tree.images, *unreadable], key=path_order) if unreadable else tree.images


def identity(folder: str | Path) -> tuple[int, int]:
    """Return (device, inode), which identifies a folder independently of the links to it."""
    status = os.stat(folder)  # noqa: PTH116 — runs for each folder; takes a third of Path's time
    return status.st_dev, status.st_ino


def identities_above(folder: str | Path) -> set[tuple[int, int]]:
    """Return the identities of the parents of `folder`: those of its path and, for a link, those of its target."""
    return {identity(parent) for path in (Path(folder).absolute(), Path(folder).resolve()) for parent in path.parents}


def _list_for(entry: "os.DirEntry[str]", listing: FolderEntries) -> list[str]:
    """Return the list of `listing` that the entry belongs to."""
    skipped = listing.skipped
    if is_hidden(entry.name):
        return skipped.hidden
    try:
        link = entry.is_symlink()
        if entry.is_dir():
            return listing.linked if link else listing.folders
        if entry.is_file():
            return listing.images if is_image(entry.name) else skipped.others
        return skipped.broken if link and not os.path.exists(entry.path) else skipped.special  # noqa: PTH110
    except OSError:  # a link to itself
        return skipped.broken
