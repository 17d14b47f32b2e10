"""Remove CUDA from an installed torch, for an image for CPUs: run `python without_cuda.py` with the Python of that environment.

PyPI's torch for Linux is linked with 3 GB of NVIDIA's libraries, and `import torch` loads all of them. Without a GPU, torch calls only the
CUDA runtime, which reports that there is no GPU. So the runtime stays. Every other library that the loader needs is replaced by one of the
same name whose functions print their name and abort. Torch's own GPU kernels, two thirds of libtorch_cuda.so, are cut out of that file.

Needs a C compiler and binutils, only while the image is built.
"""

import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

KEPT = ("libcudart.so.13", "libcufile.so.0", "libcupti.so.13")
"""The CUDA runtime, and what torch's CPU half is linked with itself: 10 MB."""

LOAD, NOTE = 1, 4
SEGMENT = "<IIQQQQQQ"  # a program header of a 64-bit ELF file, little-endian


class Segment(NamedTuple):
    kind: int
    flags: int
    offset: int
    virtual: int
    physical: int
    in_file: int
    in_memory: int
    align: int


ABSENT = """#include <stdio.h>
#include <stdlib.h>
static void absent(const char *name) { fprintf(stderr, "%s: this image is without CUDA\\n", name); abort(); }
"""


def main() -> None:
    """Shrink the environment of the running interpreter."""
    site = Path(sysconfig.get_path("platlib"))
    libraries = site / "torch" / "lib"
    (libraries / "libtorch_cuda_linalg.so").unlink()  # loaded only when it is called
    shutil.rmtree(site / "torch" / "include")  # headers for compiling extensions
    vendor = {path.name: path for path in (site / "nvidia").rglob("lib*.so*")}
    linked = sorted(libraries.glob("*.so"))
    asked = {name for library in linked for name in needed(library)} & set(vendor) - set(KEPT)
    if not asked:
        sys.exit(f"no library of {libraries} is linked with one of NVIDIA's: this build of torch is not supported")
    wanted = {name for library in linked for name in symbols(library, "--undefined-only")}
    for name in sorted(asked):
        versions = symbols(vendor[name], "--defined-only")
        replace(libraries / name, {function: versions[function] for function in sorted(versions.keys() & wanted)})
    drop_kernels(libraries / "libtorch_cuda.so")
    remove_packages(site)


def needed(library: Path) -> list[str]:
    """Return the names of the libraries that this library is linked with."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", str(library)))


def symbols(library: Path, which: str) -> dict[str, str]:
    """Return the dynamic symbols with their versions; some libraries have no versions."""
    names = (line.split()[0] for line in output("nm", "-D", "-P", which, str(library)).splitlines())
    return {name: version.lstrip("@") for name, _, version in (full.partition("@") for full in names)}


def replace(library: Path, functions: Mapping[str, str]) -> None:
    """Replace `library` by one of aborting functions with the same versions."""
    source = ABSENT + "".join(f'void {name}(void) {{ absent("{name}"); }}\n' for name in functions)
    versions = {version: [name for name in functions if functions[name] == version] for version in functions.values()}
    script = "".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in versions.items() if version)
    with tempfile.NamedTemporaryFile("w", suffix=".map") as file:
        file.write(script)
        file.flush()
        options = [f"-Wl,-soname,{library.name}", *([f"-Wl,--version-script,{file.name}"] if script else [])]
        command = ["cc", "-shared", "-fPIC", "-xc", "-", *options, "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True)


def drop_kernels(library: Path) -> None:
    """Cut .nv_fatbin, the machine code for GPUs, out of the file. Its memory becomes zeros, and all other data keeps its address.

    Its segment becomes two, and the header of a note becomes that of the second. ValueError for another layout of the file.
    """
    data = bytearray(library.read_bytes())
    table, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    headers = [Segment(*struct.unpack_from(SEGMENT, data, table + i * 56)) for i in range(count)]
    section = re.search(
        r"\.nv_fatbin +PROGBITS +[0-9a-f]+ ([0-9a-f]+) ([0-9a-f]+)", output("readelf", "-SW", str(library))
    )
    offset, size = (int(text, 16) for text in section.groups()) if section else (0, 0)
    whole = next(
        (h for h in headers if h.kind == LOAD and h.offset <= offset and offset + size <= h.offset + h.in_file), None
    )
    note = next((h for h in headers if h.kind == NOTE), None)
    if not size or whole is None or note is None:
        raise ValueError(f"{library}: no .nv_fatbin in a segment, or no note: this build of torch is not supported")
    begin, end = -(-offset // whole.align) * whole.align, (offset + size) // whole.align * whole.align
    at = whole.virtual - whole.offset
    before = whole._replace(in_file=begin - whole.offset, in_memory=end - whole.offset)
    rest = whole.offset + whole.in_file - end
    after = whole._replace(offset=end, virtual=at + end, physical=at + end, in_file=rest, in_memory=rest)
    headers[headers.index(whole)] = before
    headers.remove(note)
    headers.insert(headers.index(before) + 1, after)
    for i, header in enumerate(headers):
        moved = header._replace(offset=header.offset - (end - begin)) if header.offset >= end else header
        struct.pack_into(SEGMENT, data, table + i * 56, *moved)
    struct.pack_into("<Q", data, 32, table - (end - begin) if table >= end else table)
    struct.pack_into("<Q", data, 40, 0)  # no section table: the loader reads segments
    struct.pack_into("<HH", data, 60, 0, 0)
    del data[begin:end]
    library.write_bytes(data)


def remove_packages(site: Path) -> None:
    """Remove NVIDIA's packages and Triton, except for the files in KEPT.

    A package without remaining files loses its metadata too, so that lists of packages stay correct.
    """
    for package in distributions(path=[str(site)]):
        if not re.match(r"nvidia-|cuda-|triton$", package.name):
            continue
        files = [Path(str(package.locate_file(file))) for file in package.files or ()]
        # Triton's files do not stay: it brings its own copies.
        stays = [path for path in files if path.name in KEPT and site / "nvidia" in path.parents]
        for path in files:
            if path not in stays and not (stays and ".dist-info" in str(path)):
                path.unlink(missing_ok=True)
    for folder in sorted((path for path in site.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def output(*command: str) -> str:
    return subprocess.run(command, text=True, check=True, capture_output=True).stdout


if __name__ == "__main__":
    main()
