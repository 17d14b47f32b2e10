"""The list of messages has every kind of text that a user can see, with its line."""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("messages", Path(__file__).parents[1] / "docs" / "messages.py")
assert SPEC is not None and SPEC.loader is not None
messages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(messages)

SOURCE = '''"""A module's docstring."""
import argparse
X = "one key"
"""What X is."""

def f(path: "Path and more") -> None:
    """A function's docstring."""
    log.warning("the file %s is empty", path)
    print(f"wrote {path} to {'a folder'}")
    print("it was not written", file=sys.stderr)
    raise ValueError(
        f"{path}: is not a CSV file; "
        "save it as CSV"
    )

parser.add_argument("--x", help="number of images")
app.get("/x", summary="The served model")
re.match(r"[a-z]+", "x-y")
db.execute("SELECT a FROM b")
'''


def test_the_strings_of_a_module_are_listed_by_kind_and_line() -> None:
    assert [(m.line, m.kind, m.text) for m in messages.of_module(SOURCE, "pipeline/x.py")] == [
        (3, "text", "one key"),
        (8, "log", "the file %s is empty"),
        (9, "print", "wrote {path} to {'a folder'}"),
        (10, "error", "it was not written"),
        (12, "error", "{path}: is not a CSV file; save it as CSV"),
        (16, "help", "number of images"),
        (17, "api", "The served model"),
    ]


def test_the_texts_of_a_page_are_listed_without_its_scripts() -> None:
    page = "<h1>Search {{ name }}</h1>\n<script>var a = 'not shown'</script>\n<p>\n{{ value }}</p><img alt='a chart'>"
    assert [(m.line, m.text) for m in messages.of_page(page, "report.html")] == [
        (1, "Search {{ name }}"),
        (4, "a chart"),
    ]


def test_the_product_has_all_kinds() -> None:
    all_messages = list(messages.messages())
    assert {message.kind for message in all_messages} == set(messages.KINDS)
    keys = {message.text.partition(":")[0] for message in all_messages if message.kind == "key"}
    assert keys >= {"batch_size", "weight_decay", "margin"}, "of the data, the optimiser and the gate"
    assert len({(m.file, m.line) for m in all_messages}) > 1500
