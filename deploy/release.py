"""Build a release and check it: `make release`. Publishes nothing.

Reads the version from pyproject.toml, checks that CHANGELOG.md has it, builds the source distribution and the wheel into dist/, installs
the wheel into an empty environment and starts `refract --version` there. Then prints the commands that publish.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class ReleaseError(Exception):
    """The release cannot be built; the message says why and what to do."""


def checked_version(root: Path) -> str:
    """The version in pyproject.toml. Raises ReleaseError if CHANGELOG.md has no section for it, or a section of unreleased changes."""
    version: str = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    sections = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    if "Unreleased" in sections:
        raise ReleaseError(
            f"CHANGELOG.md has the section `## Unreleased`. Name it `## {version}`, or set another version in pyproject.toml"
        )
    if version not in sections:
        raise ReleaseError(
            f"CHANGELOG.md has no section `## {version}`, the version in pyproject.toml; its newest is "
            f"{sections[0] if sections else 'missing'}. Add the section, or correct the version"
        )
    return version


def build(root: Path, folder: Path, version: str) -> tuple[Path, Path]:
    """Build both archives and move them into `folder`. Returns the source distribution and the wheel."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", temporary, cwd=root)
        names = (f"refract-{version}.tar.gz", f"refract-{version}-py3-none-any.whl")
        for name in names:
            if not Path(temporary, name).is_file():
                raise ReleaseError(
                    f"hatchling wrote {sorted(path.name for path in Path(temporary).iterdir())}, not {name}"
                )
        for name in names:
            Path(temporary, name).replace(folder / name)
    return folder / names[0], folder / names[1]


def check_wheel(wheel: Path, version: str) -> None:
    """Install the wheel, without its dependencies, into an empty environment and ask it for its version. Raises ReleaseError."""
    with tempfile.TemporaryDirectory(prefix="refract-release-") as temporary:
        venv.create(temporary, with_pip=True)
        python, command = Path(temporary, "bin", "python"), Path(temporary, "bin", "refract")
        _run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            wheel,
            cwd=Path(temporary),
        )
        printed = _run(command, "--version", cwd=Path(temporary)).strip()
    if printed != f"refract {version}":
        raise ReleaseError(f"the installed wheel prints {printed!r} for `refract --version`, not 'refract {version}'")


def _run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout's import path. Returns its output; raises ReleaseError with it if the command fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"`{' '.join(map(str, command))}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    try:
        version = checked_version(ROOT)
        if shutil.which("git") and (changes := _run("git", "status", "--porcelain", cwd=ROOT)):
            raise ReleaseError(f"the checkout has changes. Commit or remove them:\n{changes}")
        source, wheel = build(ROOT, ROOT / "dist", version)
        check_wheel(wheel, version)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print(f"wrote {source}\nwrote {wheel}: installs into an empty environment, and `refract --version` works there\n")
    print("Nothing is published. Next:")
    print(f"  git tag -a v{version} -m 'Refract {version}' && git push origin v{version}")
    print(
        f"  python -m pip install twine && python -m twine upload {source.relative_to(ROOT)} {wheel.relative_to(ROOT)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
