"""A text as its words and what stands between them, so that a changed text keeps the spacing and the marks of the one it came from."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

# Letters, digits and the marks that Python's \w leaves out: combining ones, and the vowel signs of Indic scripts and of Thai.
_LETTER = r"[\w\u0300-\u036f\u0900-\u0e7f]"
# Chinese and Japanese write no spaces: each of their characters is a word.
_WORD = re.compile(
    rf"([\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff]){_LETTER})+(?:['’.\-]{_LETTER}+)*)"
)

NUMBERS, NEGATIONS = "<numbers>", "<negations>"

_NEGATIONS = """
no not never none nobody nothing neither nor nowhere cannot without
nicht kein keine keinen keinem keiner keines nie niemals niemand nichts ohne
ne pas jamais rien personne aucun aucune sans
nunca jamás nadie nada ningún ninguna sin
non mai niente nessuno senza
niet geen nooit zonder
não nem
"""


def split(text: str) -> list[str]:
    """[between, word, between, word, …, between]: joined they are the text again; words have odd places."""
    return _WORD.split(text)


def remove(pieces: list[str], place: int) -> None:
    """Take the word at `place` out, with one of the spaces around it."""
    pieces[place] = ""
    before, after = pieces[place - 1], pieces[place + 1]
    if before[-1:].isspace():
        pieces[place - 1] = before[:-1]
    elif after[:1].isspace() and not before:
        pieces[place + 1] = after[1:]


def like(word: str, model: str) -> str:
    """`word`, capital where `model` is: its first letter, or all of it."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


@cache
def kept(entries: tuple[str, ...]) -> "Kept":
    """Which words must stay. entries: words in any case, `<numbers>` for what holds a digit, `<negations>` for no, not, don't and their
    like in seven languages, or the name of a text file with an entry a line. ValueError for a file that cannot be read."""
    words: set[str] = set()
    for entry in entries:
        words.update(lines(entry, "keep") if entry.endswith(".txt") else [entry])
    return Kept(frozenset(word.lower() for word in words))


class Kept:
    """A test of words."""

    def __init__(self, entries: frozenset[str]) -> None:
        self.numbers, self.negations = NUMBERS in entries, NEGATIONS in entries
        self.words = entries - {NUMBERS, NEGATIONS} | (set(_NEGATIONS.split()) if self.negations else set())

    def __call__(self, word: str) -> bool:
        lower = word.lower()
        if lower in self.words or (self.numbers and any(map(str.isdigit, word))):
            return True
        return self.negations and lower.endswith(("n't", "n’t"))

    def lost(self, before: str, after: str) -> list[str]:
        """Words of one text that must stay and that the other does not hold as often."""
        left = [word.lower() for word in split(after)[1::2]]
        missing = []
        for word in split(before)[1::2]:
            if not self(word):
                continue
            if word.lower() in left:
                left.remove(word.lower())
            else:
                missing.append(word)
        return missing


@cache
def synonyms(file: str) -> dict[str, tuple[str, ...]]:
    """word, in lower case → what it may become. file: a line for each group of words of one meaning, separated by commas. ValueError."""
    table: dict[str, list[str]] = {}
    for number, line in enumerate(lines(file, "table"), start=1):
        group = list(dict.fromkeys(word.strip() for word in line.split(",") if word.strip()))
        if len(group) < 2:
            raise ValueError(
                f"table: {file}, entry {number}: {line[:60]!r} is not two words or more, separated by commas"
            )
        for word in group:
            others = table.setdefault(word.lower(), [])
            others += [other for other in group if other != word and other not in others]
    if not table:
        raise ValueError(f"table: {file} holds no words")
    return {word: tuple(others) for word, others in table.items()}


def lines(file: str, name: str) -> Sequence[str]:
    """Of a UTF-8 file, without empty ones and those that begin with `#`. ValueError begins with `name`."""
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{name}: {file} cannot be read ({reason})") from error
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
