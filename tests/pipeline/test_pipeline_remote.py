"""Data at s3://, on a real S3 server that fails now and then: the samples of the folder, and what is refused."""

import functools
import io
import operator
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_server import KEYS, ObjectServer
from small_data import tar_of

from refract.pipeline.data import remote_files, storage
from refract.pipeline.data.cache import CacheError
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import Manifest, load_manifest
from refract.pipeline.data.scan import scan
from refract.pipeline.data.splits import write_splits
from refract.pipeline.inference.batch.listing import listing_of
from refract.remote import client, folders, object_store
from refract.remote.address import AddressError, checked, joined
from refract.remote.client import RemoteError

pytestmark = pytest.mark.usefixtures("new_cache")


@pytest.fixture(scope="module")
def server(archives: Path) -> Iterator[ObjectServer]:
    """Has the folder `images` and its archives."""
    server = ObjectServer()
    server.put_folder(archives / "images", "images")
    for name in ("photos.zip", "photos.tar", "photos.tar.gz"):
        server.put(name, (archives / name).read_bytes())
    yield server
    server.close()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the versions of files, as a new process does."""
    monkeypatch.setattr(remote_files, "_versions", {})
    monkeypatch.setattr(remote_files, "_listed", set())
    monkeypatch.setattr(remote_files, "_searched", set())
    monkeypatch.delenv("REFRACT_LISTINGS", raising=False)


def images_of(manifest: Manifest, root: str) -> list[tuple[str, str, bytes]]:
    return [(s.path.removeprefix(f"{root}/"), manifest.labels[s.labels[0]], s.read()) for s in manifest.samples]


@pytest.mark.parametrize("name", ["images", "photos.zip", "photos.tar", "photos.tar.gz"])
def test_remote_folders_and_archives_give_the_samples_of_the_folder_while_the_server_fails(
    name: str, server: ObjectServer, archives: Path
) -> None:
    local = load_manifest(archives / "images")
    with server.proxy.failing(2, ["cut", "500", "503"]):
        remote = load_manifest(f"s3://data/{name}")
        assert images_of(remote, f"s3://data/{name}") == images_of(local, str(archives / "images"))
    assert "cut" in server.proxy.injected
    assert scan(remote.samples).content(remote) == scan(local.samples).content(local)


def test_a_file_is_fetched_once_and_a_damaged_copy_again(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://data/images/green/000.png"
    data = storage.read(url)
    server.proxy.reads.clear()
    assert storage.read(url) == data and not server.proxy.reads
    forget(monkeypatch)
    assert storage.read(url) == data and [method for method, _ in server.proxy.reads] == ["HEAD"]
    (stored,) = (tmp_path / "cache" / "data" / "objects").glob("*/*")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    assert storage.read(url) == data
    stored.write_bytes(content[:10])
    assert storage.read(url) == data


@pytest.mark.parametrize("name", ["images", "photos.tar"])
def test_the_checks_of_unchanged_objects_are_kept(
    name: str, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan(load_manifest(f"s3://data/{name}").samples)
    forget(monkeypatch)
    again = load_manifest(f"s3://data/{name}")
    with sqlite3.connect(tmp_path / "cache" / "checks.sqlite") as database:
        database.execute("UPDATE checks SET remark = 'stored'")
    server.proxy.reads.clear()
    second = scan(again.samples)
    assert dict(second.images) == dict(first.images) and set(second.remarks.values()) == {"stored"}
    assert not server.proxy.reads
    shutil.rmtree(tmp_path / "cache" / "data")
    path = again.samples[0].path
    assert storage.state_of(path) is not None and not storage.is_at_hand(path), (
        "ranks wait for the one that downloads it"
    )
    assert not scan(again.samples).remarks, "an image that must be downloaded may be unreadable"


def test_a_changed_object_is_checked_again(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [storage.read(f"s3://data/images/green/00{number}.png") for number in range(2)]
    for label in "ab":
        server.put(f"checked/{label}/1.png", images[0])
    digests = dict(scan(load_manifest("s3://data/checked").samples).images)
    server.put("checked/b/1.png", images[1])
    forget(monkeypatch)
    now = scan(load_manifest("s3://data/checked").samples).images
    assert now["s3://data/checked/a/1.png"] == digests["s3://data/checked/a/1.png"]
    assert now["s3://data/checked/b/1.png"] != digests["s3://data/checked/b/1.png"]


def test_a_changed_file_is_noticed_and_never_mixed_with_the_former_one(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, url = os.urandom(3000), os.urandom(3000), "s3://data/changing/a/1.png"
    server.put("changing/a/1.png", first)
    server.put("changing/b/1.png", first)
    manifest = load_manifest("s3://data/changing")
    server.put("changing/a/1.png", second)
    with pytest.raises(RemoteError, match=f"{url}: has changed while it was in use; run the command again"):
        manifest.samples[0].read()
    forget(monkeypatch)
    assert load_manifest("s3://data/changing").samples[0].read() == second
    server.put("changing/a/1.png", first)
    assert storage.read(url) == second  # this process has seen the second version
    forget(monkeypatch)
    assert storage.read(url) == first


def test_a_large_file_is_resumed_after_cut_transfers_and_not_mixed_with_another_version(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "BLOCK", 1 << 16)
    first, second = os.urandom(1 << 20), os.urandom(1 << 20)
    server.put("large.zip", first)
    item = client.info("s3://data/large.zip")
    with server.proxy.failing(4):
        assert client.read(item) == first
    received = client.blocks(item)
    next(received)
    server.put("large.zip", second)
    with pytest.raises(RemoteError, match="has changed while it was in use"):
        list(received)


def test_a_server_that_always_fails_ends_with_the_url_and_the_cause(server: ObjectServer) -> None:
    url = "s3://data/images/green/000.png"
    item = client.info(url)
    server.proxy.reads.clear()
    with server.proxy.failing(1, ["500"]), pytest.raises(RemoteError, match=f"{url}: failed 6 times, at last with .*"):
        client.read(item)
    assert len(server.proxy.reads) == 6
    with server.proxy.failing(1, ["cut"]), pytest.raises(RemoteError, match=f"{url}: failed 6 times"):
        client.read(item)
    with server.proxy.failing(1, ["500"]), pytest.raises(RemoteError, match="s3://data/images: failed 6 times"):
        load_manifest("s3://data/images")


def test_a_stalled_transfer_ends_by_its_timeout(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"config_kwargs": {"read_timeout": 0.5, "retries": {"max_attempts": 0}}, "max_concurrency": 1}
    monkeypatch.setattr(object_store, "_OPTIONS", {"s3": options})
    client._store.cache_clear()
    item = client.info("s3://data/images/green/000.png")
    server.proxy.reads.clear()
    with server.proxy.failing(1, ["stall", "500", ""]):
        assert len(client.read(item)) == item.size
    client._store.cache_clear()


def _read_all(paths: list[str]) -> list[bytes]:
    return [storage.read(path) for path in paths]


def test_worker_processes_read_the_versions_that_their_parent_listed(server: ObjectServer) -> None:
    manifest = load_manifest("s3://data/images")
    paths = [sample.path for sample in manifest.samples]
    server.proxy.reads.clear()
    with get_context("spawn").Pool(2) as pool, server.proxy.failing(5):
        both = pool.map(_read_all, [paths, paths[::-1]], chunksize=1)
    assert both[0] == both[1][::-1]
    assert not [path for method, path in server.proxy.reads if method == "HEAD"]  # no version is looked up again


def test_remote_tables_name_urls_and_relative_paths(server: ObjectServer, archives: Path) -> None:
    rows = "path,label,split\nimages/green/000.png,a,train\ns3://data/photos.zip/blue/004.png,b,train\n./images/green/001.png,b,test\n"
    server.put("tables/m.csv", rows.replace("images/", "../images/").encode())
    server.put("m.csv", rows.encode())
    for name in ("m.csv", "tables/m.csv"):
        manifest = load_manifest(f"s3://data/{name}")
        assert [s.path for s in manifest.samples][:2] == [
            "s3://data/images/green/000.png",
            "s3://data/photos.zip/blue/004.png",
        ]
        assert manifest.samples[1].read() == (archives / "images" / "blue" / "004.png").read_bytes()
    Path("local.csv").write_text("file,label\ns3://data/images/green/000.png,a\ns3://data/images/green/001.png,b\n")
    local = load_manifest("local.csv")
    assert local.samples[0].read() == manifest.samples[0].read()
    write_splits(manifest, Path("splits.csv"))
    assert pd.read_csv("splits.csv")["path"][0] == "s3://data/images/green/000.png"
    server.put("bad.csv", b"path,label\nimages/green/000.png,a\nfile:///etc/passwd,b\n")
    assert load_manifest("s3://data/bad.csv").samples[1].path == "s3://data/etc/passwd"  # no file of this machine
    server.put("short.csv", b"path,label\nimages/green/000.png\n")
    with pytest.raises(DataError, match=r"s3://data/short.csv, line 2: has 1 of 2 fields"):
        load_manifest("s3://data/short.csv")
    server.put("odd/a//1.png", b"1")
    with pytest.raises(DataError, match=r"s3://data/odd/a//1.png: the name has an empty part"):
        load_manifest("s3://data/odd")
    with pytest.raises(DataError, match=r"s3://data/none.csv: cannot be read \(No such file\); check the URL"):
        load_manifest("s3://data/none.csv")
    with pytest.raises(DataError, match=r"s3://data/nothing: no such folder or file, or it is empty"):
        load_manifest("s3://data/nothing")


def test_remote_parquet_files_and_webdatasets(server: ObjectServer, archives: Path) -> None:
    local = load_manifest(archives / "images")
    names = [local.labels[sample.labels[0]] for sample in local.samples]
    table = pa.table({"image": [sample.read() for sample in local.samples], "label": names})
    for split, part in (("test", table.slice(0, 10)), ("train", table.slice(10))):
        file = io.BytesIO()
        pq.write_table(part, file)
        server.put(f"hub/data/{split}-00000-of-00001.parquet", file.getvalue())
    server.put("hub/README.md", b"about")
    members = [
        [(f"{i:04}.png", sample.read()), (f"{i:04}.cls", names[i].encode())] for i, sample in enumerate(local.samples)
    ]
    for number, part in enumerate((members[:15], members[15:])):
        server.put(
            f"wds/{number:06}.tar", Path(tar_of("a.tar", *functools.reduce(operator.iadd, part, []))).read_bytes()
        )
    sources = ("s3://data/hub", "s3://data/wds", "s3://data/wds/{000000..000001}.tar")
    for source in sources:
        manifest = load_manifest(source)
        assert [manifest.labels[s.labels[0]] for s in manifest.samples] == names
        assert [sample.read() for sample in manifest.samples] == [sample.read() for sample in local.samples]
    assert len(load_manifest("s3://data/hub/data/train-00000-of-00001.parquet").samples) == 20
    assert listing_of("s3://data/wds").rows[0].path == "s3://data/wds/000000.tar/0000.png"


# Credentials


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2secret@host/a.zip",
        "https://host/a.zip?sig=hunter2secret&b=1",
        "s3://key:hunter2secret@data/a",
    ],
)
def test_urls_with_credentials_are_refused_and_masked(url: str) -> None:
    for use in (checked, load_manifest, storage.read, client.info):
        with pytest.raises(
            (AddressError, DataError, OSError), match="contains a password, token or signature"
        ) as refused:
            use(url)
        assert "hunter2secret" not in str(refused.value)
    Path("m.csv").write_text(f"path,label\n{url},a\n")
    with pytest.raises(DataError, match=r"m.csv, line 2, column 'path': .*contains a password") as refused:
        load_manifest("m.csv")
    assert "hunter2secret" not in str(refused.value)


def test_credentials_come_from_the_environment_and_reach_no_file(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_manifest("s3://data/photos.zip")
    load_manifest("s3://data/images").samples[0].read()
    secret = KEYS["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client._store.cache_clear()
    with pytest.raises(RemoteError, match="s3://data/photos.tar: no credentials; set AWS_ACCESS_KEY_ID and"):
        client.info("s3://data/photos.tar")
    client._store.cache_clear()


def test_a_missing_library_is_reported_by_the_extra() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from refract.pipeline.data.manifest import load_manifest; load_manifest('s3://data/images')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RemoteError: s3:// needs the extra 's3'; install it with: pip install 'refract[s3]'" in done.stderr


def test_reading_a_local_folder_imports_no_library_of_remote_files(archives: Path) -> None:
    code = (
        "import sys; from refract.pipeline.data.manifest import load_manifest; load_manifest(sys.argv[1]).samples[0].read()\n"
        "print([name for name in ('fsspec', 's3fs', 'botocore', 'boto3', 'aiohttp', 'httpx') if name in sys.modules])"
    )
    for source in ("images", "photos.zip"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(archives / source)], capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n"


def test_relative_urls_are_joined_within_their_host() -> None:
    assert joined("s3://data/a", "b/c.png") == "s3://data/a/b/c.png"
    assert joined("s3://data/a", "../b c?.png") == "s3://data/b c?.png"
    assert joined("https://host:8000/a", "/b.png") == "https://host:8000/b.png"
    assert joined("s3://data/a", "https://other/b.png") == "https://other/b.png"
    # A name in a store is no URL; in a relative URL, `?` starts a query, and a name with `#` is meant.
    for name in ("a#1.png", "a%231.png", "100%.png", "a;b.png", "a\tb.png", "é [1]*.png"):
        assert joined("s3://data/a#b%20", f"./{name}") == f"s3://data/a#b%20/{name}"
    assert joined("https://host/a", "b#1.png") == joined("https://host/a", "b%231.png") == "https://host/a/b%231.png"
    assert joined("https://host/a", "b?id=1") == "https://host/a/b?id=1"
    assert joined("https://host", "b.png") == "https://host/b.png"
    with pytest.raises(AddressError, match="contains a password"):
        joined("https://host/a", "b.png?sig=hunter2secret")
    for path in ("file:///etc/passwd", "//other/b.png", "ftp://host/b.png", "C:/b.png"):
        with pytest.raises(AddressError):
            joined("s3://data/a", path)


def test_names_with_marks_of_urls_are_read_as_they_are(server: ObjectServer) -> None:
    names = ["a b", "a#b", "a?b", "a%20b", "a+b", "é", "[a]*", "a&b=c"]
    for number, name in enumerate(names):
        server.put(f"marks/x #?%/{name}.png", b"x%d" % number)
        server.put(f"marks/y/{name}.png", b"y%d" % number)
    manifest = load_manifest("s3://data/marks")
    expected = {f"s3://data/marks/x #?%/{name}.png": b"x%d" % number for number, name in enumerate(names)}
    expected |= {f"s3://data/marks/y/{name}.png": b"y%d" % number for number, name in enumerate(names)}
    assert {sample.path: sample.read() for sample in manifest.samples} == expected
    rows = "".join(f"{url.rpartition('/')[2]},{i % 2}\n" for i, url in enumerate(expected) if "/x" in url)
    server.put("marks/x #?%/m.csv", f"path,label\n{rows}".encode())
    table = load_manifest("s3://data/marks/x #?%/m.csv")
    assert {sample.path: sample.read() for sample in table.samples}.items() <= expected.items()


def test_errors_of_remote_tables_of_images_name_the_url(server: ObjectServer) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [b"1"], "other": ["a"]}), file)
    server.put("unlabelled.parquet", file.getvalue())
    with pytest.raises(DataError, match="^s3://data/unlabelled.parquet: no column 'label'"):
        load_manifest("s3://data/unlabelled.parquet")


def test_a_download_that_another_process_renames_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / ".temporary").symlink_to("gone")
    folders._remove_unused(tmp_path)


def test_images_that_the_full_disk_of_the_cache_cannot_hold_are_not_unreadable_images(server: ObjectServer) -> None:
    for name in ("a/1", "b/1"):
        server.put(f"heavy/{name}.png", os.urandom(9000))
    manifest = load_manifest("s3://data/heavy")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # a write fails as on a full disk
    try:
        with pytest.raises(
            CacheError, match=r"heavy/a/1.png: cannot be stored in the cache .*; set REFRACT_CACHE_DIR to"
        ):
            scan(manifest.samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_named_as_an_archive_is_read_as_a_folder(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.zip/1", "y/1"):
        server.put(f"named/{name}.png", name.encode())
    manifest = load_manifest("s3://data/named")
    assert [sample.read() for sample in manifest.samples] == [b"x.zip/1", b"y/1"]
    monkeypatch.setattr(remote_files, "_versions", {})
    monkeypatch.setattr(remote_files, "_listed", set())
    monkeypatch.setattr(remote_files, "_searched", set())
    assert manifest.samples[0].read() == b"x.zip/1"  # as in a worker process, by the listing of its parent
