"""Read a folder of images: its split folders, class folders and skipped entries."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from refract.augment.decoding.decode import SUFFIXES
from refract.augment.image_files import FolderEntries, Skipped, Tree, identities_above, identity, list_folder, walk
from refract.pipeline.data.errors import DataError

SPLITS = ("train", "val", "test")

_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_AFTER = r"[ _-]?(set|data|images|imgs|split)?"
"""Optional suffix of a split word in a folder's name: `train_set`, `ValImages`."""

_PARTS = frozenset({*_WORDS, "eval", "evaluation", "holdout", "fold", "split", "part", "batch", "subset"})
"""Words in folder names that suggest parts of a data set, not classes."""


def split_of(name: str) -> str:
    """Return the split of a folder name or table value, in any letter case: `Training` → train; "" for other names."""
    match = re.fullmatch(f"({'|'.join(_WORDS)}){_AFTER}", unicodedata.normalize("NFC", name).strip().casefold())
    return _WORDS[match[1]] if match else ""


def trimmed_name(name: str) -> str:
    """Return a label, path or column name without blanks and invisible characters at its ends."""
    return name.strip().strip(" \t\r\n\f\v\u00a0\u200b\u200c\u200d\u2060\ufeff")


def label_of(name: str) -> str:
    """Return the label of a name: its Unicode form NFC, so that a composed and a decomposed `é` are one label."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class ClassFolder:
    """One class folder. split: "" if the data has no split folders; label: see `label_of`; images: paths at any depth, sorted."""

    split: str
    label: str
    path: str
    images: Sequence[str]


@dataclass(frozen=True)
class ImageFolder:
    """The content of an image folder. loose: images outside the class folders; notes: notes for the user."""

    root: str
    classes: Sequence[ClassFolder]
    loose: Sequence[str]
    skipped: Skipped
    notes: Sequence[str]


class Files(Protocol):
    """Lists folders: those of the file system, of an archive or of an object store. Paths start with that of the root."""

    def list_folder(self, folder: str) -> FolderEntries: ...

    def walk(self, root: str) -> Tree: ...


class LocalFolders:
    """The folders of the file system. OSError if one cannot be read."""

    def list_folder(self, folder: str) -> FolderEntries:
        return list_folder(folder)

    def walk(self, root: str) -> Tree:
        return walk(root)


LOCAL = LocalFolders()


def read_folder(root: str | Path, files: Files = LOCAL) -> ImageFolder:
    """Read CLASS/… or SPLIT/CLASS/…; follow links and skip hidden entries. DataError for an ambiguous folder structure."""
    try:
        return _read(os.fspath(root), files)
    except OSError as error:
        raise unreadable(error, root) from error


def unreadable(error: OSError, root: str | Path) -> DataError:
    """Return the error for a folder below `root` that cannot be opened."""
    return DataError(
        f"{error.filename or root}: this folder cannot be read ({error.strerror}); make it readable, or move it elsewhere"
    )


def no_images(root: str | Path) -> DataError:
    """Return the error for a folder without an image at any depth."""
    return DataError(f"{root}: no images in this folder; Refract reads {', '.join(SUFFIXES)}")


def _read(root: str, files: Files) -> ImageFolder:
    top = _level(root, files)
    splits = _splits(root, top.folders, files)
    parts = [(split, _level(folder, files)) for split, folder in splits] or [("", top)]
    if splits:
        _reject_repeated_level(splits, [level for _, level in parts])
    if not any(level.folders for _, level in parts):
        raise DataError(_no_classes(root, top, splits))
    skipped, loose, classes = Skipped(), list[str](), list[ClassFolder]()
    for level in [top, *(level for _, level in parts if level is not top)]:
        loose += level.images
        skipped.add(replace(level.skipped, others=[]))  # readmes and tables next to the classes
    for split, level in parts:
        for folder in level.folders:
            tree = files.walk(folder)
            skipped.add(tree.skipped)
            classes.append(ClassFolder(split, label_of(_name(folder)), folder, tree.images))
    _reject_invalid_labels(root, classes)
    return ImageFolder(
        root, classes, loose, skipped, [*_split_note(splits), *_same_names(root, classes), *_nested_note(classes)]
    )


def skipped_lines(skipped: Skipped) -> list[str]:
    """Return one line per kind of skipped entry that the user may have intended as data, with its count and an example."""
    kinds = {
        "files are not images by their suffix": skipped.others,
        "links are broken": skipped.broken,
        "links lead to a folder that was already read, or to a parent folder": skipped.loops,
        "entries are neither files nor folders": skipped.special,
    }
    return [f"{len(paths)} {kind}, such as {min(paths)}" for kind, paths in kinds.items() if paths]


def hidden_lines(skipped: Skipped) -> list[str]:
    """Return one line on skipped hidden files and folders, including those of operating systems, or none."""
    return (
        [f"{len(skipped.hidden)} entries are hidden or belong to the system, such as {min(skipped.hidden)}"]
        if skipped.hidden
        else []
    )


def inner_hint(root: str | Path) -> str:
    """Return the end of an error sentence that names the path to use instead of `root`, if the classes are deeper; else ""."""
    folder = os.fspath(root)
    while True:
        filled = [inner for inner in list_folder(folder).folders if walk(inner).images]
        if len(filled) != 1:
            break
        folder = filled[0]
    inner = [_name(path) for path in filled]
    if folder == os.fspath(root) or len(inner) < 2:
        return ""
    kind = "splits" if all(map(split_of, inner)) else "classes"
    return f". If its folders ({_some(inner)}) are the {kind}, use {folder} instead of {root}"


def _level(folder: str, files: Files) -> FolderEntries:
    """Read one folder. Its folders include links to folders, except links to itself or to a parent folder."""
    level = files.list_folder(folder)
    if level.linked:
        ancestors = {identity(folder), *identities_above(folder)}
        back = [link for link in level.linked if identity(link) in ancestors]
        level.skipped.loops += back
        level.folders = sorted({*level.folders, *level.linked} - {*back})
    return level


def _splits(root: str, folders: Sequence[str], files: Files) -> list[tuple[str, str]]:
    """Return (split, folder) pairs if the folders are splits, [] if they are classes. DataError for an ambiguous mixture."""
    named = [(split, folder) for folder in folders if (split := split_of(_name(folder)))]
    others = [folder for folder in folders if not split_of(_name(folder))]
    if not named:
        _reject_suspected_parts(root, others, files)
        return []
    if others:
        if _valid_and_invalid(folders, files):
            return []
        raise DataError(_splits_and_others(root, [_name(folder) for _, folder in named], [*map(_name, others)]))
    for split in SPLITS:
        same = [_name(folder) for folder_split, folder in named if folder_split == split]
        if len(same) > 1:
            raise DataError(
                f"{root}: {_some(same)} all denote the split {split}; keep one of them, or rename the others to "
                f"{_some([other for other in SPLITS if other != split])}"
            )
    return named


def _splits_and_others(root: str, splits: list[str], others: list[str]) -> str:
    parts = [name for name in others if _parts_in(name)]
    return (
        f"{root}: contains split folders ({', '.join(splits)}) and others ({', '.join(others[:5])}); "
        "use either CLASS/… or train|val|test/CLASS/…"
        + "".join(f"; rename {name} to val or test" for name in parts)
        + ("" if parts else f"; rename {splits[0]} if it is a class, or move the others elsewhere")
    )


def _valid_and_invalid(folders: Sequence[str], files: Files) -> bool:
    """Return whether two image folders are the classes `valid` and `invalid`, not a split and a class."""
    names = {_name(folder).casefold() for folder in folders}
    return names == {"valid", "invalid"} and not any(files.list_folder(folder).folders for folder in folders)


def _reject_suspected_parts(root: str, folders: Sequence[str], files: Files) -> None:
    """Raise DataError for folders such as `seg_train` and `seg_test`, which are probably splits, not classes."""
    suspected = {folder: parts for folder in folders if (parts := _parts_in(_name(folder)))}
    splits = {_WORDS[part] for parts in suspected.values() for part in parts if part in _WORDS}
    if len(suspected) < 2:
        return
    inner = [{label_of(_name(path)) for path in files.list_folder(folder).folders} for folder in suspected]
    shared = sorted(set.intersection(*inner))
    if len(shared) >= 2 or (len(suspected) == len(folders) and len(splits) >= 2):
        names = [_name(folder) for folder in suspected]
        each = f", each with the folders {_some(shared)}" if shared else ""
        raise DataError(
            f"{root}: {_some(names)} look like parts of one data set{each}, not like classes; rename them to train, val and test, or put "
            "the folders of each class together"
        )


def _parts_in(name: str) -> list[str]:
    """Return the words of a name that denote parts of a data set: seg_train → train."""
    words = (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))
    return [word for word in words if word in _PARTS]


def _reject_repeated_level(splits: Sequence[tuple[str, str]], levels: Sequence[FolderEntries]) -> None:
    for (_, folder), level in zip(splits, levels, strict=True):
        if len(level.folders) == 1 and split_of(_name(level.folders[0])):
            raise DataError(
                f"{folder}: contains the split folder {_name(level.folders[0])} instead of class folders; move its folders to {folder}"
            )


def _no_classes(root: str, top: FolderEntries, splits: Sequence[tuple[str, str]]) -> str:
    where = f" in {_some([_name(folder) for _, folder in splits])}" if splits else ""
    tables = [path for path in top.skipped.others if path.lower().endswith((".csv", ".tsv", ".parquet"))]
    return (
        f"{root}: no class folders{where}. Put the images of each class into a folder named after it ({root}/CLASS/*.jpg), or write a "
        "manifest (CSV with the columns path,label)"
        + (f"; if {tables[0]} is a manifest, use its path" if tables else "")
    )


def _reject_invalid_labels(root: str, classes: Sequence[ClassFolder]) -> None:
    invalid = sorted({item.label for item in classes if ";" in item.label or item.label != trimmed_name(item.label)})
    if invalid:
        raise DataError(
            f"{root}: the class folder {invalid[0]!r} cannot be a label: manifests separate labels by `;` and lose blanks at the "
            "ends; rename the folder"
        )


def _same_names(root: str, classes: Sequence[ClassFolder]) -> list[str]:
    """Return notes on folders that form one class. DataError if a class seems to have a different name in each split."""
    spelled: dict[str, set[str]] = defaultdict(set)
    in_split: dict[str, set[str]] = defaultdict(set)
    for item in classes:
        spelled[item.label].add(_name(item.path))
        in_split[item.split].add(item.label)
    for difference, group in twins(spelled):
        if all(len(labels & {*group}) < 2 for labels in in_split.values()):
            where = [shown_twin(item.path) for label in group for item in classes if item.label == label]
            raise DataError(f"{root}: {_some(where)} differ in {difference} only; give them the same name")
    merged = sorted(label for label, names in spelled.items() if len(names) > 1)
    return (
        [f"{len(merged)} classes have folders in two Unicode forms, such as {merged[0]}; each is one class"]
        if merged
        else []
    )


def _visible(label: str) -> str:
    """Return the label without invisible characters, and with one space for each run of blanks."""
    return " ".join("".join(c for c in label if unicodedata.category(c) != "Cf").split())


_DIFFERENCES: Mapping[str, Callable[[str], str]] = MappingProxyType({
    "letter case": str.lower,
    "invisible characters or blanks": _visible,
    "quotes at the ends": lambda label: label.strip("'\""),
})  # fmt: skip
"""Difference between labels of probably one class → function that removes it."""


def twins(labels: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return (difference, sorted labels that differ in it only) for labels that are probably one class, such as `Cat` and `cat`."""
    ordered, groups = sorted(labels), list[tuple[str, list[str]]]()
    for difference, key in _DIFFERENCES.items():
        same: dict[str, list[str]] = defaultdict(list)
        for label in ordered:
            same[key(label)].append(label)
        groups += [(difference, group) for group in same.values() if len(group) > 1]
    return groups


def shown_twin(label: str) -> str:
    """Return a label for a message about `twins`: with escaped code points if it has invisible characters."""
    return label if label.isprintable() and label == _visible(label) else ascii(label)


def _split_note(splits: Sequence[tuple[str, str]]) -> list[str]:
    mapped = [f"{_name(folder)} as {split}" for split, folder in splits if _name(folder) != split]
    return [f"split folders: {', '.join(mapped)}"] if mapped else []


def _nested_note(classes: Sequence[ClassFolder]) -> list[str]:
    deep = [image for item in classes for image in item.images if os.sep in image[len(item.path) + 1 :]]
    return (
        [f"{len(deep)} images are in subfolders of a class folder, such as {deep[0]}; they belong to that class"]
        if deep
        else []
    )


def _name(path: str) -> str:
    return path.rpartition(os.sep)[2]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
