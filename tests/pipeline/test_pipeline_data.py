"""Data sources, splits, and the checks before training."""

import csv
import gzip
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_data import COLORS, config_of, make_image, write_image

from refract.augment import Augmenter, Preprocess
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.manifest import DataError, Sample, load_manifest
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.data.splits import write_splits
from refract.pipeline.evaluation.golden_samples import make_golden_samples
from refract.pipeline.suggest import take_survey


def test_folder_of_classes(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest.labels == ("blue", "green", "red") and manifest.task == "multiclass"
    assert manifest.counts() == {"blue": 20, "green": 20, "red": 20} and manifest.splits() == []


def test_folder_of_splits(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    for part in ("train", "test"):
        shutil.copytree(folder, root / part)
    manifest = load_manifest(root)
    assert manifest.splits() == ["train", "test"] and len(manifest.samples) == 120


def test_embedded_digits() -> None:
    manifest = load_manifest("digits")
    levels = np.unique([Preprocess(8, 8)(sample.read()) for sample in manifest.samples[:50]])
    assert levels[0] == 0 and levels[-1] == 255, "the 17 levels of the source use the whole range"
    assert len(manifest.samples) == 1797 and manifest.labels == tuple("0123456789")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_multilabel_manifest(folder: Path, suffix: str) -> None:
    rows = [("red/00.jpg", "warm;bright", "train"), ("blue/01.jpg", "", "train"), ("green/02.jpg", "bright", "test")]
    table = pd.DataFrame(rows, columns=["path", "label", "split"])
    file = folder / f"m.{suffix}"
    table.to_csv(file, index=False) if suffix == "csv" else table.to_parquet(file)
    manifest = load_manifest(file)
    assert manifest.task == "multilabel" and manifest.labels == ("bright", "warm")
    assert [sample.labels for sample in manifest.samples] == [(1, 0), (), (0,)]
    assert all(Path(sample.path).is_file() for sample in manifest.samples)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.jpg,x\n", "no column 'path'"),
        ("path,label\n", "no rows"),
        ("path,label\na.jpg,x\nb.jpg,\n", r"line 3: label '' is not a class name \(1 such rows"),
        ("path,label,split\na.jpg,x,trian\n", "line 2: split 'trian' is not one of train, val, test"),
        ("path,label,split\na.jpg,x,train\nb.jpg,y,\n", "line 3: split '' is not filled"),
        ("path,label,split\na.jpg,x,test\nb.jpg,y,test\n", "split test, and none of the split train"),
        ("path,label\na.jpg,x\nb.jpg,x\n", "only one class"),
        ("", "cannot be read as a CSV table"),
    ],
)
def test_errors_of_a_manifest_name_the_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path / "m.csv")


def test_errors_of_a_folder_name_the_problem(tmp_path: Path, folder: Path) -> None:
    flat = tmp_path / "flat"
    write_image(flat / "a.jpg", make_image("red", 1))
    with pytest.raises(DataError, match="no class folders"):
        load_manifest(flat)
    shutil.copytree(folder, folder / "test")
    with pytest.raises(DataError, match=r"contains split folders \(test\) and others \(blue, green, red\)"):
        load_manifest(folder)
    with pytest.raises(DataError, match="no such folder"):
        load_manifest(tmp_path / "nowhere")


def test_repaired_files_are_trained_on_and_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = (folder / "red" / "00.jpg").read_bytes()
    (folder / "red" / "00.jpg").write_bytes(b"\xff\xd8" + plain)
    with caplog.at_level("WARNING"):
        manifest, _ = prepare_data(config_of(folder))
    assert "data: repaired JPEG: 1 image, such as" in caplog.text
    assert "00.jpg (a second start marker)" in caplog.text
    assert any(sample.path.endswith("red/00.jpg") for sample in manifest.samples)


def test_text_renamed_to_jpg_is_listed(folder: Path) -> None:
    (folder / "red" / "notes.jpg").write_text("shopping list")
    (folder / "blue" / "cut.jpg").write_bytes((folder / "blue" / "00.jpg").read_bytes()[:-100])
    with pytest.raises(DataError) as caught:
        prepare_data(config_of(folder))
    message = str(caught.value)
    assert "2 of 62 images cannot be read" in message
    assert "notes.jpg: not an image: it looks like text" in message and "cut.jpg: damaged or truncated JPEG" in message
    manifest, _ = prepare_data(config_of(folder, on_bad_file="skip"))
    assert len(manifest.samples) == 60


def test_more_bad_files_than_are_shown_are_counted(folder: Path) -> None:
    for number in range(25):
        (folder / "red" / f"bad{number}.jpg").write_text("x")
    with pytest.raises(DataError, match=r"25 of 85(.|\n)*… and 5 more"):
        prepare_data(config_of(folder))


def test_an_empty_class_is_rejected(folder: Path) -> None:
    (folder / "yellow").mkdir()
    with pytest.raises(DataError, match=r"1 class folders contain no images:\n .*yellow"):
        prepare_data(config_of(folder))


def test_a_class_of_one_image_is_rejected(folder: Path) -> None:
    write_image(folder / "yellow" / "1.png", make_image("red", 99))
    with pytest.raises(DataError, match=r"one image; training and measuring need two or more:\n  yellow"):
        prepare_data(config_of(folder))


def test_images_outside_the_class_folders_are_reported(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(folder / "red" / "00.jpg", folder / "lost.JPG")
    (folder / "notes.txt").write_text("x")
    manifest, _ = prepare_data(config_of(folder))
    assert len(manifest.samples) == 60
    assert f"1 images are outside the class folders and are skipped, such as {folder}/lost.JPG" in caplog.text
    assert "1 images are outside the class folders" in "".join(take_survey(manifest).notes)
    (folder / "lost.JPG").unlink()
    (tmp_path / "split").mkdir()
    folder.rename(tmp_path / "split" / "train")
    (tmp_path / "split" / "train" / "lost.png").write_bytes(b"")
    assert load_manifest(tmp_path / "split").loose == (str(tmp_path / "split" / "train" / "lost.png"),)


def test_an_image_in_two_splits_is_rejected_or_excluded_from_training(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    for label in COLORS:
        write_image(root / "test" / label / "t.jpg", make_image(label, 77))
    shutil.copy(root / "train" / "red" / "03.jpg", root / "test" / "red" / "copy.jpg")
    with pytest.raises(
        DataError, match=r"1 images are in more than one split(.|\n)*03.jpg \(train\) = .*copy.jpg \(test\)"
    ):
        prepare_data(config_of(root))
    manifest, _ = prepare_data(config_of(root, on_bad_file="skip"))
    paths = {Path(sample.path).name: sample.split for sample in manifest.samples if "red" in sample.path}
    assert paths["copy.jpg"] == "test" and "03.jpg" not in paths
    assert f"skipped 1 images whose copies are in another split, such as {root}/train/red/03.jpg" in caplog.text


def test_a_class_without_training_images_is_rejected(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    for number in range(3):
        write_image(root / "test" / "yellow" / f"{number}.jpg", make_image("green", 50 + number))
    with pytest.raises(DataError, match=r"have images in val or test, but none in train:\n  yellow"):
        prepare_data(config_of(root))


def test_drawn_splits_are_stratified_seeded_and_keep_copies_together(folder: Path) -> None:
    for number in range(6):
        shutil.copy(folder / "red" / "05.jpg", folder / "red" / f"copy{number}.jpg")
    manifest, fingerprint = prepare_data(config_of(folder))
    for split, share in (("val", 2), ("test", 4)):
        counts = manifest.counts(split)
        assert counts["blue"] == counts["green"] == share and counts["red"] >= share
    copies = {
        s.split for s in manifest.samples if (Path(s.path).name == "05.jpg" and "red" in s.path) or "copy" in s.path
    }
    assert len(copies) == 1
    assert prepare_data(config_of(folder)) == (manifest, fingerprint)
    other = config_of(folder).changed({"trainer.seed": 1})
    assert prepare_data(other)[1] != fingerprint


def test_too_few_images_to_split_are_rejected(tmp_path: Path) -> None:
    for label in COLORS:
        for number in range(2):
            write_image(tmp_path / "few" / label / f"{number}.png", make_image(label, number))
    with pytest.raises(DataError, match="6 images are too few to draw the split val;"):
        prepare_data(config_of(tmp_path / "few"))


def test_many_rare_label_sets_are_split(folder: Path) -> None:
    rows = [(f"{c}/{n:02}.jpg", f"{c};a{n % 5};b{n % 4}") for c in COLORS for n in range(20)]
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(folder / "m.csv", index=False)
    manifest, _ = prepare_data(config_of(folder / "m.csv"))
    assert [len(manifest.of(split)) for split in ("train", "val", "test")] == [42, 6, 12]


def test_written_splits_are_read_again(folder: Path, tmp_path: Path) -> None:
    manifest, fingerprint = prepare_data(config_of(folder))
    write_splits(manifest, tmp_path / "splits.csv")
    again, same = prepare_data(config_of(tmp_path / "splits.csv"))
    assert same == fingerprint and Counter(s.split for s in again.samples) == Counter(s.split for s in manifest.samples)


def test_a_failed_write_of_the_splits_keeps_the_old_file(folder: Path, tmp_path: Path) -> None:
    manifest, _ = prepare_data(config_of(folder))
    path = tmp_path / "out" / "splits.csv"
    write_splits(manifest, path)
    before = path.read_bytes()
    broken = replace(manifest.samples[0], text="\udcff", path="")  # which UTF-8 cannot encode
    with pytest.raises(UnicodeEncodeError):
        write_splits(manifest.with_samples([*manifest.samples, broken]), path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["splits.csv"]


def test_written_splits_hold_any_text(folder: Path, tmp_path: Path) -> None:
    odd = ["a\rb", "\r", 'say "no"', "two\nlines", "two\r\nlines", "a, b", " \\", '"']
    rows = [(f"{label}/{n:02}.jpg", label, odd[n]) for label in COLORS for n in range(8)]
    pd.DataFrame(rows, columns=["path", "label", "text"]).to_csv(folder / "m.csv", index=False, quoting=csv.QUOTE_ALL)
    manifest, _ = prepare_data(config_of(folder / "m.csv"))
    write_splits(manifest, tmp_path / "splits.csv")
    again = load_manifest(tmp_path / "splits.csv")
    assert [(s.text, s.split) for s in again.samples] == [(s.text, s.split) for s in manifest.samples]
    assert {s.text for s in manifest.samples} >= {'say "no"', "two\nlines"}


def test_multilabel_targets(folder: Path) -> None:
    table = pd.DataFrame(
        [(f"{c}/{n:02}.jpg", f"{c};all", s) for c in COLORS for n, s in enumerate(["train", "val", "test"])]
    )
    table.to_csv(folder / "m.csv", index=False, header=["path", "label", "split"])
    manifest, _ = prepare_data(config_of(folder / "m.csv"))
    data = ImageDataModule(
        manifest, augmenter=Augmenter("none", size=16), preprocess=Preprocess(16, 16), batch_size=8, workers=0
    )
    targets = next(iter(data.val_dataloader()))["targets"]
    assert targets.dtype == torch.float32
    np.testing.assert_array_equal(targets.numpy(), [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])


def test_copies_with_other_labels_are_rejected_or_excluded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(folder / "red" / "03.jpg", folder / "blue" / "copy.jpg")
    with pytest.raises(
        DataError, match=r"1 images have copies with other labels.*\n.*\((blue|red)\) = .*\((blue|red)\)"
    ):
        prepare_data(config_of(folder))
    manifest, _ = prepare_data(config_of(folder, on_bad_file="skip"))
    assert manifest.counts() == {"blue": 20, "green": 20, "red": 19}
    assert "skipped 2 images whose copies have other labels, such as " in caplog.text


@pytest.mark.parametrize("name", ["a;b", " blank", "cat\u200b"])
def test_a_class_folder_with_an_invalid_label_is_rejected(folder: Path, name: str) -> None:
    (folder / "red").rename(folder / name)
    with pytest.raises(DataError, match=re.escape(f"class folder {name!r} cannot be a label")):
        load_manifest(folder)


def test_a_class_of_three_has_one_image_in_each_split(tmp_path: Path) -> None:
    for label in COLORS:
        for number in range(3):
            write_image(tmp_path / "few" / label / f"{number}.jpg", make_image(label, number))
    manifest, _ = prepare_data(config_of(tmp_path / "few"))
    for split in ("train", "val", "test"):
        assert set(manifest.counts(split).values()) == {1}


def test_golden_images_of_odd_suffixes_have_plain_names(folder: Path, tmp_path: Path) -> None:
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    shutil.copy(folder / "red" / "00.jpg", tmp_path / "x.jpg(1)")
    golden_samples = make_golden_samples(
        classifier, Preprocess(32, 32), [Sample(str(tmp_path / "x.jpg(1)"), (0,))], task="multiclass"
    )
    assert [golden.name for golden in golden_samples] == ["00.img"]


def test_balanced_sampling_of_multilabel_data_is_rejected(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.png")) + sorted(folder.rglob("*.jpg"))
    table = pd.DataFrame(
        {"path": [str(f) for f in files], "label": [("a;b" if i % 2 else "b") for i in range(len(files))]}
    )
    table.to_csv(tmp_path / "m.csv", index=False)
    manifest, _ = prepare_data(config_of(tmp_path / "m.csv"))
    with pytest.raises(DataError, match=r"data\.sampler: balanced needs one label per image"):
        ImageDataModule(
            manifest, augmenter=Augmenter("none"), preprocess=Preprocess(32, 32), batch_size=4, balanced=True
        )


def test_further_columns_are_metadata_and_come_back_from_written_splits(folder: Path, tmp_path: Path) -> None:
    rows = [(f"{label}/{n:02}.jpg", label, f"camera {n % 2}", n) for label in COLORS for n in range(6)]
    pd.DataFrame(rows, columns=["path", "label", "camera", "hour"]).to_csv(folder / "m.csv", index=False)
    manifest, _ = prepare_data(config_of(folder / "m.csv"))
    assert manifest.samples[3].metadata == {"camera": "camera 1", "hour": "3"}
    write_splits(manifest, tmp_path / "splits.csv")
    assert load_manifest(tmp_path / "splits.csv").samples[3].metadata == {"camera": "camera 1", "hour": "3"}


def test_a_file_name_that_is_not_utf8_is_rejected(folder: Path) -> None:
    (folder / "red" / "00.jpg").rename(os.fsdecode(os.fsencode(folder / "red") + b"/caf\xe9.jpg"))
    with pytest.raises(DataError, match=r"1 file names are not UTF-8, such as b'.*caf.xe9.jpg'.* rename them"):
        load_manifest(folder)


def test_columns_of_bytes_and_trailing_commas_are_handled(folder: Path) -> None:
    table = pd.DataFrame(
        {"path": ["red/00.jpg", "blue/00.jpg"], "label": ["a", "b"], "hash": [b"\xff\xfe", b"\x00"], "n": [1, None]}
    )
    table.to_parquet(folder / "m.parquet")
    (first, second) = load_manifest(folder / "m.parquet").samples
    kinds = {"path": [b"red/00.jpg", b"blue/00.jpg"], "label": ["a", "b"], "split": [b"train", b"test"]}
    pd.DataFrame({**kinds, "camera": pd.Categorical(["c", "c"])}).to_parquet(folder / "n.parquet")
    manifest = load_manifest(folder / "n.parquet")
    assert manifest.splits() == ["train", "test"] and manifest.samples[0].metadata == {"camera": "c"}
    assert first.metadata == {"n": "1.0"} and second.metadata == {"n": ""}
    (folder / "m.csv").write_text("path,label\nred/00.jpg,a,\nblue/00.jpg,b,\n")
    with pytest.raises(DataError, match="more fields than the header"):
        load_manifest(folder / "m.csv")
    (folder / "m.csv").write_text("path,label\nred/00.jpg,a\nred,01.jpg,b\n")
    with pytest.raises(DataError, match="line 3: has more fields than the header"):
        load_manifest(folder / "m.csv")


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b"path;label", mtime=0),
        b"PK\x03\x04|[Content_Types].xml|" + bytes(range(128, 200)),
        "path;label\nx;a".encode("utf-16"),
        "pfad;größe\nx;a".encode("latin-1"),
        b"path;\x1b[2J;label\nx;a;b",
    ],
    ids=["gzip", "zip", "utf-16", "latin-1", "escape"],
)
def test_errors_of_binary_files_do_not_mention_separators(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.csv").write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_manifest(tmp_path / "m.csv")
    assert "separated by" not in str(caught.value)


def test_separators_in_quotes_are_text(folder: Path) -> None:
    (folder / "m.csv").write_text('"note;\nmore",path,label\nx,red/00.jpg,a\ny,blue/00.jpg,b\n')
    assert [dict(s.metadata) for s in load_manifest(folder / "m.csv").samples] == [
        {"note;\nmore": "x"},
        {"note;\nmore": "y"},
    ]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ("a,b,c\nd,e\n", 2),
        ("a,b\nd,e,f,g\n", 3),
        ("a,b,c\nd,e,f,g\n", 2),
        ('"a\nq",b\nd,e,f\n', 4),
        ("\na,b\n\nd,e,f\n", 5),
        ("a,b,\nd,e,\n", 2),
    ],
)
def test_the_error_of_a_row_with_extra_fields_names_its_line(tmp_path: Path, rows: str, line: int) -> None:
    (tmp_path / "m.csv").write_text(f"path,label\n{rows}")
    with pytest.raises(DataError, match=f"line {line}: has more fields than the header"):
        load_manifest(tmp_path / "m.csv")


def test_a_third_class_of_a_binary_config_names_the_value_to_set(tmp_path: Path) -> None:
    for label in ("ant", "bee", "wasp"):
        write_image(tmp_path / label / "0.jpg", make_image("red", 0))
    with pytest.raises(DataError, match=r"3 classes: ant, bee, wasp; set data\.task: multiclass"):
        load_manifest(tmp_path, "binary")
