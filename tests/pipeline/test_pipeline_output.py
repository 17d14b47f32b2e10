"""--quiet, --verbose, --json and NO_COLOR mean the same for every command."""

import importlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_data import COLORS, make_image, write_image

from refract import output
from refract.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_output_options(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command itself is replaced: it prints a text and a result."""

    def work(arguments: list[str]) -> int:
        assert arguments == ["A", "--own", "B"]
        print("a text")
        subprocess.run(["echo", "a child"], check=True)
        output.result({"path": Path("a"), "score": float("nan")})
        print(logging.getLevelName(output.level()))
        return 0

    monkeypatch.setattr(importlib.import_module(COMMANDS[command][0]), "main", work)
    assert main([command, "A", "--own", "--quiet", "B"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "WARNING"
    assert main([command, "--verbose", "A", "--own", "B"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "DEBUG"
    assert main([command, "A", "--own", "B"]) == 0 and output.VARIABLE not in os.environ
    assert capfd.readouterr().out.splitlines()[-1] == "INFO"
    if command not in output.TEXT_ONLY:
        assert main([command, "A", "--own", "B", "--json"]) == 0
        printed = capfd.readouterr()
        assert printed.out == '{"path": "a", "score": null}\n'
        assert "a text" in printed.err and "a child" in printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_lists_the_output_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as stopped:
        assert stopped.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("--quiet", "--verbose", "NO_COLOR"))
    assert ("--json" in text) == (command not in output.TEXT_ONLY)


def test_options_that_exclude_each_other_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ops", "--quiet", "--verbose"]) == 2 and "remove one of them" in capsys.readouterr().err
    assert main(["completion", "bash", "--json"]) == 2 and "no --json" in capsys.readouterr().err
    monkeypatch.setenv(output.VARIABLE, "loud")
    assert main(["ops"]) == 2 and "'loud' is neither quiet nor verbose" in capsys.readouterr().err


def test_without_arguments_newcomers_see_the_first_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    first, groups = capsys.readouterr().out.split("\n\n", 1)
    commands = [line.split()[1] for line in first.splitlines()[1:]]
    assert commands == ["demo", "init", "train", "predict", "serve"] and "\nEvaluate:\n" in groups


def test_commands_print_their_result_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in COLORS:
        write_image(tmp_path / "images" / label / "1.png", make_image(label, 1))

    def result_of(*arguments: object) -> dict:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    image = tmp_path / "images" / "red" / "1.png"
    assert result_of("preview", tmp_path / "images", "-o", tmp_path / "grid.png")["images"] == len(COLORS)
    assert result_of("explain", "imagenet", image, "--repeats", 1)["passes"]
    assert result_of("augment", "imagenet", tmp_path / "images", tmp_path / "copies")["images"] == len(COLORS)
    assert result_of("ops", "Rotate")["kind"] == "geometric"
    assert "$schema" in result_of("config", "keys")
    assert main(["schedule", "--list", "--json"]) == 0 and capsys.readouterr().out == ""


def test_a_reader_that_closes_the_json_early_causes_no_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in `refract predict --json … | head -1`."""

    def work(arguments: list[str]) -> int:
        while True:
            output.result({"score": 1.0})

    monkeypatch.setattr(importlib.import_module(COMMANDS["ops"][0]), "main", work)
    reading, writing = os.pipe()
    os.close(reading)
    stdout, before = sys.stdout, os.dup(1)
    os.dup2(writing, 1)
    try:
        with open(1, "w", encoding="utf-8", closefd=False) as closed:
            monkeypatch.setattr(sys, "stdout", closed)
            assert main(["ops", "--json"]) == 0
    finally:
        os.dup2(before, 1)
        monkeypatch.setattr(sys, "stdout", stdout)
        for descriptor in (before, writing):
            os.close(descriptor)
    assert capfd.readouterr().err == ""


def test_verbose_shows_where_an_error_was_raised(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys, refract.cli; sys.exit(refract.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "ops", "Rotat"]
    short = subprocess.run(command, capture_output=True, text=True, check=False)
    assert short.returncode == 2 and "Traceback" not in short.stderr and "Rotate" in short.stderr
    long = subprocess.run([*command, "--verbose"], capture_output=True, text=True, check=False)
    assert long.returncode == 2 and "Traceback" in long.stderr and "refract ops: no op" in long.stderr


class ClosedPipe(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("arguments", [(), ("--help",), ("ops",), ("ops", "--help")])
def test_a_reader_that_closes_the_pipe_ends_the_command(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `refract ops | head` does."""
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    assert main(arguments) == 0
