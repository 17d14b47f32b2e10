"""One interface of data sources for training, scoring, drift and prediction, and the storage of their images."""

import hashlib
import io
import json
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, ClassVar

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refract.pipeline.data import sources, storage
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.image_paths import listed_images
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.data.new_data import read_data
from refract.pipeline.data.sources.source import Rows, Source
from refract.pipeline.data.splits import write_splits
from refract.pipeline.inference.batch.listing import listing_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose plain order of paths differs from the order folder by folder, with a broken link."""
    for name in ("a/z.png", "a-b/c.png", "a/b/1.JPG", "a/notes.txt"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    (tmp_path / "images" / "a" / "gone.png").symlink_to("/nowhere.png")
    monkeypatch.chdir(tmp_path)
    return Path("images")


def digest(root: Path, rows: list[list[str | None]]) -> str:
    return hashlib.sha256(str(root).encode() + b"".join(json.dumps(row).encode() + b"\n" for row in rows)).hexdigest()


def test_the_digest_of_a_folder_stays_that_of_scorings_of_earlier_versions(folder: Path, tmp_path: Path) -> None:
    plain = ["images/a-b/c.png", "images/a/b/1.JPG", "images/a/gone.png", "images/a/z.png"]
    assert listing_of(folder).digest() == digest(tmp_path, [[path, None, None] for path in plain])


def test_the_digest_of_a_table_stays_that_of_scorings_of_earlier_versions(folder: Path, tmp_path: Path) -> None:
    (folder / "m.csv").write_text("path,text,label,split,camera\n./a//z.png,hello,b;a,,x\n,alone,,,y\n")
    rows = [["./a//z.png", "hello", "b;a"], [None, "alone", ""]]
    assert listing_of(folder / "m.csv").digest() == digest(tmp_path / "images", rows)
    (folder / "m.csv").write_text("path\na/z.png\n")
    assert listing_of(folder / "m.csv").digest() == digest(tmp_path / "images", [["a/z.png", None, None]])


def test_training_drift_and_prediction_list_a_folder_in_one_order(folder: Path) -> None:
    expected = ["images/a/b/1.JPG", "images/a/z.png", "images/a-b/c.png"]
    assert [sample.path for sample in load_manifest(folder).samples] == expected
    assert [sample.path for sample in read_data(str(folder), ["a"], multilabel=False).samples] == expected
    assert [*map(str, listed_images([folder]))] == expected


def test_an_unknown_source_names_what_is_accepted(folder: Path) -> None:
    Path("notes.txt").touch()
    with pytest.raises(DataError, match="notes.txt: got a .txt file; expected a folder, .*manifest, or `digits`$"):
        load_manifest("notes.txt")
    with pytest.raises(DataError, match="got a .png file; expected a folder, .*or a .csv, .*`refract predict` takes"):
        listing_of(folder / "a" / "z.png")
    with pytest.raises(DataError, match="digits: no such folder or file"):
        listing_of(Path("digits"))


class Numbers(Source):
    """`numbers:N`: N texts."""

    accepts: ClassVar[str] = "`numbers:N`"

    @classmethod
    def recognises(cls, name: str) -> bool:
        return name.startswith("numbers:")

    def rows(self, *, labelled: bool) -> Rows:
        numbers = [str(i) for i in range(int(self.name.partition(":")[2]))]
        labels = ["even" if int(number) % 2 == 0 else "odd" for number in numbers]
        return Rows(self.name, [""] * len(numbers), labels=labels if labelled else None, texts=numbers)


def test_a_further_kind_of_source_serves_training_scoring_and_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SOURCES", MappingProxyType({**sources.SOURCES, "numbers": Numbers}))
    manifest = load_manifest("numbers:3")
    assert [(sample.text, manifest.labels[sample.labels[0]]) for sample in manifest.samples] == [
        ("0", "even"), ("1", "odd"), ("2", "even"),
    ]  # fmt: skip
    assert [row.text for row in listing_of(Path("numbers:3")).rows] == ["0", "1", "2"]
    data = read_data("numbers:3", ["even"], multilabel=False)
    assert [sample.text for sample in data.samples] == ["0", "1", "2"] and data.names is None
    with pytest.raises(DataError, match="or `numbers:N`"):
        load_manifest(__file__)


class Memory:
    def open(self, path: str) -> BinaryIO:
        if not path.endswith(".png"):
            raise FileNotFoundError(2, "No such object", path)
        return io.BytesIO(path.encode())


def test_a_further_storage_needs_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.csv").write_text("file,label\nmem://bucket/0.png,a\nmem://bucket/1.png,b\nmem://bucket/2.gif,b\n")
    with pytest.raises(DataError, match="no column 'path'"):
        load_manifest(tmp_path / "m.csv")
    monkeypatch.setattr(storage, "STORAGES", MappingProxyType({"mem": Memory()}))
    manifest = load_manifest(tmp_path / "m.csv")
    assert [sample.path for sample in manifest.samples][:2] == ["mem://bucket/0.png", "mem://bucket/1.png"]
    assert manifest.samples[0].read() == b"mem://bucket/0.png"
    assert storage.sha256("mem://bucket/0.png") == hashlib.sha256(b"mem://bucket/0.png").hexdigest()
    with pytest.raises(OSError, match="No such object"):
        manifest.samples[2].read()
    assert listing_of(tmp_path / "m.csv").rows[0].path == "mem://bucket/0.png"
    write_splits(manifest, tmp_path / "splits.csv")
    assert pd.read_csv(tmp_path / "splits.csv")["path"][0] == "mem://bucket/0.png"


@given(
    st.sampled_from([".", "..", "/", "/data", "some/data"]),
    st.lists(st.sampled_from(["a", "b c", ".", "..", "", ".x", "x.", "ä"]), min_size=1, max_size=5),
    st.sampled_from(["", "/", "//", "./"]),
)
def test_the_path_of_a_row_is_the_one_that_pathlib_gives(root: str, parts: list[str], start: str) -> None:
    path = start + "/".join(parts)
    rows = Rows("m.csv", [path], root=Path(root))
    if rows.has_image(0):
        assert rows.file(0) == str(Path(root) / path)
