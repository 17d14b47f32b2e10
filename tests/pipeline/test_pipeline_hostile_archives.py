"""Archives that are damaged, encrypted or built to do harm: each is refused by the name of the member."""

import os
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from small_data import tar_of

from refract.pipeline.data import storage
from refract.pipeline.data.archives import index as index_module
from refract.pipeline.data.archives import unpacking
from refract.pipeline.data.manifest import DataError, load_manifest
from refract.pipeline.data.scan import scan

NUMBERS = range(10)


def zip_of(path: str, *members: tuple[str | zipfile.ZipInfo, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicates
        for name, data in members:
            target.writestr(name, data)
    return path


def empty(path: str) -> str:
    Path(path).touch()
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def sized(name: str, size: int) -> bytes:
    """Return a header with a size that `tarfile` does not write."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def blocks(path: str, *parts: bytes) -> str:
    """Write a tar of these parts and its end."""
    Path(path).write_bytes(b"".join(parts) + bytes(1024))
    return path


def long_name() -> bytes:
    entry = special("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    entry.size = 5
    return entry.tobuf(tarfile.GNU_FORMAT) + b"1.png".ljust(512, b"\0")


def symlink(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../../etc/cat.png", "'../../etc/cat.png' leads out of the archive"),
        ("a/../b.png", "leads out of the archive"),
        ("/etc/cat.png", "leads out of the archive"),
        ("C:/cat.png", "has a Windows path"),
        ("a\\b.png", "has a Windows path"),
    ],
)
def test_unsafe_names_are_refused(name: str, problem: str) -> None:
    for make, path in ((zip_of, "a.zip"), (tar_of, "a.tar")):
        with pytest.raises(DataError, match=problem) as refused:
            load_manifest(make(path, ("cat/1.png", b"1"), (name, b"2")))
        assert str(refused.value).startswith(f"{path}: the member ")


HOSTILE: Mapping[str, tuple[Callable[[], str], str]] = {
    "duplicates": (lambda: zip_of("a.zip", ("a/1.png", b"1"), ("./a/1.png", b"2")), "two members 'a/1.png'"),
    "duplicates in a tar": (lambda: tar_of("a.tar", ("a/1.png", b"1"), ("a/1.png", b"2")), "two members 'a/1.png'"),
    "file as folder": (lambda: tar_of("a.tar", ("a", b"1"), ("a/1.png", b"2")), "'a/1.png' is below a member that is a file"),
    "symlink": (lambda: tar_of("a.tar", special("a/1.png", tarfile.SYMTYPE, "/etc/passwd")), "'a/1.png' is a link"),
    "hard link": (lambda: tar_of("a.tar", special("a/1.png", tarfile.LNKTYPE, "b")), "'a/1.png' is a link"),
    "pipe": (lambda: tar_of("a.tar", special("a/1.png", tarfile.FIFOTYPE)), "'a/1.png' is a device or pipe"),
    "symlink in a zip": (lambda: zip_of("a.zip", (symlink("a/1.png"), b"/etc")), "'a/1.png' is a link or a device"),
    "names of other encodings": (
        lambda: tar_of("a.tar", ("a/caf\udce9.png", b"1")), r"'a/caf\\udce9.png' is not UTF-8"
    ),
    "endless loop": (lambda: blocks("a.tar", sized("a/", -512)), "the member 'a/' has a negative size"),
    "endless loop of images": (
        lambda: blocks("a.tar", tarfile.TarInfo("a/1.png").tobuf(), sized("a/2.png", -1024)), "the member 'a/2.png' has a negative size"
    ),
    "headers of headers": (lambda: blocks("a.tar", long_name() * 3000), "a.tar: is damaged or incomplete"),
    "empty file": (lambda: empty("a.zip"), "a.zip: is damaged or incomplete"),
    "empty tar": (lambda: empty("a.tar"), "a.tar: is damaged or incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_by_the_name_of_the_member(case: str) -> None:
    make, problem = HOSTILE[case]
    with pytest.raises(DataError, match=problem):
        load_manifest(make())


def test_a_name_of_a_zip_is_utf8_without_the_flag_as_macos_writes_it_or_refused() -> None:
    def flagless(name: bytes) -> None:
        """Write a zip whose names have no UTF-8 flag."""
        plain = "x" * len(name)
        zip_of("a.zip", (f"a/{plain}.png", b"1"), ("b/1.png", b"2"))
        content = Path("a.zip").read_bytes()
        Path("a.zip").write_bytes(content.replace(plain.encode(), name))

    flagless("é红".encode())
    assert "a.zip/a/é红.png" in [sample.path for sample in load_manifest("a.zip").samples]
    flagless("é".encode("latin-1"))
    with pytest.raises(DataError, match=r"the name of the member 'a/.*' is not UTF-8"):
        load_manifest("a.zip")


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar", "photos.tar.gz", "photos.tar.xz"])
def test_truncated_archives_are_refused_at_every_length(name: str, archives: Path) -> None:
    content = (archives / name).read_bytes()
    end = len(content.rstrip(b"\0")) if name.endswith(".tar") else len(content)
    for length in np.linspace(1, end - 1, 12, dtype=int).tolist():
        Path(name).write_bytes(content[:length])
        with pytest.raises(DataError, match=f"{name}: is damaged or incomplete"):
            load_manifest(name)


def test_a_tar_that_is_cut_between_two_members_is_refused(archives: Path) -> None:
    with tarfile.open(archives / "photos.tar") as opened:
        third = opened.getmembers()[8].offset
    Path("a.tar").write_bytes((archives / "photos.tar").read_bytes()[:third])
    with pytest.raises(DataError, match=f"byte {third:,} starts neither a member nor the end of the archive"):
        load_manifest("a.tar")


def test_a_damaged_member_is_an_unreadable_image(archives: Path) -> None:
    manifest = load_manifest(archives / "stored.zip")
    content = bytearray((archives / "stored.zip").read_bytes())
    image = manifest.samples[3].read()
    content[content.index(image) + len(image) // 2] ^= 1
    Path("a.zip").write_bytes(content)
    damaged = load_manifest("a.zip")
    assert scan(damaged.samples).bad == {
        damaged.samples[3].path: "the archive is damaged: the content does not fit its checksum"
    }


def test_encrypted_members_are_refused(archives: Path) -> None:
    content = bytearray(Path(zip_of("a.zip", ("a/1.png", b"1"), ("b/1.png", b"2"))).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    Path("a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"'a/1.png' is encrypted; extract the archive"):
        load_manifest("a.zip")


def test_a_member_of_a_zip_without_a_name_is_skipped() -> None:
    content = bytearray(Path(zip_of("a.zip", ("a/1.png", b"1"), ("b/1.png", b"2"), ("x", b"3"))).read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 28 : at + 32] = bytes((0, 0, 1, 0))  # the name becomes an extra field
    Path("a.zip").write_bytes(content)
    assert [sample.path for sample in load_manifest("a.zip").samples] == ["a.zip/a/1.png", "a.zip/b/1.png"]


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "LARGEST", 1000)
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a/1.png", bytes(1001))
    with pytest.raises(DataError, match=r"'a/1.png' has 1,001 bytes; at most 1,000 are read"):
        load_manifest("a.zip")
    # A member that claims a small size, and is larger.
    Path("a.zip").write_bytes(
        Path("a.zip").read_bytes().replace((1001).to_bytes(4, "little"), (900).to_bytes(4, "little"))
    )
    with pytest.raises(OSError, match="the archive is damaged"):
        storage.read("a.zip/a/1.png")
    monkeypatch.setattr(unpacking, "ALLOWED", 1 << 20)
    tar_of("a.tar", ("a/1.png", bytes(5 << 20)))
    with tarfile.open("b.tar.gz", "w:gz") as target_tar:
        target_tar.add("a.tar")
    with pytest.raises(DataError, match=r"b.tar.gz: expands to more than .* as a decompression bomb does"):
        load_manifest("b.tar.gz")


def test_overlapping_members_are_refused() -> None:
    data = os.urandom(4000)
    zip_of("a.zip", *[(f"a/{number}.png", data) for number in range(2)])
    content = bytearray(Path("a.zip").read_bytes())
    second = content.index(b"PK\x03\x04", 4)
    shorter = content[:second] + content[content.index(b"PK\x01\x02") :]  # both entries of the directory name the first
    end = shorter.index(b"PK\x05\x06")
    shorter[end + 16 : end + 20] = second.to_bytes(4, "little")
    at = shorter.rindex(b"PK\x01\x02") + 42
    shorter[at : at + 4] = bytes(4)
    Path("a.zip").write_bytes(shorter)
    with pytest.raises(DataError, match="a.zip: its members overlap, as in a decompression bomb"):
        load_manifest("a.zip")
