"""Every `refract …` in README.md and docs/ names a command that exists, with options that it has; complete ones are accepted."""

import re
import shlex

import documented
import pytest
from documented import ROOT

from refract.cli import COMMANDS, main

CONFIGURED = {"torchrun", "train", "retrain", "tune", "find", "init", "preview", "score"}
"""Commands that take keys of the config as options."""


def refract(commands: list[documented.Command]) -> list[tuple[str, str]]:
    """(page, arguments) of the commands of Refract. `refract --plugin FILE NAME` starts a command of the plugin."""
    calls = [(command.page, re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command.line)) for command in commands]
    return [(page, line.removeprefix("refract ")) for page, line in calls if re.match(r"refract [a-z]", line)]


def options() -> dict[str, set[str]]:
    """Command → its options, from the generated reference."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text("utf-8")
    known: dict[str, set[str]] = {}
    for name, text in re.findall(r"^### refract ([a-z-]+).*?\n```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        known.setdefault(name, set()).update(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    return known


def config_keys() -> set[str]:
    page = (ROOT / "docs" / "reference" / "config.md").read_text("utf-8")
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return {
        f"--{section}.{key}" for section, text in sections for key in re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    }


def test_documented_commands_and_options_exist() -> None:
    known, keys = options(), config_keys()
    assert set(known) == set(COMMANDS) and len(keys) > 80
    calls, unknown = refract(documented.commands()), []
    for page, call in calls:
        name, *rest = call.split()
        accepted = {"--help"} | known.get(name, set()) | (keys if name in CONFIGURED else set())
        given = re.findall(r"(?<!\S)--[a-zA-Z][\w.-]*", " ".join(rest))
        if name not in COMMANDS or not set(given) <= accepted:
            unknown.append(f"{page}: refract {call}")
    assert len(calls) > 150
    assert unknown == []


def test_documented_commands_are_accepted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command reads its arguments as documented. The work behind them does not run."""
    from refract.pipeline import console
    from refract.serve.cli import options as server_options

    started: list[str] = []

    def start(command: str, work: object, **_: object) -> int:
        started.append(command)
        return 0

    monkeypatch.setattr(console, "run", start)
    calls = [(page, shlex.split(line)) for page, line in refract(documented.complete()) if "--url" not in line]
    assert len(calls) > 80
    rejected = []
    for page, call in calls:
        try:
            if call[0] == "serve":
                server_options.parse(
                    [argument for argument in call[1:] if argument not in ("--quiet", "--verbose")], {}
                )
                code: object = 0
            else:
                code = main(call)
        except SystemExit as end:
            code = end.code
        if code:
            rejected.append(f"{page}: refract {' '.join(call)}: {capsys.readouterr().err[-200:]}")
    assert rejected == []
    assert {"train", "evaluate", "predict", "score", "retrain", "embed", "search", "soup"} <= set(started)
