"""A folder sealed by a manifest: written whole or not at all, read only what the manifest lists and its hash confirms.

Knows nothing of what the files mean. A seal is no signature: it shows damage, and names the content by one digest.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from refract.models.bundle.info import BundleError, parse_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

_AGAIN = "copy or download the bundle again"


@dataclass(frozen=True)
class VerifiedDirectory:
    """path: the folder; files: name → {"sha256", "size"}; digest: SHA-256 of the manifest, in hexadecimal."""

    path: Path
    files: Mapping[str, Mapping[str, Any]]
    digest: str

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, after its size and SHA-256 were found right. BundleError otherwise.

        What was hashed is what is returned: nobody can swap the file between the check and the use.
        """
        file = self.path / name
        if name not in self.files:
            raise BundleError(f"{file} is needed but {MANIFEST} does not list it; {_AGAIN}")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{file} leads out of the bundle through a link; put the file itself there")
        if not file.is_file():
            raise BundleError(f"{file} is missing, or not a regular file; {_AGAIN}")
        try:
            size, expected = file.stat().st_size, self.files[name]
            data = file.read_bytes() if size == expected["size"] else b""
        except OSError as err:
            raise BundleError(f"{file} cannot be read: {err.strerror}; check its permissions") from err
        if size != expected["size"]:
            raise BundleError(f"{file} was altered: {size} bytes, {MANIFEST} says {expected['size']}; {_AGAIN}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise BundleError(f"{file} was altered: its SHA-256 is not the one in {MANIFEST}; {_AGAIN}")
        return data


def open_verified_directory(path: Path) -> VerifiedDirectory:
    """The folder by its manifest, whose form is checked; its files are checked as they are read. BundleError."""
    file = path / MANIFEST
    try:
        manifest = file.read_bytes()
    except OSError as err:
        inside = path / "bundle"
        hint = f"did you mean {inside}?" if (inside / MANIFEST).is_file() else f"is {path} a bundle?"
        raise BundleError(f"{file} cannot be read: {err.strerror}; {hint}") from err
    try:
        files = _parse_manifest(parse_json(manifest))
    except BundleError as err:
        raise BundleError(f"{file}: {err}; {_AGAIN}") from err
    return VerifiedDirectory(path, files, hashlib.sha256(manifest).hexdigest())


def write_verified_directory(path: Path, contents: Mapping[str, bytes], *, check: Callable[[Path], object]) -> None:
    """Write `contents` (name → bytes) and a manifest beside `path`, `check` that folder, move it there in one rename.

    Whatever fails, nothing of it is left. BundleError if `path` exists; what `check` raises is passed on.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        _write_all(folder, contents)
        check(folder)
        # A rename replaces an empty folder silently; between this look and the rename only microseconds pass.
        refuse_existing(path)
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(path.parent)


def refuse_existing(path: Path) -> None:
    """BundleError if there is anything at `path`, even a dangling link."""
    if path.exists() or path.is_symlink():
        raise BundleError(f"{path} exists already and a bundle is never overwritten; choose another path")


def _write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / name, data)
    files = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
    # The manifest last: whatever a crash leaves there, without it the folder is no bundle.
    _write(folder / MANIFEST, json.dumps({"schema_version": MANIFEST_VERSION, "files": files}, indent=2).encode())
    for inner in {(folder / name).parent for name in contents} | {folder}:
        _sync(inner)


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make the names in `folder` durable: a file's own fsync does not cover its directory entry."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parse_manifest(manifest: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(manifest, dict) or manifest.get("schema_version") != MANIFEST_VERSION:
        raise BundleError(f"expected an object with schema_version {MANIFEST_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise BundleError("expected 'files', an object from file names to their size and sha256")
    for name, entry in files.items():
        _check_name(name)
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or not _is_hash(entry.get("sha256")):
            raise BundleError(f"file {name!r}: expected 'size' in bytes and 'sha256' in 64 hexadecimal digits")
    return MappingProxyType(files)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _check_name(name: str) -> None:
    """BundleError for a name that could lead out of the folder, on POSIX or on Windows."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00]", name) or str(path) != name:
        raise BundleError(
            f"file name {name!r} could lead out of the bundle: expected a relative path like golden/00.jpg"
        )
