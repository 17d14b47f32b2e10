"""Reading tables: separators, encodings, column names, paths, and errors with line and column."""

import csv
import io
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refract.pipeline.data.manifest import DataError, load_manifest
from refract.pipeline.data.new_data import read_data
from refract.pipeline.data.sources.tables import read_table
from refract.pipeline.data.texts import texts_of
from refract.pipeline.inference.batch.listing import listing_of

Write = Callable[..., Path]
IMAGES = ("img/0.png", "img/1.png", "img/ä b.png", "img/a, b.png")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a manifest next to the images `IMAGES`."""
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def written(data: str | bytes, name: str = "m.csv") -> Path:
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return tmp_path / name

    return written


def read(file: Path) -> list[tuple[str, str]]:
    """(path below the manifest's folder, label) of each sample, as training, scoring and drift all read them."""
    manifest = load_manifest(file)
    rows = [
        (sample.path.removeprefix(f"{file.parent}/"), manifest.labels[sample.labels[0]]) for sample in manifest.samples
    ]
    assert [(file.parent / str(row.path), row.truth) for row in listing_of(file).rows] == [
        (file.parent / path, label) for path, label in rows
    ]
    data = read_data(str(file), ["a"], multilabel=False)
    assert [sample.path for sample in data.samples] == [sample.path for sample in manifest.samples]
    assert data.names == [(label,) for _, label in rows]
    return rows


EXPECTED = [("img/0.png", "a"), ("img/1.png", "b")]


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nimg/0.png,a\nimg/1.png,b\n",
        "path, label\nimg/0.png, a\nimg/1.png, b\n",
        " path ,label\t\n img/0.png , a \n\timg/1.png,b\n",
        "Path,LABEL\nimg/0.png,a\nimg/1.png,b\n",
        "\ufeffpath,label\r\nimg/0.png,a\r\nimg/1.png,b\r\n",
        "path,label\rimg/0.png,a\rimg/1.png,b\r",
        "path,label\nimg\\0.png,a\n.\\img\\1.png,b\n",
        "path;label\nimg/0.png;a\nimg/1.png;b\n",
        "path\tlabel\nimg/0.png\ta\nimg/1.png\tb\n",
        "path|label\nimg/0.png|a\nimg/1.png|b\n",
        "sep=;\npath;label\nimg/0.png;a\nimg/1.png;b\n",
        '"path", "label"\n"img/0.png", "a"\n"img/1.png", "b"\n',
        "path,label\nimg/0.png,a\n\n   \nimg/1.png,b\n,\n\n",
        "path,label\n'img/0.png',a\n'img/1.png',b\n",
        "path,label\n'img/0.png','a'\n'img/1.png', 'b' \n",
        "path,label,camera\nimg/0.png,a,x\n,,\n , ,\t\n,\nimg/1.png,b,y\n",
        "path,label\nimg/0.png,\ufeffa\u200b\n\ufeffimg/1.png,b\u00a0\n",
        "filename,class\nimg/0.png,a\nimg/1.png,b\n",
        "Image Path,Class-Name\nimg/0.png,a\nimg/1.png,b\n",
        "path,label\r\nimg/0.png,a\r\nimg/1.png,b\r\n\x1a",
        "path,label,,\nimg/0.png,a,,\nimg/1.png,b,,\n,,,\n",
        "image;category\nimg/0.png;a\nimg/1.png;b\n",
        "\n\npath,label\nimg/0.png,a\nimg/1.png,b",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32"])
def test_unambiguous_tables_are_read(write: Write, text: str, encoding: str) -> None:
    rows = read(write(text.encode(encoding)))
    assert rows == EXPECTED


def test_file_urls_and_other_unicode_forms_are_paths(write: Write, tmp_path: Path) -> None:
    address = (tmp_path / "img" / "ä b.png").as_uri()
    other = unicodedata.normalize("NFD", "img/ä b.png")
    file = write(f'path,label\n{address},a\n{other},b\n"img/a, b.png",b\n{tmp_path}/img/0.png,a\n')
    assert [path for path, _ in read(file)] == ["img/ä b.png", "img/ä b.png", "img/a, b.png", "img/0.png"]
    assert "%20" in address


def test_a_file_with_the_literal_name_has_precedence(write: Write, tmp_path: Path) -> None:
    for name in (" x.png", "img\\0.png"):
        (tmp_path / name).touch()
    assert read(write('path,label\n" x.png",a\nimg\\0.png,b\n')) == [(" x.png", "a"), ("img\\0.png", "b")]


def test_unicode_forms_of_a_label_are_one_label(write: Write) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    file = write(f"path,label\nimg/0.png,{forms[0]}\nimg/1.png,{forms[1]}\nimg/0.png,dog\n")
    assert load_manifest(file).labels == ("café", "dog")


def test_common_split_names_are_accepted(write: Write) -> None:
    file = write("path,label,Subset\nimg/0.png,a,Training\nimg/1.png,b, validation\nimg/1.png,b,TEST\n")
    manifest = load_manifest(file)
    assert [sample.split for sample in manifest.samples] == ["train", "val", "test"]
    assert manifest.notes == ("the column 'Subset' is read as split",)
    captions = write("text,label,split\nx,a,Train\ny,b,test\n", "t.csv")
    assert texts_of(captions, "train") == ["x"]


def test_an_ambiguous_column_stays_metadata(write: Write) -> None:
    file = write("path,label,class,image,subset\nimg/0.png,a,1,x,seen\nimg/1.png,b,2,y,unseen\n")
    manifest = load_manifest(file)
    assert manifest.samples[0].metadata == {"class": "1", "image": "x", "subset": "seen"} and manifest.splits() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\ngone.jpg,x\n", "no column 'path'.*; columns: file, label; needed: .*; rename 'file' to path, if it has"),
        ("path,class,category\nimg/0.png,a,b\n", "no column 'label'.* rename 'class' to label or 'category' to label"),
        ("img/0.png,a\nimg/1.png,b\n", r"no column 'path'.*; columns: 'img/0.png', a; .*the first line names the columns"),
        ("Path,PATH,label\nx,y,a\n", "'Path' and 'PATH' both denote the column path"),
        ("path,path,label\nx,y,a\n", "line 1: the column 'path' occurs twice"),
        ("path;label,text\nx;a,b\n", "the header separates columns by ',' and by ';'"),
        ("path;label\nx;a;b\n", "line 2: has more fields than the header"),
        ("path,label\nx\n", r"line 2: has 1 of 2 fields; column 'label' is missing"),
        ('path,label\n"a\nb",x\n"c,y\nd,z\n', "line 4: a quote is opened and never closed"),
        ('path,label\n"c"d,y\n', "line 2: .*double the quotes inside it"),
        ("path,label\na\0.png,x\n", "line 2, column 'path': contains a zero byte"),
        ("path,label\na,x\npath,label\nb,y\n", "line 3: repeats the header"),
        ("path,label\nimg/0.png,a\nC:\\data\\1.png,b\n", "line 3, column 'path': .* is a path on a Windows machine"),
        ("path,label\n\\\\server\\x\\1.png,b\n", "line 2, column 'path': .* is a path on a Windows machine"),
        ("path,label\nftp://host/1.png,b\n", "line 2, column 'path': .* is a URL that Refract does not read; accepted: s3://, gs://, az://"),
        ("path,label\nimg/0.png,café\n".encode("cp1252"), "line 2, column 'label': .*byte 0xE9 is not UTF-8.*iconv"),
        ("path;note;label\nx;é;a\n".encode("cp1252"), "line 2, column 'note': .*byte 0xE9 is not UTF-8"),
        (b"PK\x03\x04rest", "it is a ZIP archive, as .xlsx files are"),
        ("path,label\n".encode("utf-16") + b"\x00", "is not valid UTF-16"),
        ("path,label\n\n,\n", "no rows"),
        ("path,label\nimg/0.png,a\n\0\0\0", "line 3: contains zero bytes, probably because the file is incomplete"),
        ("# by me\npath,label\nimg/0.png,a\n", "the first line has no column that Refract reads; columns: '# by me'"),
    ],
)  # fmt: skip
def test_ambiguous_values_are_rejected_with_location_and_remedy(write: Write, text: str | bytes, message: str) -> None:
    for entry in (load_manifest, listing_of, lambda file: read_data(str(file), ["a"], multilabel=False)):
        if entry is load_manifest or "no column 'label'" not in message:
            with pytest.raises(DataError, match=message):
                entry(write(text))


def test_a_short_row_lacks_only_texts_and_metadata(write: Write) -> None:
    file = write("path,label,text,camera\nimg/0.png,a\nimg/1.png,b,hello\n")
    first, second = load_manifest(file).samples
    assert (first.text, second.text, second.metadata) == ("", "hello", {"camera": ""})


def test_an_empty_label_is_rejected_with_a_hint_at_multilabel(write: Write) -> None:
    with pytest.raises(
        DataError, match=r"line 3: label '' is not a class name .1 such rows.; .*`a;b` and set data.task"
    ):
        load_manifest(write("path,label\nimg/0.png,a\nimg/1.png,\n"))


def test_rows_without_a_label_are_counted(write: Write) -> None:
    manifest = load_manifest(write("path,label\nimg/0.png,a;b\nimg/1.png,\n"))
    assert "1 rows have no label, such as" in manifest.notes[0] and "m.csv, line 3" in manifest.notes[0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["'a'", "'b'", "''"], [("a",), ("b",), ()]),
        (["'a;b'", "'b';'a'"], [("a", "b"), ("b", "a")]),
        (["'a';'b'", "b;a'"], [("'a'", "'b'"), ("b", "a'")]),
    ],
)
def test_single_quotes_around_all_labels_are_removed(write: Write, labels: list[str], expected: list[tuple]) -> None:
    manifest = load_manifest(write("path,label\n" + "".join(f"img/0.png,{one}\n" for one in labels)), "multilabel")
    assert [tuple(manifest.labels[i] for i in sample.labels) for sample in manifest.samples] == expected


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["circle", "square", "circle,square"], "circle,square looks like .* write circle;square and set data.task"),
        (
            ["a, b", "b, c", "a, c"],
            "a, b looks like multiple labels of one image .3 such labels.; if so, write a;b and",
        ),
        (["a|b", "b|c", "c"], "write b;c"),
        (["red", "blue", "red blue"], "write red;blue"),
        (["red car", "blue car", "red bus", "blue bus"], ""),
        (["Paris, France", "Lyon, France", "Rome, Italy"], ""),
        (["a;b", "a,b", "a"], "write a;b$"),
    ],
)
def test_labels_that_look_like_multiple_labels_are_noted(write: Write, labels: list[str], note: str) -> None:
    manifest = load_manifest(write("path\tlabel\n" + "".join(f"img/0.png\t{one}\n" for one in labels)))
    notes = " ".join(one for one in manifest.notes if "looks like" in one)
    assert bool(note) == bool(notes) and re.search(note, notes)


def test_parquet_tables_are_read_by_the_same_names(write: Write, tmp_path: Path) -> None:
    frame = pd.DataFrame({" File_Name": ["img\\0.png", "img/1.png"], "Label ": [" a", "b"], "tags": [["x"], ["y"]]})
    frame.to_parquet(tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet") == EXPECTED
    frame.drop(columns="Label ").to_parquet(tmp_path / "n.parquet")
    with pytest.raises(DataError, match="no column 'label'"):  # not the lists of `tags`
        load_manifest(tmp_path / "n.parquet")


VALUES = st.text("aBé,;|\t\"' \\漢\u0301\u200b", min_size=1, max_size=8).filter(lambda value: value.strip(" \t\u200b"))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=5),
    mark=st.sampled_from(",;\t|"),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    header=st.sampled_from([("label", "text"), ("Label", " TEXT"), ("text", "label"), ("label", "text ", "more")]),
)
def test_any_text_survives_every_separator_and_encoding(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], mark: str, ending: str, encoding: str, header
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.csv"
    target = io.StringIO()
    csv.writer(target, delimiter=mark, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows(
        [header, *((*row, "x")[: len(header)] for row in rows)]
    )
    file.write_bytes(target.getvalue().encode(encoding))
    table, texts = read_table(file), [name.strip().lower() for name in header]
    assert table.texts("text") == [row[texts.index("text")] for row in rows]
    labels = [unicodedata.normalize("NFC", row[texts.index("label")].strip().strip(" \t\u200b")) for row in rows]
    if all(len(label) > 1 and label[0] == label[-1] == "'" for label in labels):
        labels = [label[1:-1].replace("';'", ";").strip().strip(" \t\u200b") for label in labels]
    assert table.texts("label") == labels and table.where(0) == f"{file}, line 2"


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | st.text("pathlbe,;\t\"'\n\r\0 \\:", max_size=60).map(str.encode)
)
def test_any_bytes_are_a_table_or_rejected(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.csv"
    for head in (b"", b"path,label\n", b"path;label\n"):
        file.write_bytes(head + data)
        try:
            table = read_table(file)
        except DataError as error:
            assert str(file) in str(error)
        else:
            assert len(table) == len(table.lines) > 0
