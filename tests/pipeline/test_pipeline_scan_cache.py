"""The cache of image checks: unchanged files are not decoded again, changed ones always are, and no state of the cache changes a result."""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import pytest
from small_data import COLORS, make_image, write_image

from refract.pipeline.data import scan as scan_module
from refract.pipeline.data import scan_cache, storage
from refract.pipeline.data.manifest import Sample
from refract.pipeline.data.scan import MEASURED, Scan, scan
from refract.pipeline.data.scan_cache import ScanCache


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Four images, one unreadable file and one image from memory; checks are stored at once in an empty cache."""
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "SETTLED_NS", 0)
    label = next(iter(COLORS))
    for number in range(4):
        write_image(tmp_path / f"{number}.png", make_image(label, number))
    (tmp_path / "bad.png").write_bytes(b"no image")
    embedded = Sample("embedded.png", (0,), data=(tmp_path / "0.png").read_bytes())
    return [*(Sample(f"{number}.png", (0,)) for number in range(4)), Sample("bad.png", (0,)), embedded]


def results(scanned: Scan) -> list[dict[str, object]]:
    return [dict(values) for values in astuple(scanned)]


def stored(tmp_path: Path) -> list[str]:
    with sqlite3.connect(tmp_path / "cache" / "checks.sqlite") as database:
        return [Path(os.fsdecode(path)).name for (path,) in database.execute("SELECT path FROM checks ORDER BY path")]


def test_unchanged_files_are_not_read_again(samples: list[Sample], tmp_path: Path) -> None:
    first = scan(samples)
    assert stored(tmp_path) == ["0.png", "1.png", "2.png", "3.png"] and list(first.bad) == ["bad.png"]
    with sqlite3.connect(tmp_path / "cache" / "checks.sqlite") as database:
        database.execute(
            "UPDATE checks SET record = zeroblob(49), remark = 'repaired: marker' WHERE CAST(path AS TEXT) LIKE '%2.png'"
        )
    second = scan(samples)
    assert second.images["2.png"] == 64 * "0" and second.difference_hashes["2.png"] == b""
    assert second.remarks == {"2.png": "repaired: marker"}
    assert {path: digest for path, digest in second.images.items() if path != "2.png"} == {
        path: digest for path, digest in first.images.items() if path != "2.png"
    }


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_members_of_an_unchanged_archive_are_not_decoded_again(
    kind: str, samples: list[Sample], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(4):
        shutil.copy(tmp_path / f"{number}.png", folder)
    archive = shutil.make_archive(str(tmp_path / "photos"), kind, folder)
    members = [Sample(f"{archive}/{number}.png", (0,)) for number in range(4)]
    first = scan(members)
    with sqlite3.connect(tmp_path / "cache" / "checks.sqlite") as database:
        database.execute("UPDATE checks SET remark = 'stored'")
    assert scan(members).remarks == dict.fromkeys((sample.path for sample in members), "stored")
    shutil.copy(folder / "2.png", folder / "1.png")
    shutil.make_archive(str(tmp_path / "photos"), kind, folder)
    second = scan(members)
    assert not second.remarks and second.images[members[1].path] == first.images[members[2].path]
    other_name = Sample(f"{archive}/x/../1.png", (0,))
    assert list(scan([other_name]).bad) == [other_name.path], "no member has this name"


def test_a_change_that_keeps_size_and_time_is_noticed(samples: list[Sample], tmp_path: Path) -> None:
    first, file = scan(samples), tmp_path / "1.png"
    facts, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1  # after the image's end, or in its checksum
    file.write_bytes(content)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    second = scan(samples)
    assert second.bad.keys() >= {"1.png"} or second.images["1.png"] != first.images["1.png"]


def test_a_repaired_file_is_checked_again(samples: list[Sample], tmp_path: Path) -> None:
    assert list(scan(samples).bad) == ["bad.png"]
    (tmp_path / "bad.png").write_bytes((tmp_path / "3.png").read_bytes())
    second = scan(samples)
    assert not second.bad and second.images["bad.png"] == second.images["3.png"]


def test_a_file_that_was_just_written_is_not_stored(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SETTLED_NS", 3_600_000_000_000)
    first = scan(samples)
    assert stored(tmp_path) == [] and results(scan(samples)) == results(first)


@pytest.mark.parametrize(
    "damage", ["garbage", "read-only garbage", "folder", "another version", "another table", "locked", "too large"]
)
def test_no_state_of_the_cache_changes_a_result(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first, file = scan(samples), tmp_path / "cache" / "checks.sqlite"
    monkeypatch.setattr(scan_cache, "TIMEOUT_S", 0.1)
    database = sqlite3.connect(file, isolation_level=None)
    if damage == "garbage":
        file.write_bytes(b"garbage" * 1000)
    elif damage == "read-only garbage":  # which root may remove nevertheless
        file.write_bytes(b"garbage" * 1000)
        file.parent.chmod(0o500)
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "another version":
        database.execute("UPDATE checks SET record = zeroblob(49)")
        database.execute("PRAGMA user_version = 1")
    elif damage == "another table":
        database.execute("DROP TABLE checks")
        database.execute("CREATE TABLE checks (path TEXT)")
    elif damage == "locked":
        database.execute("BEGIN EXCLUSIVE")
    else:
        database.execute("UPDATE checks SET record = zeroblob(49)")
        monkeypatch.setattr(scan_cache, "LIMIT", 1)
    assert results(scan(samples)) == results(first)
    database.close()
    file.parent.chmod(0o700)
    if damage in ("garbage", "another version", "too large"):
        assert len(stored(tmp_path)) == 4, "the cache starts anew"


def test_ranks_of_a_machine_wait_for_the_first_one(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with ThreadPoolExecutor(1) as pool:
        with ScanCache():
            rank_1 = pool.submit(scan, samples)
            lock = f":{(tmp_path / 'cache' / 'checks.lock').stat().st_ino} "
            while not any("->" in line and lock in line for line in Path("/proc/locks").read_text().splitlines()):
                assert not rank_1.done()
            assert stored(tmp_path) == []
        rank_1.result(timeout=60)
    assert len(stored(tmp_path)) == 4


def _checked(samples: Sequence[Sample]) -> list[dict[str, object]]:
    return results(scan(samples))


def test_ranks_do_not_wait_for_checks_that_are_not_stored(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with ThreadPoolExecutor(1) as pool, ScanCache() as cache:
        cache.states(samples[-1:])
        assert pool.submit(scan, samples).result(timeout=60).images


def test_processes_share_the_cache(samples: list[Sample], tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_checked, [samples, samples], chunksize=1)
    assert first == second == results(scan(samples))
    assert len(stored(tmp_path)) == 4


def test_texts_share_the_check_of_their_image(samples: list[Sample]) -> None:
    both = frozenset({"images", "texts"})
    captioned = [Sample("0.png", (0,), text=text) for text in ("one", "two")]
    alone = Sample("m.csv#4", (0,), text="two", data=samples[-1].data, has_image=False)
    scanned = scan([*captioned, alone], reads=both)
    keys = [sample.key for sample in (*captioned, alone)]
    assert len({scanned.hashes[key] for key in keys}) == 3
    assert scanned.groups[keys[0]] == scanned.groups[keys[1]] == scanned.images["0.png"] != scanned.groups[keys[2]]
    of_images = scan(captioned)
    assert of_images.hashes[keys[0]] == of_images.hashes[keys[1]] == scanned.images["0.png"]


def test_hashes_depend_only_on_the_inputs_of_the_network(samples: list[Sample]) -> None:
    both, plain = frozenset({"images", "texts"}), samples[:1]
    alone = Sample("m.csv#4", (0,), text="two", data=samples[-1].data, has_image=False)
    with_texts = scan([*plain, alone], reads=both)
    assert scan(plain, reads=both).hashes["0.png"] == with_texts.hashes["0.png"] != with_texts.images["0.png"]
    assert list(with_texts.images) == ["0.png"], "the placeholder of a text alone is not one of the images"


def test_a_removed_decoder_invalidates_the_checks(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_heif(package: str) -> str:
        if package == "pillow-heif":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(scan_cache, "version", lambda package: "1" if package == "pillow-heif" else version(package))
    first = scan(samples)
    with sqlite3.connect(tmp_path / "cache" / "checks.sqlite") as database:
        database.execute("UPDATE checks SET record = zeroblob(49)")
    monkeypatch.setattr(scan_cache, "version", without_heif)
    assert results(scan(samples)) == results(first)


def test_a_process_does_not_store_checks_for_other_versions(samples: list[Sample], tmp_path: Path) -> None:
    with ScanCache() as cache:
        states = cache.states(samples)
        with sqlite3.connect(tmp_path / "cache" / "checks.sqlite") as database:
            database.execute("PRAGMA user_version = 1")
        cache.add(samples[0].path, states[0], bytes(49), "")
    assert stored(tmp_path) == []


def test_a_user_without_a_home_has_no_cache(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    first = scan(samples)
    monkeypatch.delenv("REFRACT_CACHE_DIR")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    assert results(scan(samples)) == results(first)


def test_ranks_do_not_wait_for_a_cache_that_cannot_be_used(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (tmp_path / "cache" / "checks.sqlite").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, ScanCache():
        assert pool.submit(scan, samples).result(timeout=60).images


@pytest.mark.parametrize(("seconds", "several"), [(0.0, False), (0.01, True)])
def test_small_images_are_checked_by_one_thread(
    seconds: float, several: bool, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads would wait for Python's lock."""
    threads, scan_one = list[int](), scan_module._scan_one

    def recorded(sample: Sample) -> tuple[bytes, bytes, str] | str:
        time.sleep(seconds)
        threads.append(threading.get_ident())
        return scan_one(sample)

    monkeypatch.setattr(scan_module, "_scan_one", recorded)
    monkeypatch.setattr(scan_module, "SMALL_S", 0.005)
    monkeypatch.setattr("refract.cores.cores", lambda: 4)
    many = [replace(samples[0], path=f"{number}.png", data=samples[0].read()) for number in range(200)]
    assert len(scan(many).hashes) == 200
    assert len(threads) == 200 and len(set(threads[MEASURED:])) == (4 if several else 1)
