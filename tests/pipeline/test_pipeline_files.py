"""Atomic writes of files."""

import resource
from pathlib import Path

import pytest

from refract.pipeline.console import run
from refract.pipeline.files import write_atomically, written_atomically


def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="report.json") as caught:
            write_atomically(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_error_without_errno_keeps_its_message(tmp_path: Path) -> None:
    """Pillow and Arrow raise such OSErrors."""
    with pytest.raises(OSError, match="^Corrupt snappy data$"), written_atomically(tmp_path / "out"):
        raise OSError("Corrupt snappy data")
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_file_and_not_the_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)  # the temporary file has a longer name, which no file system takes
    with pytest.raises(OSError, match="File name too long") as caught:
        write_atomically(path, b"")
    assert caught.value.filename == str(path)


def test_commands_name_the_remedy_of_a_failed_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    def write() -> int:
        write_atomically(tmp_path / "file" / "my.yaml", b"")
        return 0

    assert run("init", write) == 1
    assert "a file has the name of a folder that is needed" in capsys.readouterr().err
