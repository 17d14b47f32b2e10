"""ONNX Runtime for browsers: the npm package onnxruntime-web, from a file of the user, from the cache, or from npm."""

import base64
import hashlib
import io
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from refract.cache_folder import cache_folder
from refract.errors import first_line
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
"""File of the package → its name in the export.

The build for the CPU: WebGPU adds 13 MB, and computes other numbers on each GPU. The package has no build without threads; with one thread,
this one needs no cross-origin isolation, for which most static servers lack the headers. Its name here ends with .js, as some servers serve
.mjs with a type that browsers refuse.
"""

_READ = ("package.json", *FILES)

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
    source = cached_archive() if source is None else source
    content = _from_folder(source) if source.is_dir() else _from_archive(source)
    if missing := [path for path in _READ if not content.get(path)]:
        raise ExportError(f"--runtime {source}: lacks {missing[0]} of {PACKAGE}; {_manually()}")
    try:
        package = json.loads(content["package.json"])
        name, version = str(package["name"]), str(package["version"])
    except (ValueError, TypeError, KeyError) as err:
        raise ExportError(f"--runtime {source}: its package.json cannot be read; {_manually()}") from err
    if name != PACKAGE:
        raise ExportError(f"--runtime {source}: is the npm package {name}, not {PACKAGE}; {_manually()}")
    if version != VERSION:
        log.warning("--runtime %s: is version %s; the page was tested with %s", source, version, VERSION)
    files = {target: content[path] for path, target in FILES.items()}
    return files | {LICENSE: Path(__file__).with_name("license.txt").read_bytes()}


def _from_folder(folder: Path) -> dict[str, bytes]:
    try:
        return {path: read_file(folder / path) for path in _READ if (folder / path).exists()}
    except OSError as err:
        raise ExportError(f"--runtime {err.filename}: cannot be read: {err.strerror}; {_manually()}") from err


def _from_archive(path: Path) -> dict[str, bytes]:
    """Read the files in one pass, without unpacking others."""
    try:
        archive, content = read_file(path), {}
        if path.name == ARCHIVE and not _is_genuine(archive):
            raise ExportError(f"--runtime {path}: does not have the SHA-512 of the npm registry; {_manually()}")
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                name = member.name.removeprefix("package/")
                if name in _READ and member.isfile() and member.size <= MOST_BYTES:
                    content[name] = tar.extractfile(member).read()  # type: ignore[union-attr]  # a file
        return content
    except FileNotFoundError as err:
        raise ExportError(f"--runtime {path}: does not exist; {_manually()}") from err
    except (tarfile.TarError, zlib.error, OSError, EOFError) as err:
        raise ExportError(
            f"--runtime {path}: cannot be read as an archive of npm: {first_line(err)}; {_manually()}"
        ) from err


def cached_archive() -> Path:
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
