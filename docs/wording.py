"""`python docs/wording.py [--names] [PATH…]`: report words that the glossary replaces, and names of variables, as FILE:LINE.

Checks the comments, docstrings and messages of Python files, and the text of Markdown, YAML and HTML. A string without a space is a key of
a file format or of an API: it stays readable for old files, and is not checked. Neither are names in backticks. A variable must not have a
name of VAGUE. With --names, only the variables are checked.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# A pattern of the words, in lower case, and what to write in their place.
GLOSSARY = {
    r"pictures?|pictured": "image, has_image",
    r"hold-outs?": "test set; holdout for the frozen set of the promotion gate",
    r"nights?": "retraining run; nightly for the schedule",
    r"(?:go|goes|going|gone|went) on": "continue, resume",
    r"tells?|told|telling": "report, log, name, say which",
    r"golden (?:ones?|answers?)": "golden samples, golden predictions",
    r"(?:is|are|was|were|be|becomes?) no (?:number|figure)s?|no number": "NaN, non-finite",
    r"by heart": "overfits",
    r"figures": "metrics, measurements, charts",
    r"shares? of": "fraction of, ratio of",
    r"the house": "in-flight requests, an admission slot",
    r"lanes?": "model worker",
    r"shelf|shelves": "disk quota",
    r"looks of": "image statistics",
    r"guests?": "third-party transform",
    r"mirror(?:ed|s|ing)?(?: images?)?": "horizontal flip; reflected, of a border",
    r"zero-cent(?:re|red|res|ring)": "normalisation, mean subtraction",
    r"(?:was|were|is|are|been) taught|teachers? answers?": "distillation, teacher logits",
    r"several labels": "multi-label",
    r"(?:left|leaves?|leaving|leave) out": "skipped, excluded; skip, exclude",
    r"begun": "started",
    r"beside": "compared with, against, next to",
    r"strangers?": "untrusted",
    r"seal(?:ed|s)?": "verified, checksummed",
    r"of (?:one's|its|their|our|his|your) own": "own, custom, separate",
    r"(?:knows?|known) nothing of": "independent of, does not import",
    r"what is (?:asked|answered|told|made|kept|there)": "the noun: the request, the prediction, the file",
    r"courses' claims": "textbook claims",
    r"whoever|whatever it is": "the noun",
    r"comes? to be": "is built",
    r"is no (?:file|folder|image|table|bundle|run|part|map|cache|champion|digit|text|picture|url)": "is not a …",
}
VAGUE = {"found", "kept", "made", "own", "told"}
"""Names that say how a value came about. A variable is named for what it holds."""

PATTERN = re.compile(
    "|".join(f"(?P<g{i}>\\b(?:{word})\\b)".replace(" ", r"\s+") for i, word in enumerate(GLOSSARY)), re.IGNORECASE
)
CODE = re.compile(r"`[^`]*`|\{[{%].*?[}%]\}|(?<=\]\()[^)\s]+|</?picture>")
"""Names in backticks, expressions of templates and targets of links: code, not words."""
TEXTS = {".md", ".yaml", ".yml", ".html"}


def words(text: str, line: int) -> Iterator[tuple[int, str, str]]:
    """(line, words, replacement) of a text that starts at `line`. Words may be split by the end of a line."""
    text = CODE.sub(lambda code: re.sub(r"[^\n]", " ", code.group()), text)
    for match in PATTERN.finditer(text):
        assert match.lastgroup is not None
        replacement = list(GLOSSARY.values())[int(match.lastgroup[1:])]
        yield line + text.count("\n", 0, match.start()), " ".join(match.group().split()), replacement


def of_python(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, words, replacement) of the comments and the strings of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from words(token.string, token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from words(node.value, node.lineno)


def names(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, name, replacement) of the variables and parameters of a Python file. Fields of classes stay: files and callers use them."""
    tree = ast.parse(source)
    fields = {
        id(name)
        for scope in ast.walk(tree) if isinstance(scope, ast.ClassDef)
        for item in scope.body if isinstance(item, ast.AnnAssign | ast.Assign)
        for name in ast.walk(item) if isinstance(name, ast.Name)
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) not in fields and (name := _name(node)) in VAGUE:
            yield getattr(node, "lineno", 0), name, "a noun for what it holds"


def _name(node: ast.AST) -> str:
    """Return the name that the node gives to a value; "" if it gives none."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.alias(asname=str(name)):
            return name
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return name
        case _:
            return ""


def of_file(path: Path, only_names: bool) -> Iterator[tuple[int, str, str]]:
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        yield from names(text)
    if not only_names:
        yield from of_python(text) if path.suffix == ".py" else words(text, 1)


def main(arguments: list[str]) -> int:
    only_names = "--names" in arguments
    paths = [argument for argument in arguments if argument != "--names"]
    listed = subprocess.run(["git", "ls-files", "-z", *paths], capture_output=True, text=True, check=True).stdout
    count = 0
    for path in map(Path, sorted(filter(None, listed.split("\0")))):
        if path.is_symlink() or path == Path(__file__).resolve().relative_to(Path.cwd()):
            continue
        if path.suffix == ".py" or path.suffix in TEXTS:
            for line, said, wanted in sorted(of_file(path, only_names)):
                print(f"{path}:{line}: {said!r}; write: {wanted}")
                count += 1
    print(f"{count} words to replace" if count else "wording: no word to replace")
    return bool(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
