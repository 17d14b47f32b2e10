"""The messages of docs/troubleshooting.md are those of the code."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("augment", "models", "pipeline", "serve", "refract")


def texts(path: Path) -> list[str]:
    """The strings of a module, with `…` in place of the expressions of an f-string."""
    strings = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            strings.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(re.sub(r"%[sdgf]|%\.\d+f|%g", "…", node.value))
    return strings


def test_every_message_is_one_of_the_code() -> None:
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    code = "\n".join(text for path in files for text in texts(path))
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) >= 50
    unknown = []
    for message in messages:
        parts = [part.strip(" ;:(),") for part in message.split("…")]
        if not all(part in code for part in parts if len(part) > 3):
            unknown.append(message)
    assert unknown == [], "docs/troubleshooting.md quotes messages that the code no longer has"
