"""List every text that a user of Refract can see, as FILE:LINE, kind and text: `python docs/messages.py`.

The list is for reviews: a message names cause, place and cure in the words of the glossary, as short as possible.

Kinds: error (raised or printed as an error), log, help (options, commands), print, api (OpenAPI and problem details), key (meanings of
config keys), op (first lines of the ops' docstrings), page (HTML), and text for the others, such as parts of messages.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("augment", "models", "pipeline", "serve", "refract")
SECTIONS = ("pipeline/config/sections.py", "pipeline/config/retraining_sections.py", "models/training/specs.py")
"""The modules with the config's sections, whose docstrings give the keys' meanings."""

KINDS = ("error", "log", "help", "print", "api", "key", "op", "page", "text")
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
PROSE = re.compile(r"[^\W\d_]{2,}[ ,:;]+[^ ]*[^\W\d_]{2,}")
"""Two words in a row: names of keys, formats and patterns are no messages."""
SQL = re.compile(r"(BEGIN|CREATE|DELETE|INSERT|SELECT|UPDATE) ")


class Message(NamedTuple):
    """A text and where it is."""

    file: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.text}"


def messages() -> Iterator[Message]:
    """Yield the texts of all product files, ordered by file and line."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*" if folder == "refract" else "**/*")):
            file = path.relative_to(ROOT).as_posix()
            if path.suffix == ".py":
                yield from sorted(of_module(path.read_text("utf-8"), file), key=lambda message: message.line)
            elif path.suffix in (".html", ".js"):
                yield from of_page(path.read_text("utf-8"), file)


def of_module(source: str, file: str) -> Iterator[Message]:
    """Yield the texts of a Python module: its strings with two words or more, apart from docstrings and annotations."""
    tree = ast.parse(source)
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                skipped.update(ast.walk(annotation))
        if isinstance(node, ast.ClassDef):
            yield from _of_docstring(node, file)
    yield from _of_node(tree, "text", file, skipped)


def _of_docstring(node: ast.ClassDef, file: str) -> Iterator[Message]:
    text = ast.get_docstring(node) or ""
    if file in SECTIONS:
        for key, meaning in re.findall(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)$", text, re.MULTILINE):
            yield Message(file, node.lineno, "key", f"{key}: {' '.join(meaning.split())}")
    elif file.startswith("augment/ops/") and text and not node.name.startswith("_"):
        yield Message(file, node.lineno, "op", f"{node.name}: {text.splitlines()[0]}")


def _of_node(node: ast.AST, kind: str, file: str, skipped: set[ast.AST]) -> Iterator[Message]:
    if node in skipped:
        return
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        text = " ".join(_text(node).split())
        if PROSE.search(text) and not SQL.match(text):
            yield Message(file, node.lineno, kind, text)
        return  # a text inside the braces of an f-string is shown with it
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _of_node(child, _kind(node, name, child, kind), file, skipped)


def _kind(parent: ast.AST, field: str, child: ast.AST, kind: str) -> str:
    """Return the kind of the texts in `child`, which is in `field` of `parent`."""
    if isinstance(parent, ast.Raise) and field == "exc":
        return "error"
    if isinstance(parent, ast.Call) and field != "func":
        return _kind_of_call(parent, child, kind)
    return "text" if isinstance(child, ast.FunctionDef | ast.ClassDef) else kind


def _kind_of_call(call: ast.Call, child: ast.AST, kind: str) -> str:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    option = child.arg if isinstance(child, ast.keyword) else None
    if option in ("help", "epilog", "usage") or (option == "description" and name == "ArgumentParser"):
        return "help"
    if option in ("description", "summary", "detail", "title"):
        return "api"
    if name == "print":
        return "error" if any(keyword.arg == "file" for keyword in call.keywords) else "print"
    if isinstance(call.func, ast.Attribute) and name in LEVELS:
        owner = getattr(call.func.value, "id", "")
        return "error" if owner == "parser" else "log" if owner in ("log", "logger", "logging") else kind
    return "error" if name.endswith(("Error", "Problem")) else kind


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def of_page(source: str, file: str) -> Iterator[Message]:
    """Yield the texts of an HTML page or of a script's strings."""
    if file.endswith(".js"):
        for number, line in enumerate(source.splitlines(), start=1):
            for text in re.findall(r"[\"'`]([^\"'`]+)[\"'`]", line.partition("//")[0]):
                if PROSE.search(text):
                    yield Message(file, number, "page", text)
        return
    page = _Page(file)
    page.feed(source)
    yield from page.messages


class _Page(HTMLParser):
    def __init__(self, file: str) -> None:
        super().__init__()
        self.file, self.messages, self._code = file, list[Message](), False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._code = tag in ("script", "style")
        for name, value in attrs:
            if name in ("title", "alt", "placeholder", "aria-label") and value:
                self.handle_data(value)

    def handle_data(self, data: str) -> None:
        line, text = self.getpos()[0] + data[: len(data) - len(data.lstrip())].count("\n"), " ".join(data.split())
        if not self._code and re.search(r"[^\W\d_]{2}", re.sub(r"\{[{%].*?[%}]\}", "", text)):
            self.messages.append(Message(self.file, line, "page", text))

    def handle_endtag(self, tag: str) -> None:
        self._code = False


def main() -> None:
    parser = argparse.ArgumentParser(description="List every text that a user of Refract can see.")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; repeatable")
    parser.add_argument("--words", type=int, default=0, metavar="N", help="only texts with at least N words")
    args = parser.parse_args()
    for message in messages():
        if message.kind in (args.kind or KINDS) and len(message.text.split()) >= args.words:
            print(message)


if __name__ == "__main__":
    main()
