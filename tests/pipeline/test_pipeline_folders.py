"""Reading a folder of images: splits, classes, hidden entries, links, and similar names."""

import os
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refract.augment.image_files import image_files, list_folder, walk
from refract.pipeline.data.image_paths import listed_images
from refract.pipeline.data.manifest import DataError, load_manifest
from refract.pipeline.data.new_data import read_data
from refract.pipeline.data.sources.folders import split_of
from refract.pipeline.data.validation import check_classes
from refract.pipeline.inference.batch.listing import listing_of
from refract.pipeline.suggest.survey import _folder_notes

Files = Callable[..., Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write empty files below one folder; `N*DIR` writes N images into DIR."""

    def write(*names: str) -> Path:
        root = tmp_path / "data"
        for name in names:
            count, _, folder = name.rpartition("*")
            for path in [root / folder / f"{i}.png" for i in range(int(count))] if count else [root / name]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        return root

    return write


def counts(root: Path) -> dict[str, dict[str, int]]:
    manifest = load_manifest(root)
    return {split: manifest.counts(split) for split in manifest.splits() or [""]}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Validation", "Test"),
        ("training", "valid", "testing"),
        ("TRAINING", "dev", "TEST"),
        ("train_set", "val-set", "Test Data"),
        ("TrainImages", "ValImages", "TestImages"),
    ],
)
def test_split_folders_are_recognised_by_common_names(files: Files, train: str, val: str, test: str) -> None:
    root = files(*(f"2*{split}/{label}" for split in (train, val, test) for label in ("cat", "dog")))
    assert counts(root) == {split: {"cat": 2, "dog": 2} for split in ("train", "val", "test")}
    data = read_data(str(root), ["cat", "dog"], multilabel=False)
    assert data.names is not None and {*data.names} == {("cat",), ("dog",)}


@pytest.mark.parametrize("name", ["cat", "trains", "retrain", "tested", "developer", "value", "contest", "train1", ""])
def test_other_names_are_not_splits(name: str) -> None:
    assert split_of(name) == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Train/a", "Test/a", "cat"], r"split folders \(Test, Train\) and others \(cat\).*rename Test if it is a class"),
        (["train/a", "eval/a"], r"split folders \(train\) and others \(eval\).*rename eval to val or test"),
        (["val/a", "valid/a", "train/a"], r"val, valid all denote the split val; keep one of them"),
        (["Train/a", "train/a"], "Train, train all denote the split train"),
        (["seg_train/a", "seg_train/b", "seg_test/a", "seg_test/b"], "seg_test, seg_train look like parts of one data set"),
        (["images_train", "images_test"], "images_test, images_train look like parts of one data set"),
        (["fold1/a", "fold1/b", "fold2/a", "fold2/b"], r"fold1, fold2 look like .* each with the folders a, b"),
        (["Train", "Test"], "no class folders in Test, Train"),
        (["train/train/a", "test/test/a"], "contains the split folder test instead of class folders"),
        (["set/cat", "set/dog"], r"only one class \(set\).*its folders \(cat, dog\) are the classes, use .*data/set in"),
        (["x/set/train/a", "x/set/test/a"], r"only one class \(x\).*folders \(test, train\) are the splits, use .*x/set"),
        (["set/cat", "set/dog", "docs/readme.txt"], r"only one class \(set\), and 1 empty.*use .*data/set instead"),
        (["train/Cat", "train/dog", "val/cat", "val/dog"], "train/Cat, .*val/cat differ in letter case only; give them"),
        (["train/cat", "train/dog", "val/ca\u200bt", "val/dog"], r"train/cat.*ca\\u200bt' differ in invisible characters"),
    ],
)  # fmt: skip
def test_ambiguous_folders_are_rejected_with_a_remedy(files: Files, names: list[str], message: str) -> None:
    root = files(*(name if name.endswith("txt") else f"2*{name}" for name in names))
    with pytest.raises(DataError, match=message):
        load_manifest(root)


def test_a_table_next_to_loose_images_is_named(files: Files) -> None:
    root = files("2*.", "labels.csv")
    with pytest.raises(DataError, match=r"no class folders.*if .*labels\.csv is a manifest, use its path"):
        load_manifest(root)


@pytest.mark.parametrize(
    "names",
    [
        ["valid", "invalid"],  # not a split and a class
        ["steam_train/a", "bus/b"],  # a word of splits in one name alone
        ["cat/2019", "cat/2020", "dog/2019", "dog/2020"],  # the same folders in each class
        ["part_a", "part_b"],
    ],
)
def test_classes_that_resemble_splits_stay_classes(files: Files, names: list[str]) -> None:
    root = files(*(f"2*{name}" for name in names))
    labels = {name.partition("/")[0] for name in names}
    assert {*load_manifest(root).labels} == labels


HIDDEN = [
    ".ipynb_checkpoints", ".Trash-1000", ".AppleDouble", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information",
    "#recycle", ".hidden",
]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("place", ["", "cat/", "cat/deep/"])
def test_hidden_and_system_folders_are_skipped(files: Files, name: str, place: str) -> None:
    root = files("2*cat", "2*dog", f"3*{place}{name}", f"{place}._0.png", f"{place}Thumbs.db")
    manifest = load_manifest(root)
    assert manifest.counts() == {"cat": 2, "dog": 2} and not manifest.loose
    assert f"3 entries are hidden or belong to the system, such as {root}/{place}" in "".join(_folder_notes(manifest))
    expected = sorted(f"{root}/{label}/{i}.png" for label in ("cat", "dog") for i in range(2))
    assert [row.path for row in listing_of(root).rows] == expected
    assert [*map(str, listed_images([root]))] == expected
    assert [sample.path for sample in read_data(str(root), ["cat"], multilabel=False).samples] == expected


def linked(root: Path, name: str, target: Path | str) -> None:
    (root / name).symlink_to(target)


def test_links_are_followed_each_folder_once_and_broken_ones_are_reported(files: Files, tmp_path: Path) -> None:
    root = files("2*cat", "2*dog")
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (tmp_path / "more" / name).touch()
    linked(root, "cat/more", tmp_path / "more")
    linked(root, "cat/again", tmp_path / "more")
    linked(root, "cat/up", "..")
    linked(root, "cat/self", "self")
    linked(root, "dog/gone.png", "/nowhere/gone.png")
    linked(root, "dog/one.png", tmp_path / "more" / "a.png")
    linked(root, "around", ".")
    manifest = load_manifest(root)
    assert manifest.counts() == {"cat": 4, "dog": 3}
    assert [*map(Path, walk(root / "cat").images)][2:] == [root / "cat/again/a.png", root / "cat/again/deep/b.png"]
    lines = "\n".join(_folder_notes(manifest))
    assert f"2 links are broken, such as {root}/cat/self" in lines
    assert f"3 links lead to a folder that was already read, or to a parent folder, such as {root}/around" in lines
    assert f"2 images are in subfolders of a class folder, such as {root}/cat/again/a.png" in lines
    listed = [str(row.path) for row in listing_of(root).rows]
    assert f"{root}/dog/gone.png" in listed and len(listed) == 8, "a row each, errors too"


def test_a_folder_below_two_links_is_read_once(files: Files, tmp_path: Path) -> None:
    root = files("2*cat")
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "b.png").touch()
    linked(root, "cat/a", tmp_path / "more" / "deep")
    linked(root, "cat/b", tmp_path / "more")
    assert [*map(Path, walk(root / "cat").images)][2:] == [root / "cat/a/b.png"]


def test_a_class_may_be_a_link_and_a_loop_through_it_ends(files: Files, tmp_path: Path) -> None:
    root = files("2*dog")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").touch()
    linked(tmp_path, "cats/back", root)
    linked(root, "cat", tmp_path / "cats")
    assert load_manifest(root).counts() == {"cat": 1, "dog": 2}


def test_pipes_and_other_files_are_skipped_and_reported(files: Files) -> None:
    root = files("2*cat", "2*dog", "cat/notes.txt", "readme.md")
    os.mkfifo(root / "cat" / "pipe.png")
    manifest = load_manifest(root)
    lines = "\n".join(_folder_notes(manifest))
    assert "1 entries are neither files nor folders" in lines and "1 files are not images by their suffix" in lines
    assert manifest.counts() == {"cat": 2, "dog": 2}


def test_training_reports_broken_links(files: Files) -> None:
    root = files("2*train/cat", "2*train/dog", "2*val/cat", "2*val/dog", "2*test/cat", "2*test/dog")
    linked(root, "train/cat/gone.png", "nowhere")
    assert f"1 links are broken, such as {root}/train/cat/gone.png; they are skipped" in check_classes(
        load_manifest(root)
    )


@pytest.mark.parametrize("places", [("train", "val"), ("train", "train")])
def test_two_unicode_forms_of_a_name_are_one_class(files: Files, places: tuple[str, str]) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    named = [f"2*{place}/{form}" for place, form in zip(places, forms, strict=True)]
    manifest = load_manifest(files(*named, "2*train/dog", "2*val/dog"))
    assert manifest.labels == ("café", "dog") and manifest.counts()["café"] == 4
    assert "1 classes have folders in two Unicode forms" in "".join(manifest.notes)
    known = read_data(manifest.source, [forms[1], "dog"], multilabel=False).names
    assert known is not None and {*known} == {(forms[1],), ("dog",)}, "a bundle keeps its labels' form"


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("Cat", "cat"), "Cat and cat are 2 classes and differ in letter case only"),
        (("ca\u200bt", "cat"), r"cat and 'ca\u200bt' are 2 classes and differ in invisible characters or blanks only"),
        (("big\u00a0cat", "big cat"), r"big cat and 'big\xa0cat' are 2 classes and differ in invisible characters"),
        (("'cat'", "cat"), "'cat' and cat are 2 classes and differ in quotes at the ends only"),
        (("straße", "strasse"), ""),
        (("ﬁsh", "fish"), ""),
    ],
)
def test_names_that_are_probably_one_class_are_noted(files: Files, names: tuple[str, str], note: str) -> None:
    manifest = load_manifest(files(*(f"2*{name}" for name in names), "2*dog"))
    assert manifest.labels == tuple(sorted((*names, "dog")))
    notes = "".join(_folder_notes(manifest))
    assert note in notes and bool(note) == ("differ" in notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens every folder")
def test_an_unreadable_folder_is_rejected(files: Files) -> None:
    root = files("2*cat", "2*dog", "2*cat/locked")
    (root / "cat" / "locked").chmod(0)
    for read in (load_manifest, listing_of):
        with pytest.raises(DataError, match="locked: this folder cannot be read"):
            read(root)
    (root / "cat" / "locked").chmod(0o755)


NAMES = st.sampled_from(["a", "b", "B", "a.b", "a-b", "é", "10", "9", "a b", "ß"])


@settings(max_examples=30, deadline=None)
@given(paths=st.lists(st.lists(NAMES, min_size=2, max_size=4).map(tuple), min_size=1, max_size=12), data=st.data())
def test_the_order_follows_the_names_not_the_file_system(paths: list[tuple[str, ...]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for parts in data.draw(st.permutations(paths)):
            path = root.joinpath(*(f"d{part}" for part in parts[:-1]), f"{parts[-1]}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        expected = sorted(path for path in root.rglob("*") if path.is_file())
        assert [*map(Path, image_files(root))] == expected
        labels = sorted({path.relative_to(root).parts[0] for path in expected})
        manifest = load_manifest(root, "multiclass", to_train=False)
        assert [sample.path for sample in manifest.samples] == [*map(str, expected)] and [*manifest.labels] == labels
        assert [*map(Path, list_folder(root).folders)] == [root / label for label in labels]
