"""Collect, for a GPU machine without a network, the packages that its image lacks: `python -m benchmarks.gpu.wheels gpu-wheels`.

The machine has Python 3.12, PyTorch with torchvision, Lightning, timm, OpenCV and the usual scientific packages. The versions and hashes
are those of requirements.lock. Refract's own wheel is added, as programs read its version.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

PACKAGES = (
    # the command line
    "jsonargparse",
    # the server
    "fastapi", "fastapi-offline", "starlette", "uvicorn", "httptools", "python-multipart", "pydantic", "pydantic-core", "annotated-types",
    "typing-inspection", "annotated-doc",
    # images
    "simplejpeg", "turbojpeg", "stringzilla",
    # the client of MLflow, and what it imports
    "mlflow-skinny", "cachetools", "databricks-sdk", "gitpython", "gitdb", "smmap", "importlib-metadata", "opentelemetry-api",
    "opentelemetry-sdk", "opentelemetry-proto", "opentelemetry-semantic-conventions", "python-dotenv", "sqlparse",
    # the peer of the augmentation
    "kornia", "kornia-rs",
)  # fmt: skip

PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")

LIMIT_MIB = 40


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the wheels; wheels in it are replaced")
    folder: Path = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary, "wheels")
        locked = Path(temporary, "requirements.txt")
        locked.write_text("".join(entries((ROOT / "requirements.lock").read_text("utf-8"), PACKAGES)), "utf-8")
        try:
            _pip("download", "--only-binary=:all:", *_target(), "--require-hashes", "-r", str(locked), "-d", str(part))
            _pip("wheel", "--no-build-isolation", "-w", str(part), str(ROOT))
        except subprocess.CalledProcessError as err:
            print(f"pip failed with exit code {err.returncode}; {folder} is unchanged", file=sys.stderr)
            return 1
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in part.glob("*.whl"):
            shutil.move(wheel, folder / wheel.name)
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{folder}: {len(wheels)} wheels, {size:.1f} MiB (limit {LIMIT_MIB} MiB)")
    return 0 if size <= LIMIT_MIB else 1


def entries(lock: str, names: Sequence[str]) -> Iterator[str]:
    """The entries of a lock file, with their hashes, of these packages. KeyError for a package that the lock lacks."""
    lock_entries = {
        match[1].lower(): match[0]
        for match in re.finditer(r"^([A-Za-z0-9_.-]+)==[^\n]*\n(?:    [^\n]*\n)*", lock, re.M)
    }
    for name in names:
        if name not in lock_entries:
            raise KeyError(f"requirements.lock has no {name}; adapt PACKAGES in {Path(__file__).name}")
        yield lock_entries[name]


def _target() -> list[str]:
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
    return ["--python-version", "3.12", "--implementation", "cp", *platforms]


def _pip(command: str, *arguments: str) -> None:
    run = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps", *arguments]
    subprocess.run(run, check=True)


if __name__ == "__main__":
    sys.exit(main())
