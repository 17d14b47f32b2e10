"""What a folder of images says: which folders are splits, which are classes, and what is skipped."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from refract.augment.image_files import Level, Skipped, identities_above, identity, level_of, walk
from refract.pipeline.data.errors import DataError

SPLITS = ("train", "val", "test")

_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_AFTER = r"[ _-]?(set|data|images|imgs|split)?"
"""What may follow a split's word in a folder's name: `train_set`, `ValImages`."""

_PARTS = frozenset({*_WORDS, "eval", "evaluation", "holdout", "fold", "split", "part", "batch", "subset"})
"""Words of names that are suspected to be parts of a data set, not classes."""


def split_of(name: str) -> str:
    """The split that a folder's or a row's split name means, in any letter case: `Training` → train; "" for other names."""
    match = re.fullmatch(f"({'|'.join(_WORDS)}){_AFTER}", unicodedata.normalize("NFC", name).strip().casefold())
    return _WORDS[match[1]] if match else ""


def trimmed_name(name: str) -> str:
    """A label, path or column without blanks, and without the invisible characters that programs leave, at its ends."""
    return name.strip().strip(" \t\r\n\f\v\u00a0\u200b\u200c\u200d\u2060\ufeff")


def label_of(name: str) -> str:
    """The label that a name means: in Unicode's form NFC, so that a composed and a decomposed `é` are one label."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class ClassFolder:
    """split: "" where the folder gives none; label: see `label_of`; images: paths at any depth, sorted."""

    split: str
    label: str
    path: str
    images: Sequence[str]


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, read. loose: images that lie in no class folder; notes: what a user should look at."""

    root: str
    classes: Sequence[ClassFolder]
    loose: Sequence[str]
    skipped: Skipped
    notes: Sequence[str]


def read_folder(root: str | Path) -> ImageFolder:
    """Read CLASS/… or SPLIT/CLASS/…, links followed, hidden entries skipped. DataError for folders whose meaning is not certain."""
    try:
        return _read(os.fspath(root))
    except OSError as error:
        raise unreadable(error, root) from error


def unreadable(error: OSError, root: str | Path) -> DataError:
    """The error of a folder below `root` that the system does not open."""
    return DataError(
        f"{error.filename or root}: this folder cannot be read ({error.strerror}); make it readable, or move it away"
    )


def _read(root: str) -> ImageFolder:
    top = _level(root)
    splits = _splits(root, top.folders)
    parts = [(split, _level(folder)) for split, folder in splits] or [("", top)]
    if splits:
        _refuse_repeated_level(splits, [level for _, level in parts])
    if not any(level.folders for _, level in parts):
        raise DataError(_no_classes(root, top, splits))
    skipped, loose, classes = Skipped(), list[str](), list[ClassFolder]()
    for level in [top, *(level for _, level in parts if level is not top)]:
        loose += level.images
        skipped.add(replace(level.skipped, others=[]))  # readmes and tables next to the classes
    for split, level in parts:
        for folder in level.folders:
            tree = walk(folder)
            skipped.add(tree.skipped)
            classes.append(ClassFolder(split, label_of(_name(folder)), folder, tree.images))
    _refuse_odd_labels(root, classes)
    return ImageFolder(
        root, classes, loose, skipped, [*_split_note(splits), *_same_names(root, classes), *_nested_note(classes)]
    )


def skipped_lines(skipped: Skipped) -> list[str]:
    """What a training should report: a line for each kind of entry that might have been meant, with its count and an example."""
    kinds = {
        "files are not images by their suffix": skipped.others,
        "links lead nowhere": skipped.broken,
        "links lead to folders that are read already, or to one above them": skipped.loops,
        "entries are neither files nor folders": skipped.special,
    }
    return [f"{len(paths)} {kind}, such as {min(paths)}" for kind, paths in kinds.items() if paths]


def hidden_lines(skipped: Skipped) -> list[str]:
    """The same of entries that nobody means: hidden files and folders, and those of systems."""
    return (
        [f"{len(skipped.hidden)} entries are hidden or a system's, such as {min(skipped.hidden)}"]
        if skipped.hidden
        else []
    )


def inner_hint(root: str | Path) -> str:
    """Which path to give instead of `root`, where the classes lie deeper: "" where they do not, else the end of an error's sentence."""
    folder = os.fspath(root)
    while True:
        filled = [inner for inner in level_of(folder).folders if walk(inner).images]
        if len(filled) != 1:
            break
        folder = filled[0]
    inner = [_name(path) for path in filled]
    if folder == os.fspath(root) or len(inner) < 2:
        return ""
    meant = "splits" if all(map(split_of, inner)) else "classes"
    return f". If its folders ({_some(inner)}) are the {meant}, give {folder} in place of {root}"


def _level(folder: str) -> Level:
    """One folder. Links to folders are among its folders, unless they lead back to it or to one above."""
    level = level_of(folder)
    if level.linked:
        around = {identity(folder), *identities_above(folder)}
        back = [link for link in level.linked if identity(link) in around]
        level.skipped.loops += back
        level.folders = sorted({*level.folders, *level.linked} - {*back})
    return level


def _splits(root: str, folders: Sequence[str]) -> list[tuple[str, str]]:
    """(split, folder) where the folders are splits, [] where they are classes. DataError where neither is certain."""
    named = [(split, folder) for folder in folders if (split := split_of(_name(folder)))]
    others = [folder for folder in folders if not split_of(_name(folder))]
    if not named:
        _refuse_suspected_parts(root, others)
        return []
    if others:
        if _valid_and_invalid(folders):
            return []
        raise DataError(_splits_and_others(root, [_name(folder) for _, folder in named], [*map(_name, others)]))
    for split in SPLITS:
        same = [_name(folder) for own, folder in named if own == split]
        if len(same) > 1:
            raise DataError(
                f"{root}: {_some(same)} all name the split {split}; keep one of them, or rename the others to "
                f"{_some([other for other in SPLITS if other != split])}"
            )
    return named


def _splits_and_others(root: str, splits: list[str], others: list[str]) -> str:
    parts = [name for name in others if _parts_in(name)]
    return (
        f"{root}: holds split folders ({', '.join(splits)}) and others ({', '.join(others[:5])}); "
        "keep either CLASS/… or train|val|test/CLASS/…"
        + "".join(f"; rename {name} to val or test" for name in parts)
        + ("" if parts else f"; rename {splits[0]} if it is a class, or move the others away")
    )


def _valid_and_invalid(folders: Sequence[str]) -> bool:
    """Whether two folders of images are the classes `valid` and `invalid`, not a split and a class."""
    names = {_name(folder).casefold() for folder in folders}
    return names == {"valid", "invalid"} and not any(level_of(folder).folders for folder in folders)


def _refuse_suspected_parts(root: str, folders: Sequence[str]) -> None:
    """DataError for folders such as `seg_train` and `seg_test`, which would become the classes of a wrong task."""
    suspected = {folder: parts for folder in folders if (parts := _parts_in(_name(folder)))}
    splits = {_WORDS[part] for parts in suspected.values() for part in parts if part in _WORDS}
    if len(suspected) < 2:
        return
    inner = [{label_of(_name(path)) for path in level_of(folder).folders} for folder in suspected]
    shared = sorted(set.intersection(*inner))
    if len(shared) >= 2 or (len(suspected) == len(folders) and len(splits) >= 2):
        names = [_name(folder) for folder in suspected]
        each = f", each with the folders {_some(shared)}" if shared else ""
        raise DataError(
            f"{root}: {_some(names)} look like parts of one data set{each}, not like classes; rename them to train, val and test, or put "
            "the folders of each class together"
        )


def _parts_in(name: str) -> list[str]:
    """The words of a name that name parts of a data set: seg_train → train."""
    words = (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))
    return [word for word in words if word in _PARTS]


def _refuse_repeated_level(splits: Sequence[tuple[str, str]], levels: Sequence[Level]) -> None:
    for (_, folder), level in zip(splits, levels, strict=True):
        if len(level.folders) == 1 and split_of(_name(level.folders[0])):
            raise DataError(
                f"{folder}: holds one more split folder, {_name(level.folders[0])}, in place of class folders; move its folders to {folder}"
            )


def _no_classes(root: str, top: Level, splits: Sequence[tuple[str, str]]) -> str:
    where = f"; {_some([_name(folder) for _, folder in splits])} hold none" if splits else ""
    tables = [path for path in top.skipped.others if path.lower().endswith((".csv", ".tsv", ".parquet"))]
    return (
        f"{root}: no class folders{where}. Put the images of each class into a folder named after it ({root}/CLASS/*.jpg), or write a "
        "manifest (CSV with the columns path,label)" + (f"; if {tables[0]} is one, give its path" if tables else "")
    )


def _refuse_odd_labels(root: str, classes: Sequence[ClassFolder]) -> None:
    odd = sorted({one.label for one in classes if ";" in one.label or one.label != trimmed_name(one.label)})
    if odd:
        raise DataError(
            f"{root}: the class folder {odd[0]!r} cannot be a label: `;` separates labels in manifests, and blanks at the ends are lost "
            "there; rename it"
        )


def _same_names(root: str, classes: Sequence[ClassFolder]) -> list[str]:
    """Notes about class folders that are one class; DataError where a class seems to have another name in each split."""
    spelled: dict[str, set[str]] = defaultdict(set)
    in_split: dict[str, set[str]] = defaultdict(set)
    for one in classes:
        spelled[one.label].add(_name(one.path))
        in_split[one.split].add(one.label)
    for difference, group in twins(spelled):
        if all(len(labels & {*group}) < 2 for labels in in_split.values()):
            where = [shown_twin(one.path) for label in group for one in classes if one.label == label]
            raise DataError(f"{root}: {_some(where)} differ in {difference} only; rename them to one name")
    merged = sorted(label for label, names in spelled.items() if len(names) > 1)
    return (
        [f"{len(merged)} classes have folders in two Unicode forms, such as {merged[0]}; each is one class"]
        if merged
        else []
    )


def _visible(label: str) -> str:
    """The label without characters that nobody sees, and with one blank for any blanks."""
    return " ".join("".join(c for c in label if unicodedata.category(c) != "Cf").split())


_DIFFERENCES: Mapping[str, Callable[[str], str]] = MappingProxyType({
    "letter case": str.lower,
    "invisible characters or blanks": _visible,
    "quotes at the ends": lambda label: label.strip("'\""),
})  # fmt: skip
"""In what labels may differ that are probably one class, and what is left of a label without it."""


def twins(labels: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(difference, labels that differ in it only, sorted) of labels that are probably one class, as `Cat` and `cat`."""
    ordered, groups = sorted(labels), list[tuple[str, list[str]]]()
    for difference, key in _DIFFERENCES.items():
        same: dict[str, list[str]] = defaultdict(list)
        for label in ordered:
            same[key(label)].append(label)
        groups += [(difference, group) for group in same.values() if len(group) > 1]
    return groups


def shown_twin(label: str) -> str:
    """A label for a message about `twins`: its code points where it has invisible characters."""
    return label if label.isprintable() and label == _visible(label) else ascii(label)


def _split_note(splits: Sequence[tuple[str, str]]) -> list[str]:
    read = [f"{_name(folder)} as {split}" for split, folder in splits if _name(folder) != split]
    return [f"split folders: {', '.join(read)}"] if read else []


def _nested_note(classes: Sequence[ClassFolder]) -> list[str]:
    deep = [image for one in classes for image in one.images if os.sep in image[len(one.path) + 1 :]]
    return (
        [f"{len(deep)} images lie in folders inside a class folder, such as {deep[0]}; they are of that class"]
        if deep
        else []
    )


def _name(path: str) -> str:
    return path.rpartition(os.sep)[2]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
