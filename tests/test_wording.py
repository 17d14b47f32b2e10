"""The glossary's lint finds words in comments, docstrings and messages, and nothing else."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("wording", Path(__file__).parents[1] / "docs" / "wording.py")
assert SPEC is not None and SPEC.loader is not None
wording = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(wording)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1  # one picture for each class\n", [(1, "picture")]),
        ('def f():\n    """The file was left\n    out."""\n', [(2, "left out")]),
        ('print(f"{x} is no number")\n', [(1, "is no number")]),
        ('read("pictures")\nkeep = x["picture"]  # the key `picture` of old files\n', []),
        ("night = 1\n", []),
    ],
)
def test_words_are_found_by_their_line(source: str, expected: list[tuple[int, str]]) -> None:
    assert [(line, words) for line, words, _ in wording.of_python(source)] == expected


def test_variables_that_are_named_for_how_they_came_about_are_found() -> None:
    source = "class A:\n    kept: int\n    made = 1\n\ndef f(own):\n    found, b.made = own\n    return [told for told in found]\n"
    assert [(line, name) for line, name, _ in sorted(wording.names(source))] == [(5, "own"), (6, "found"), (7, "told")]
    for source in (
        "try: x\nexcept E as own: y",
        "import a as own",
        "match x:\n case [*own]: y",
        "with a as (b, own): y",
    ):
        assert [name for _, name, _ in wording.names(source)] == ["own"], source
