"""The folders of a list of paths, such as the members of an archive or the objects below a prefix."""

from collections.abc import Iterable

from refract.augment.image_files import FolderEntries, Tree, is_hidden, is_image, path_order


class ListedFiles:
    """The folders below a root. names: paths relative to it, with `/`; those of folders end with `/`."""

    def __init__(self, root: str, names: Iterable[str]) -> None:
        self._root = root.rstrip("/")
        self._folders: dict[str, set[str]] = {"": set()}
        self._files: dict[str, set[str]] = {"": set()}
        for name in names:
            folder, _, file = name.rpartition("/")
            self._add_folder(folder)
            if file:
                self._files[folder].add(file)

    def _add_folder(self, folder: str) -> None:
        while folder not in self._folders:
            self._folders[folder], self._files[folder] = set(), set()
            parent, _, name = folder.rpartition("/")
            if parent in self._folders:
                self._folders[parent].add(name)
                return
            self._add_folder(parent)
            self._folders[parent].add(name)

    def list_folder(self, folder: str) -> FolderEntries:
        """List one folder as `refract.augment.image_files.list_folder` does. FileNotFoundError for an unknown one."""
        inside = folder.removeprefix(self._root).strip("/")
        if inside not in self._folders:
            raise FileNotFoundError(2, "No such file or directory", folder)
        listing = FolderEntries()
        names = [(name, listing.folders) for name in self._folders[inside]]
        names += [(name, listing.images if is_image(name) else listing.skipped.others) for name in self._files[inside]]
        for name, target in sorted(names, key=lambda entry: entry[0]):
            (listing.skipped.hidden if is_hidden(name) else target).append(f"{folder.rstrip('/')}/{name}")
        return listing

    def walk(self, root: str) -> Tree:
        """Find the images below a folder as `refract.augment.image_files.walk` does."""
        tree, folders = Tree(), [root]
        while folders:
            listing = self.list_folder(folders.pop())
            folders += listing.folders
            tree.images += listing.images
            tree.skipped.add(listing.skipped)
        tree.images.sort(key=path_order)
        return tree
