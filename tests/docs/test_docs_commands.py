"""Every `refract …` in README.md and docs/ names a command that exists, with options that it has; complete ones are accepted."""

import re
import shlex
from pathlib import Path

import pytest

from refract.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGURED = {"train", "retrain", "tune", "find", "init", "preview", "score"}
"""Commands that take keys of the config as options."""


def commands(text: str) -> list[str]:
    """The commands in the code of a page: each line of a block, and each name in backticks."""
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    calls = (
        re.search(r"(?:^|(?<!from)\s)refract ([a-z][a-z-]*(?:\s.*)?)$", code.partition("  #")[0].strip())
        for code in [*lines, *inline]
    )
    return [call[1] for call in calls if call]


def options() -> dict[str, set[str]]:
    """Command → its options, from the generated reference."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text("utf-8")
    known: dict[str, set[str]] = {}
    for name, text in re.findall(r"^### refract ([a-z-]+).*?\n```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        known.setdefault(name, set()).update(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
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
    found, unknown = 0, []
    for page in PAGES:
        for call in commands(page.read_text("utf-8")):
            name, *rest = call.split()
            found += 1
            accepted = {"--help"} | known.get(name, set()) | (keys if name in CONFIGURED else set())
            given = re.findall(r"(?<!\S)--[a-zA-Z][\w.-]*", " ".join(rest))
            if name not in COMMANDS or not set(given) <= accepted:
                unknown.append(f"{page.relative_to(ROOT)}: refract {call}")
    assert found > 150
    assert unknown == []


PLACEHOLDER = re.compile(r"…|[\[<|]|\bCOMMAND\b")
"""Marks a command that a reader completes first."""


def complete_commands(page: Path) -> list[list[str]]:
    """The arguments of the complete commands of a page: those in its blocks, and in the table of recipes."""
    text = page.read_text("utf-8")
    if page.name == "recipes.md":
        lines = [call for row in text.splitlines() for call in re.findall(r"\| `refract ([^`]+)` \|", row)]
    else:
        blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        joined = "\n".join(blocks).replace("\\\n", " ")
        lines = re.findall(r"^(?:\$ )?refract ([a-z][a-z-]* .*)$", joined, re.MULTILINE)
    calls = [shlex.split(line.rstrip("& "), comments=True) for line in lines if not PLACEHOLDER.search(line)]
    return [call for call in calls if call[0] in COMMANDS and "--url" not in call]


def test_documented_commands_are_accepted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command reads its arguments as documented. The work behind them does not run."""
    from refract.pipeline.cli import console
    from refract.serve.cli import options as server_options

    started: list[str] = []

    def start(command: str, work: object, **_: object) -> int:
        started.append(command)
        return 0

    monkeypatch.setattr(console, "run", start)
    calls = [(page, call) for page in PAGES for call in complete_commands(page)]
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
            rejected.append(f"{page.relative_to(ROOT)}: refract {' '.join(call)}: {capsys.readouterr().err[-200:]}")
    assert rejected == []
    assert {"train", "evaluate", "predict", "score", "retrain", "embed", "search", "soup"} <= set(started)
