"""ONNX Runtime for browsers: the npm package onnxruntime-web, from a file of the user, from the cache, or from npm."""

import base64
import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from refract.cache_folder import cache_folder
from refract.pipeline.export.target import ExportError
from refract.pipeline.files import read_file, write_atomically
from refract.progress import stage

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of the archive in base64: `dist.integrity` of this version in the npm registry."""

FILES: Mapping[str, str] = MappingProxyType(
    {
        "dist/ort.wasm.bundle.min.mjs": "ort.wasm.bundle.min.js",
        "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    }
)
"""File of the package → its name in the export. The CPU build only: WebGPU adds 13 MB, and few browsers have it everywhere. The package has no
build without threads; with one thread this one needs no cross-origin isolation. The bundle contains the script that starts the WebAssembly,
and is named .js because some servers do not know .mjs as a script, which browsers then refuse."""

LICENSE = "LICENSE.onnxruntime-web.txt"
"""The package has no file with its licence, only the name of it: MIT."""

MOST_BYTES = 64 * 2**20
"""Of a file in the package; the WebAssembly has 14 MB."""

NPM_S = 600

log = logging.getLogger(__name__)


def runtime_files(source: Path | None) -> dict[str, bytes]:
    """Return name → content of the runtime's files for an export.

    source: an unpacked package, or an archive of `npm pack`; None takes the archive from the cache folder, where npm puts it first.
    ExportError if a file is missing or damaged, or if npm is missing or fails.
    """
    source = _cached() if source is None else source
    read = _reader(source)
    try:
        package = json.loads(read("package.json"))
        name, version = str(package["name"]), str(package["version"])
    except (ValueError, TypeError, KeyError) as err:
        raise ExportError(f"--runtime {source}: its package.json cannot be read; {_manually()}") from err
    if name != PACKAGE:
        raise ExportError(f"--runtime {source}: is the npm package {name}, not {PACKAGE}; {_manually()}")
    if version != VERSION:
        log.warning("--runtime %s: is version %s; the page was tested with %s", source, version, VERSION)
    files = {target: read(path) for path, target in FILES.items()}
    return files | {LICENSE: Path(__file__).with_name("license.txt").read_bytes()}


def _reader(source: Path) -> Callable[[str], bytes]:
    """Return the function that reads a file of the package by its path."""
    if source.is_dir():
        return lambda path: _from_folder(source, path)
    archive = read_file(source) if source.is_file() else None
    if archive is None:
        raise ExportError(f"--runtime {source}: does not exist; {_manually()}")
    if source.name == ARCHIVE and not _is_genuine(archive):
        raise ExportError(f"--runtime {source}: does not have the SHA-512 of the npm registry; {_manually()}")
    return lambda path: _from_archive(source, path)


def _from_folder(folder: Path, path: str) -> bytes:
    try:
        return read_file(folder / path)
    except OSError as err:
        raise ExportError(f"--runtime {folder}: cannot read {path}: {err.strerror}; {_manually()}") from err


def _from_archive(archive: Path, path: str) -> bytes:
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"package/{path}")
            content = b"" if member is None else member.read(MOST_BYTES + 1)
    except KeyError as err:
        raise ExportError(f"--runtime {archive}: lacks package/{path}; {_manually()}") from err
    except (tarfile.TarError, OSError, EOFError) as err:
        raise ExportError(f"--runtime {archive}: is not an archive of npm: {err}; {_manually()}") from err
    if not 0 < len(content) <= MOST_BYTES:
        raise ExportError(f"--runtime {archive}: package/{path} is empty or too large; {_manually()}")
    return content


def _cached() -> Path:
    """Return the archive in the cache folder. ExportError if it is not there and npm cannot load it."""
    path = cache_folder() / PACKAGE / ARCHIVE
    if path.is_file() and _is_genuine(read_file(path)):
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(f"--to web needs {PACKAGE} {VERSION}, and npm is not installed; {_manually()}")
    stage(f"loading {PACKAGE} {VERSION} by npm")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--loglevel=error", "--ignore-scripts", f"{PACKAGE}@{VERSION}"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_S, check=False)
        except subprocess.TimeoutExpired:
            raise ExportError(f"--to web: npm did not end within {NPM_S} seconds; {_manually()}") from None
        archive = Path(folder, ARCHIVE)
        if done.returncode or not archive.is_file():
            reasons = [line for line in done.stderr.splitlines() if line.strip() and " code " not in line]
            reason = (reasons or [f"exit code {done.returncode}"])[0].removeprefix("npm error ")[:200]
            raise ExportError(f"--to web: npm cannot load {PACKAGE} {VERSION}: {reason}; {_manually()}")
        content = archive.read_bytes()
    if not _is_genuine(content):
        raise ExportError(f"--to web: npm's {ARCHIVE} does not have the SHA-512 of the npm registry; {_manually()}")
    write_atomically(path, content)
    return path


def _is_genuine(archive: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(archive).digest()).decode() == INTEGRITY


def _manually() -> str:
    return f"run `npm pack {PACKAGE}@{VERSION}` where npm has a network, and add --runtime {ARCHIVE}"
