"""Every `refract …` in README.md and docs/ names a command that exists, with options that it has."""

import re
from pathlib import Path

from refract.cli import COMMANDS

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
