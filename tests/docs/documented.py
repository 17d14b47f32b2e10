"""The commands that the pages document: the lines of code blocks, and the code in sentences and tables."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ("docs/reference/cli.md",)
"""Pages that quote `--help`."""

BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "sh", "bash", "console")
PROGRAMS = ("refract", "python", "make", "curl", "docker", "kubectl", "mlflow", "openssl", "pip", "torchrun", "uv")
PLACEHOLDER = re.compile(
    r"…|[\[<|]|\b(?:COMMAND|CONFIG|FILE|RUN|BUNDLE|PHOTOS|IMAGE|FOLDER|DIR|OP|SOURCE|RUN_ID|CIFAR)\b|(?<!runs/)\bNAME\b(?!/)"
)
"""Marks a command that a reader completes first. `runs/NAME` is a folder that a test can have."""


class Command(NamedTuple):
    """A documented command. page: its path in the repository; line: as written, without comment and `&`; in_block: in a code block."""

    page: str
    line: str
    in_block: bool


def commands() -> list[Command]:
    """The commands of all pages in their order, also those with placeholders."""
    all_commands = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        if name in GENERATED:
            continue
        text = page.read_text("utf-8")
        blocks = [block for language, block in BLOCK.findall(text) if language in SHELL]
        lines = [(line, True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [(code, False) for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))]
        for line, in_block in lines:
            line = re.sub(r"\s\s+#\s.*$", "", line.removeprefix("$ ")).strip().removesuffix("&").strip()
            program, _, rest = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line).partition(" ")
            if program in PROGRAMS and rest:
                all_commands.append(Command(name, line, in_block))
    return all_commands


def complete() -> list[Command]:
    """The commands without a placeholder. Code such as `refract score` or `refract serve --sample` in a sentence only names something."""
    return [c for c in commands() if not PLACEHOLDER.search(c.line) and (c.in_block or not _is_name(c.line))]


def _is_name(line: str) -> bool:
    words = line.split()
    if len(words) <= (3 if words[1] == "labels" else 2):
        return True
    return words[2].startswith("--") and words[2] not in ("--resume", "--list", "--replay")
