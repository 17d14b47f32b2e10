"""Images in Parquet tables, saved data sets and WebDatasets: the same samples as in the folder."""

import json
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import COLORS, tar_of

from refract.augment.image_files import is_image
from refract.pipeline.data.archives.archive import archive_path
from refract.pipeline.data.manifest import DataError, Manifest, load_manifest
from refract.pipeline.data.scan import scan
from refract.pipeline.data.sources import open_source
from refract.pipeline.data.splits import write_splits
from refract.pipeline.inference.batch.listing import listing_of

NUMBERS = range(10)


def hugging_face(features: dict[str, object]) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


@pytest.fixture(scope="module")
def folder(archives: Path) -> Manifest:
    return load_manifest(archives / "images")


@pytest.fixture(scope="module")
def table(folder: Manifest) -> pa.Table:
    """A table as Hugging Face `datasets` writes it: structs of bytes and path, class numbers and their names, and a further column."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(folder.labels), "_type": "ClassLabel"}}
    return pa.table({
        "image": [{"bytes": sample.read(), "path": Path(sample.path).name} for sample in folder.samples],
        "label": [sample.labels[0] for sample in folder.samples],
        "path": [f"original {number}" for number in range(len(folder.samples))],
    }).replace_schema_metadata(hugging_face(features))  # fmt: skip


def check_equal(manifest: Manifest, folder: Manifest) -> None:
    names = [[one.labels[sample.labels[0]] for sample in one.samples] for one in (manifest, folder)]
    assert names[0] == names[1]
    assert [sample.read() for sample in manifest.samples] == [sample.read() for sample in folder.samples]
    assert scan(manifest.samples).content(manifest) == scan(folder.samples).content(folder)
    assert all(is_image(sample.path) for sample in manifest.samples)


def test_a_parquet_table_with_images_gives_the_samples_of_the_folder(table: pa.Table, folder: Manifest) -> None:
    pq.write_table(table, "hf.parquet")
    manifest = load_manifest("hf.parquet")
    check_equal(manifest, folder)
    assert manifest.samples[3].path == "hf.parquet/0000004.png"
    assert manifest.samples[3].metadata == {"path (original)": "original 3"}
    pq.write_table(pa.table({"photo": [s.read() for s in folder.samples], "class": names_of(folder)}), "plain.parquet")
    check_equal(load_manifest("plain.parquet"), folder)
    assert listing_of(Path("hf.parquet")).rows[0].path == "hf.parquet/0000001.png"
    write_splits(manifest, Path("splits.csv"))
    check_equal(load_manifest("splits.csv"), folder)


def names_of(folder: Manifest) -> list[str]:
    return [folder.labels[sample.labels[0]] for sample in folder.samples]


def test_parquet_files_of_a_hub_layout_have_the_splits_of_their_names(table: pa.Table, folder: Manifest) -> None:
    Path("hub/data").mkdir(parents=True)
    Path("hub/README.md").touch()
    pq.write_table(table.slice(0, 10), "hub/data/test-00000-of-00001.parquet")
    pq.write_table(table.slice(10, 15), "hub/data/train-00000-of-00002.parquet")
    pq.write_table(table.slice(25), "hub/data/train-00001-of-00002.parquet")
    for source in ("hub", "hub/data"):
        manifest = load_manifest(source)
        check_equal(manifest, folder)
        assert [sample.split for sample in manifest.samples] == ["test"] * 10 + ["train"] * 20
    manifest = load_manifest("hub/data/train-{00000..00001}-of-00002.parquet")
    assert len(manifest.samples) == 20
    pq.write_table(table.slice(0, 2), "hub/data/more.parquet")
    with pytest.raises(DataError, match=r"hub: more.parquet names no split, but test-.*parquet does"):
        load_manifest("hub")


def test_missing_images_labels_and_lists_of_labels(folder: Manifest) -> None:
    images = [folder.samples[0].read(), None, folder.samples[1].read(), folder.samples[2].read()]
    names = {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}
    features = {"image": {"_type": "Image"}, "labels": names}
    labels = [[0], [0, 1], [], [1]]
    texts = ["a", "b", "c", "d"]
    content = pa.table({"image": images, "labels": labels, "text": texts}).replace_schema_metadata(
        hugging_face(features)
    )
    pq.write_table(content, "a.parquet")
    manifest = load_manifest("a.parquet", "multilabel")
    assert [[manifest.labels[i] for i in sample.labels] for sample in manifest.samples] == [
        ["cat"], ["cat", "dog"], [], ["dog"],
    ]  # fmt: skip
    assert [sample.has_image for sample in manifest.samples] == [True, False, True, True]
    numbers = {"image": {"_type": "Image"}, "label": names["feature"]}
    content = pa.table({"image": images[2:], "label": [0, -1]}).replace_schema_metadata(hugging_face(numbers))
    pq.write_table(content, "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet, row 2: label '' is not a class name"):
        load_manifest("b.parquet")


def test_unclear_and_damaged_tables_of_images_are_refused(table: pa.Table) -> None:
    two = pa.table({"img": [b"1"], "photo": [b"2"], "label": ["a"]})
    pq.write_table(two, "two.parquet")
    with pytest.raises(DataError, match=r"two.parquet: the columns 'img', 'photo' may all be the image; name the one"):
        load_manifest("two.parquet")
    pq.write_table(table, "a.parquet")
    content = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as a PARQUET table"):
        load_manifest("a.parquet")
    Path("a.parquet").write_bytes(content[:4] + bytes(2000) + content[2004:])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as a PARQUET table"):
        load_manifest("a.parquet")


def save(table: pa.Table, folder: Path, rows: int, options: pa.ipc.IpcWriteOptions | None = None) -> None:
    """Write a folder as `Dataset.save_to_disk` does, in record batches of `rows` rows."""
    folder.mkdir(parents=True)
    file = "data-00000-of-00001.arrow"
    with (
        pa.OSFile(str(folder / file), "wb") as target,
        pa.ipc.new_stream(target, table.schema, options=options) as writer,
    ):
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file}]}))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_data_sets_give_the_samples_of_the_folder(table: pa.Table, folder: Manifest) -> None:
    save(table, Path("saved"), 7)
    check_equal(load_manifest("saved"), folder)
    save(table.slice(0, 10), Path("splits/test"), 100)
    save(table.slice(10), Path("splits/train"), 3)
    Path("splits/dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    manifest = load_manifest("splits")
    check_equal(manifest, folder)
    assert {sample.split for sample in manifest.samples[10:]} == {"train"}
    save(table, Path("compressed"), 100, pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(DataError, match=r"compressed/data-.*arrow: is compressed; save the data set again"):
        load_manifest("compressed")
    Path("saved/state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')
    with pytest.raises(DataError, match=r"state.json: names '../other.arrow', not an .arrow file in the folder"):
        load_manifest("saved")


def test_webdataset_tars_give_the_samples_of_the_folder(folder: Manifest) -> None:
    names = names_of(folder)
    members = [
        [
            (f"{i:04}.png", sample.read()),
            (f"{i:04}.cls", f"{names[i]}\n".encode()),
            (f"{i:04}.txt", f"text {i}".encode()),
        ]
        for i, sample in enumerate(folder.samples)
    ]
    Path("wds").mkdir()
    tar_of("wds/train-000000.tar", *chain(*members[:12]))
    tar_of("wds/train-000001.tar", *chain(*members[12:]))
    for source in ("wds", "wds/train-{000000..000001}.tar"):
        manifest = load_manifest(source)
        check_equal(manifest, folder)
        assert [sample.text for sample in manifest.samples] == [f"text {i}" for i in range(30)]
        assert {sample.split for sample in manifest.samples} == {"train"}
    described = [
        [(f"{i:04}.png", sample.read()), (f"{i:04}.json", json.dumps({"label": names[i], "camera": i}).encode())]
        for i, sample in enumerate(folder.samples)
    ]
    manifest = load_manifest(tar_of("a.tar", *chain(*described)))
    check_equal(manifest, folder)
    assert manifest.samples[5].metadata == {"camera": "5"}


def test_webdataset_tars_with_errors_are_refused() -> None:
    with pytest.raises(DataError, match=r"a.tar: the sample '1' has two images \(1.png, 1.jpg\)"):
        load_manifest(tar_of("a.tar", ("1.png", b"1"), ("1.jpg", b"2"), ("1.cls", b"0")))
    with pytest.raises(DataError, match=r"a.tar: the sample '2' has no image \(2.cls\)"):
        load_manifest(tar_of("a.tar", ("1.png", b"1"), ("1.cls", b"0"), ("2.cls", b"0")))
    with pytest.raises(DataError, match=r"a.tar/1.json: is not JSON"):
        load_manifest(tar_of("a.tar", ("1.png", b"1"), ("1.cls", b"0"), ("1.json", b"{")))
    with pytest.raises(DataError, match=r"a.tar/1.cls: is not UTF-8"):
        load_manifest(tar_of("a.tar", ("1.png", b"1"), ("1.cls", b"\xff")))
    with pytest.raises(DataError, match=r"b-1.tar: no such file \(2 of the 2 files of b-\{1..2\}.tar are missing\)"):
        load_manifest("b-{1..2}.tar")
    with pytest.raises(DataError, match=r"b-\{2..1\}.tar: \{2..1\} is not a range"):
        load_manifest("b-{2..1}.tar")


def test_a_tar_with_class_folders_and_texts_is_not_a_webdataset() -> None:
    members = [(f"{label}/{number}.{suffix}", b"1") for label in COLORS for number in "12" for suffix in ("png", "txt")]
    manifest = load_manifest(tar_of("a.tar", *members))
    assert manifest.labels == tuple(sorted(COLORS)) and len(manifest.samples) == 6
    assert archive_path("a.tar/blue/1.png") == ("a.tar", "blue/1.png")


def test_the_columns_of_a_webdataset_are_in_the_order_of_its_fields() -> None:
    fields = {name: name for name in ("weight", "alpha", "zoo", "label", "beta", "gamma", "delta")}
    samples = [[(f"{key}.png", b"1"), (f"{key}.json", json.dumps(fields | {"label": key}).encode())] for key in "ab"]
    rows = open_source(tar_of("a.tar", *chain(*samples))).rows(labelled=True)
    assert [*rows.metadata] == ["weight", "alpha", "zoo", "beta", "gamma", "delta"]  # in any process


def test_json_that_is_nested_too_deeply_or_of_other_types_is_refused_or_ignored() -> None:
    deep = b"[" * 100_000
    with pytest.raises(DataError, match="a.tar/1.json: is not JSON .*; write an object"):
        load_manifest(tar_of("a.tar", ("1.png", b"1"), ("1.cls", b"a"), ("1.json", deep)))
    table = pa.table({"image": [b"1", b"2"], "label": ["a", "b"]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": deep}), "a.parquet")
    assert load_manifest("a.parquet").labels == ("a", "b")
    Path("saved/train").mkdir(parents=True)
    for splits, files, problem in (
        (deep.decode(), "{}", "dataset_dict.json: cannot be read as JSON"),
        ('{"splits": null}', "{}", "dataset_dict.json: 'splits' is not a list; save the data set again"),
        ('{"splits": ["train"]}', '{"_data_files": 1}', "train/state.json: '_data_files' is not a list"),
        ('{"splits": ["train"]}', '{"_data_files": ["a.arrow"]}', "train/state.json: names '', not an .arrow file"),
    ):
        Path("saved/dataset_dict.json").write_text(splits)
        Path("saved/train/state.json").write_text(files)
        with pytest.raises(DataError, match=problem):
            load_manifest("saved")
