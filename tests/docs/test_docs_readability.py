"""The readability lint counts the words of sentences as a reader sees them."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("readability", Path(__file__).parents[2] / "docs" / "readability.py")
assert SPEC is not None and SPEC.loader is not None
readability = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readability)

LONG = " ".join(["word"] * 41)


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        (f"# Title\n\nShort. {LONG}.\n", [3, 1]),
        (f"Short.\n\n- a list\n- {LONG}\n", [4]),
        (f"Short.\n\n| cell |\n|---|\n| {LONG} |\n\n```\n{LONG}\n```\n", []),
        (" ".join(["word"] * 21) + ". " + " ".join(["word"] * 21) + ".\n", [1]),
        (f"See `{LONG}` and [a link](https://example.org/{'long-' * 50}). Done.\n", []),
        ("- one\n  - nested\n", [2]),
        ("- one\n    - nested\n", []),
    ],
)  # fmt: skip
def test_problems_are_reported_by_their_line(page: str, lines: list[int]) -> None:
    assert [line for line, _ in readability.of_page(page)] == lines


def test_abbreviations_and_numbers_end_no_sentence() -> None:
    assert readability.sentences("Source: Yun et al. 2019. It has 1.5 parts (see 2.). End") == [5, 6, 1]
