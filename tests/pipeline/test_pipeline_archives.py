"""Class folders in zips and tars: the same samples as in the folder, in any process; and the cache of unpacked archives."""

import fcntl
import json
import os
import resource
import shutil
import warnings
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from small_data import paint

from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data import cache, storage
from refract.pipeline.data.archives.archive import index_of_archive
from refract.pipeline.data.cache import CacheError
from refract.pipeline.data.image_paths import listed_images
from refract.pipeline.data.manifest import DataError, Manifest, load_manifest
from refract.pipeline.data.new_data import read_data
from refract.pipeline.data.scan import scan
from refract.pipeline.data.splits import draw_splits, write_splits
from refract.pipeline.inference.batch.listing import listing_of
from refract.pipeline.training.run import train

NUMBERS = range(10)


def images_of(manifest: Manifest, root: str) -> list[tuple[str, str, str]]:
    """Return (path below the root, label, split) of each sample, in order."""
    return [(s.path.removeprefix(f"{root}/"), manifest.labels[s.labels[0]], s.split) for s in manifest.samples]


ARCHIVES = ("photos.zip", "stored.zip", "photos.tar", "photos.tar.gz", "photos.tar.bz2", "photos.tar.xz")


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_gives_the_samples_labels_splits_and_content_of_its_folder(
    name: str, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(archives)
    folder, archive = load_manifest("images"), load_manifest(name)
    assert images_of(archive, name) == images_of(folder, "images")
    scans = scan(folder.samples), scan(archive.samples)
    assert [*scans[1].hashes.values()] == [*scans[0].hashes.values()]
    drawn = [
        [s.split for s in draw_splits(m, one.groups, val_fraction=0.2, test_fraction=0.2, seed=1).samples]
        for m, one in zip((folder, archive), scans, strict=True)
    ]
    assert drawn[0] == drawn[1]
    skipped = [(len(m.skipped.others), len(m.skipped.hidden), len(m.loose)) for m in (folder, archive)]
    assert skipped[0] == skipped[1] == (1, 1, 1)


def test_classes_below_the_only_folder_of_an_archive_are_found_with_a_note(
    archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(archives)
    for name in ("wrapped.zip", "wrapped.tar"):
        manifest = load_manifest(name)
        assert images_of(manifest, f"{name}/images") == images_of(load_manifest("images"), "images")
        assert f"the classes are read from {name}/images, the only folder in {name}" in manifest.notes
    inner = load_manifest("wrapped.zip/images")
    assert len(inner.samples) == 30 and not any("the only folder" in note for note in inner.notes)
    with pytest.raises(DataError, match="wrapped.zip/nothing: no such folder in the archive wrapped.zip"):
        load_manifest("wrapped.zip/nothing")


def test_split_folders_and_empty_classes_are_read_as_in_a_folder(tmp_path: Path) -> None:
    paint(tmp_path / "images" / "train", range(2))
    (tmp_path / "images" / "train" / "violet").mkdir()
    for kind, suffix in (("zip", "zip"), ("tar", "tar")):
        shutil.make_archive("a", kind, "images")
        manifest = load_manifest(f"a.{suffix}")
        assert {sample.split for sample in manifest.samples} == {"train"}
        assert manifest.empty == (f"a.{suffix}/train/violet",) and "violet" in manifest.labels


def test_scoring_drift_prediction_and_tables_read_members(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(archives)
    rows = [row.path for row in listing_of(Path("photos.zip")).rows]
    assert len(rows) == 31 and "photos.zip/blue/deep/0.png" in rows
    assert len(read_data("photos.tar", ["blue"], multilabel=False).samples) == 31
    assert len(listed_images([Path("photos.zip/green"), Path("photos.tar/loose.png")])) == 11
    first = Path("images/blue/004.png").read_bytes()
    assert storage.read("photos.tar.gz/blue/004.png") == first
    pd.DataFrame({"file": ["photos.zip/blue/004.png", "images/green/000.png"], "class": ["a", "b"]}).to_csv("m.csv")
    table = load_manifest("m.csv")
    assert table.samples[0].read() == first
    write_splits(load_manifest("photos.zip"), Path("splits.csv"))
    assert load_manifest("splits.csv").samples[0].read() == load_manifest("photos.zip").samples[0].read()
    with pytest.raises(FileNotFoundError):
        storage.read("photos.zip/blue/nothing.png")
    with pytest.raises(NotADirectoryError):
        storage.read("images/blue/004.png/inner.png")


def config(source: Path, name: str, **data: object) -> Config:
    return config_from_dict({
        "data": {"source": str(source), "image_size": 16, "batch_size": 8, "memory": "never", **data},
        "augment": {"policy": [{"HorizontalFlip": {"p": 0.5}}, {"Rotate": {"degrees": 20}}]},
        "model": {"name": "cnn", "args": {"widths": [4, 8]}},
        "trainer": {"max_epochs": 1, "run_name": name, "runs_dir": "runs", "device": "cpu"},
        "tracking": {"enabled": False}, "evaluation": {"robustness": "none"},
    })  # fmt: skip


@pytest.mark.slow
def test_training_from_a_zip_or_tar_gives_the_weights_of_the_folder(archives: Path) -> None:
    train(config(archives / "images", "folder", workers=0))
    for name, workers in (("photos.zip", 2), ("photos.tar", 0)):
        train(config(archives / name, name, workers=workers))
        weights = [load_file(Path("runs") / run / "bundle" / "weights.safetensors") for run in ("folder", name)]
        assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
        identities = [
            json.loads((Path("runs") / run / "bundle" / "bundle.json").read_text()) for run in ("folder", name)
        ]
        assert identities[0]["data"]["fingerprint"] == identities[1]["data"]["fingerprint"]


def _contents(paths: Sequence[str]) -> list[bytes]:
    return [storage.read(path) for path in paths]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_members_at_once(method: str, archives: Path) -> None:
    paths = [sample.path for sample in load_manifest(archives / "stored.zip").samples]
    expected = _contents(paths)
    with get_context(method).Pool(3) as pool, warnings.catch_warnings():
        assert pool.map(_contents, [paths, paths[::-1], paths]) == [expected, expected[::-1], expected]


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    for number in (0, 5):
        shutil.rmtree("images", ignore_errors=True)
        paint(tmp_path / "images", range(number, number + 3))
        shutil.make_archive("a", "zip", "images")
        shutil.make_archive("a", "gztar", "images")
        for name in ("a.zip", "a.tar.gz"):
            manifest = load_manifest(name)
            assert manifest.samples[0].path == f"{name}/blue/{number:03}.png"
            assert manifest.samples[0].read() == Path(f"images/blue/{number:03}.png").read_bytes()


def test_the_index_is_stored_once_and_a_damaged_one_is_replaced(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copy(archives / "photos.tar", "a.tar")
    names = index_of_archive("a.tar").names
    (stored,) = (tmp_path / "cache" / "data" / "indexes").glob("*/*")
    content = stored.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * len(content)):
        stored.write_bytes(damaged)
        from refract.pipeline.data.archives import archive

        archive._indexes.clear()  # as in another process
        assert index_of_archive("a.tar").names == names
    monkeypatch.setenv("REFRACT_CACHE_DIR", "/proc/nowhere")
    archive._indexes.clear()
    assert index_of_archive("a.tar").names == names  # an index is not worth an error


def test_an_archive_that_the_cache_cannot_hold_is_refused(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(archives / "photos.tar.gz", "a.tar.gz")
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(Path("small").absolute()))
    monkeypatch.setenv("REFRACT_CACHE_SIZE", "40KB")
    with pytest.raises(
        CacheError, match=r"a.tar.gz: is larger than the cache \(40,000 bytes\); raise REFRACT_CACHE_SIZE"
    ):
        load_manifest("a.tar.gz")
    assert not [*Path("small").glob("data/archives/*/*")]
    monkeypatch.setenv("REFRACT_CACHE_SIZE", "much")
    with pytest.raises(CacheError, match="REFRACT_CACHE_SIZE: 'much' is not a size"):
        load_manifest("a.tar.gz")
    monkeypatch.delenv("REFRACT_CACHE_SIZE")
    monkeypatch.setenv("REFRACT_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(CacheError, match="cannot be stored in the cache /proc/nowhere/data .*; set REFRACT_CACHE_DIR"):
        load_manifest("a.tar.gz")
    Path("file").touch()
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(Path("file").absolute()))
    with pytest.raises(
        CacheError, match=r"cannot be stored in the cache .*file/data \(Not a directory\); set REFRACT_CACHE_DIR"
    ):
        load_manifest("a.tar.gz")
    assert load_manifest(archives / "photos.zip").samples  # an index is not worth an error


def test_the_cache_removes_what_was_used_least_recently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("REFRACT_CACHE_SIZE", "1000")
    written: list[str] = []

    def entry(key: str) -> None:
        def write(target: cache.Writer) -> None:
            written.append(key)
            target.write(bytes(300))

        cache.opened("things", key, write, title=key).close()
        for file in (tmp_path / "cache" / "data" / "things").glob("*/*"):  # as if an hour went by
            status = file.stat()
            os.utime(file, (status.st_atime - 3600, status.st_mtime - 3600))

    for key in ("a", "b", "c", "a", "d", "a", "b"):
        entry(key)
    assert written == ["a", "b", "c", "d", "b"]  # `a` was in use, `b` was not
    assert sum(file.stat().st_size for file in (tmp_path / "cache" / "data" / "things").glob("*/*")) <= 1000


def test_a_full_disk_is_reported_as_such_and_not_as_a_damaged_archive(
    archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(Path("cache").absolute()))
    images = [sample.read() for sample in load_manifest(archives / "images").samples]
    pq.write_table(pa.table({"image": images, "label": ["a", "b"] * (len(images) // 2)}), "a.parquet")
    shutil.copy(archives / "photos.tar.gz", "a.tar.gz")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("a.tar.gz", "a.parquet"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # a write fails as on a full disk
        try:
            with pytest.raises(
                CacheError, match=f"{name}: cannot be stored in the cache .*File too large.*; set REFRACT"
            ):
                load_manifest(name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert load_manifest(name).samples


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_was_forked_under_a_lock_does_not_keep_it(tmp_path: Path) -> None:
    lock, (end, start) = tmp_path / "lock", os.pipe()
    with cache.locked(lock):
        child = os.fork()
        if not child:  # as a loader's worker, which lives as long as the training
            os.close(start)
            os.read(end, 1)
            os._exit(0)
    try:
        handle = os.open(lock, os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
    finally:
        os.close(start)
        os.close(end)
        os.waitpid(child, 0)


def test_an_entry_that_vanishes_while_the_cache_is_measured_is_not_counted(tmp_path: Path) -> None:
    names = [tmp_path / "things" / "ab" / f"ab{number:062}" for number in range(3)]
    names[0].parent.mkdir(parents=True)
    for name in names:
        name.write_bytes(b"1")
    statuses = cache._statuses(tmp_path)
    next(statuses)
    for name in names:
        name.unlink()
    assert [*statuses] == []
