"""A checksummed directory: it is written atomically, and it returns only files whose SHA-256 the manifest lists.

Independent of the files' meaning. The manifest is not signed: it detects damage and identifies the content by one digest, but an
attacker can replace both.
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

_HINT = "copy or download the bundle again"


@dataclass(frozen=True)
class VerifiedDirectory:
    """A directory with a parsed manifest. path: the folder; files: name → {"sha256", "size"}; digest: SHA-256 of the manifest, in
    hexadecimal."""

    path: Path
    files: Mapping[str, Mapping[str, Any]]
    digest: str

    def read(self, name: str) -> bytes:
        """Read a listed file and verify its size and SHA-256. BundleError if it is unlisted, missing, outside the folder or altered.

        The returned bytes are the hashed bytes, so nobody can replace the file between the check and the use.
        """
        file = self.path / name
        if name not in self.files:
            raise BundleError(f"{file} is needed but {MANIFEST} does not list it; {_HINT}")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{file} is a link to a file outside the bundle; replace the link by the file")
        if not file.is_file():
            raise BundleError(f"{file} is missing, or not a regular file; {_HINT}")
        try:
            size, expected = file.stat().st_size, self.files[name]
            data = file.read_bytes() if size == expected["size"] else b""
        except OSError as err:
            raise BundleError(f"{file} cannot be read: {err.strerror}; check its permissions") from err
        if size != expected["size"]:
            raise BundleError(f"{file} was altered: {size} bytes, {MANIFEST} says {expected['size']}; {_HINT}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise BundleError(f"{file} was altered: its SHA-256 is not the one in {MANIFEST}; {_HINT}")
        return data


def open_verified_directory(path: Path) -> VerifiedDirectory:
    """Parse the manifest of the folder `path`. `VerifiedDirectory.read` verifies each file. BundleError for a missing or malformed
    manifest."""
    file = path / MANIFEST
    try:
        manifest = file.read_bytes()
    except OSError as err:
        if not path.is_dir():
            kind = "a file" if path.exists() else "no such folder"
            raise BundleError(f"{path}: {kind}; expected a bundle folder, such as runs/NAME/bundle") from err
        inside = path / "bundle"
        hint = f"did you mean {inside}?" if (inside / MANIFEST).is_file() else f"is {path} a bundle?"
        if (path / "preprocess.json").is_file():
            hint = f"{path} is an export, which its own runtime opens; name the bundle that was exported"
        raise BundleError(f"{file} cannot be read: {err.strerror}; {hint}") from err
    try:
        files = _parse_manifest(parse_json(manifest))
    except BundleError as err:
        raise BundleError(f"{file}: {err}; {_HINT}") from err
    return VerifiedDirectory(path, files, hashlib.sha256(manifest).hexdigest())


def write_verified_directory(path: Path, contents: Mapping[str, bytes], *, check: Callable[[Path], object]) -> None:
    """Write `contents` (name → bytes) and a manifest to a temporary folder, call `check` with it, then rename it to `path`.

    After an error the temporary folder is removed. BundleError if `path` exists; an exception of `check` propagates.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        _write_all(folder, contents)
        check(folder)
        # A rename replaces an empty folder silently. Only microseconds pass between this check and the rename.
        refuse_existing(path)
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise BundleError if `path` exists, even as a dangling link."""
    if path.exists() or path.is_symlink():
        raise BundleError(f"{path} exists already, and Refract never overwrites a bundle; choose another path")


def _write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / name, data)
    files = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
    # The manifest comes last: without it, the folder that a crash leaves behind is not a bundle.
    _write(folder / MANIFEST, json.dumps({"schema_version": MANIFEST_VERSION, "files": files}, indent=2).encode())
    for inner in {(folder / name).parent for name in contents} | {folder}:
        _sync(inner)


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make the directory entries of `folder` durable: the fsync of a file does not cover them."""
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
    """Raise BundleError for a name that could point outside the folder, on POSIX or on Windows."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00]", name) or str(path) != name:
        raise BundleError(
            f"file name {name!r} could point outside the bundle: expected a relative path like golden/00.jpg"
        )
