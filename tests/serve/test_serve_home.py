"""Caches of a user without a home directory or a name (`docker run --user 12345`)."""

import getpass
import os
import pwd
import tempfile
from pathlib import Path

import pytest
from warm_process import shared

from refract.serve.cli.home import MISSING_HOME, ensure_home

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove HOME, the user name and the entry in the user database. Returns the temporary directory."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_gets_a_private_persistent_one(nobody: Path, caplog) -> None:
    ensure_home()
    home = Path(os.environ["HOME"])
    assert home == Path.home() == nobody / f"refract-home-{os.getuid()}"
    assert home.stat().st_mode & 0o777 == 0o700 and getpass.getuser() == str(os.getuid())
    assert str(home) in caplog.text and "set HOME" in caplog.text
    caplog.clear()
    ensure_home()
    assert Path.home() == home and not caplog.text
    del os.environ["HOME"]
    ensure_home()
    assert Path.home() == home, "the same at the next start"


def test_a_home_that_cannot_hold_caches_is_replaced(nobody: Path, monkeypatch, caplog) -> None:
    (nobody / "file").touch()
    monkeypatch.setenv("HOME", str(nobody / "file"))
    ensure_home()
    assert Path.home().parent == nobody and f"below {nobody / 'file'}" in caplog.text


@pytest.mark.parametrize("home", ["", "home", "home/not/there/yet"])
def test_a_usable_home_is_not_replaced(nobody: Path, monkeypatch, caplog, home: str) -> None:
    monkeypatch.setenv("HOME", str(nobody / home))
    ensure_home()
    assert os.environ["HOME"] == str(nobody / home) and not caplog.text


def test_a_directory_of_another_user_is_not_used(nobody: Path) -> None:
    (nobody / "elsewhere").mkdir(mode=0o700)
    taken = nobody / f"refract-home-{os.getuid()}"
    for take in (
        lambda: taken.symlink_to(nobody / "elsewhere"),
        taken.touch,
        lambda: taken.mkdir(mode=0o777) or taken.chmod(0o777),
    ):
        take()
        ensure_home()
        home = Path(os.environ.pop("HOME"))
        assert home != taken and home.parent == nobody and home.stat().st_mode & 0o777 == 0o700
        taken.rmdir() if taken.is_dir() and not taken.is_symlink() else taken.unlink()


def test_without_a_temporary_directory_the_server_has_no_caches(nobody: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(nobody / "none"))
    ensure_home()
    assert os.environ["HOME"] == MISSING_HOME and "runs without caches" in caplog.text


@pytest.mark.slow
def test_the_server_starts_without_a_home_and_caches_its_backend(bundle, tmp_path: Path) -> None:
    code = (
        "import pwd, sys, tempfile\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid, tempfile.tempdir = unknown, None\n"
        "import refract.serve.cli.command\n"
        "sys.exit(refract.serve.cli.command.main(sys.argv[1:]))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    options = [str(bundle.path), "--port", "0", "--device", "cpu", "--backend", "openvino"]
    process = shared().popen(options, cwd=ROOT, env=environment | {"TMPDIR": str(tmp_path)}, code=code)
    ready = process.stdout.readline()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert ready.startswith("Refract serves shapes") and process.returncode == 0, err
    assert "caches are written to" in err and list(tmp_path.glob("refract-home-*/.cache/refract/backends/*/kept.xml"))
