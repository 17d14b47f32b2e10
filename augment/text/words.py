"""A text as its words and what stands between them, so that a changed text keeps the spacing and the marks of the one it came from."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

# Letters, digits and the marks that Python's \w leaves out: combining ones, and the vowel signs of Indic scripts and of Thai.
_LETTER = r"[\w\u0300-\u036f\u0900-\u0e7f]"
# Chinese and Japanese write no spaces: each of their characters is a word.
_WORD = re.compile(
    rf"([\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff]){_LETTER})+(?:['’.\-\u2011]{_LETTER}+)*)"
)

# Between two words these make them one, or two of Chinese and Japanese.
_JOINING = ("", "'", "’", ".", "-", "\u2011")
_ALIKE = str.maketrans("’ʼ−‑", "''--")

NUMBERS, NEGATIONS = "<numbers>", "<negations>"

_NEGATIONS = """
no not never none nobody no-one nothing neither nor nowhere cannot without
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
        if after not in _JOINING or place + 2 >= len(pieces):
            pieces[place - 1] = before[:-1]
    elif after[:1].isspace() and not any(pieces[:place]):
        pieces[place + 1] = after[1:]


def match_case(word: str, model: str) -> str:
    """`word`, capital where `model` is: its first letter, or all of it."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


@cache
def protected_words(entries: tuple[str, ...]) -> "ProtectedWords":
    """Which words must stay. entries: words, phrases (`New York`, `C++`, `AT&T`) and signs (`€`) in any case, `<numbers>` for what holds a
    digit and its sign, `<negations>` for no, not, don't and their like in seven languages, or the name of a text file with an entry a
    line. ValueError for a file that cannot be read."""
    found: set[str] = set()
    for entry in entries:
        found.update(lines(entry, "keep") if entry.endswith(".txt") else [entry])
    return ProtectedWords(frozenset(" ".join(_plain(entry).split()) for entry in found))


def _plain(piece: str) -> str:
    return (piece if piece.isascii() else piece.translate(_ALIKE)).casefold()


def _number(word: str) -> bool:
    """Whether it holds a digit, or a sign such as ½ or Ⅷ; Chinese numerals are words."""
    return not word.isalpha() and any(unicodedata.category(character)[0] == "N" for character in word)


class ProtectedWords:
    """A test of words. entries: what it was made of, the files' lines among it."""

    def __init__(self, entries: frozenset[str]) -> None:
        self.entries = entries
        self.numbers, self.negations = NUMBERS in entries, NEGATIONS in entries
        own = {entry: split(entry) for entry in entries - {NUMBERS, NEGATIONS, ""}}
        self.words = {entry for entry, pieces in own.items() if pieces[1:2] == [entry]}
        self.signs = [entry for entry, pieces in own.items() if len(pieces) == 1]
        self.phrases = [own[entry] for entry in sorted(own.keys() - self.words - set(self.signs))]
        self.words |= set(_NEGATIONS.split()) if self.negations else set()

    def __call__(self, word: str) -> bool:
        """Whether the word stays wherever it stands."""
        plain = _plain(word)
        if plain in self.words or (self.negations and plain.endswith("n't")) or (self.numbers and _number(plain)):
            return True
        return bool(self.signs) and any(sign in plain for sign in self.signs)

    def indices(self, pieces: Sequence[str]) -> set[int]:
        """Those of `split`'s words that stay: by themselves, in a phrase, or as what touches such a one and might become a part of it."""
        found = {place for place in range(1, len(pieces), 2) if self(pieces[place])}
        for start, phrase in self._phrases(pieces):
            found.update(range(start, start + len(phrase) - 2, 2))
        touching = {place - 2 for place in found if place > 1 and pieces[place - 1] in _JOINING}
        touching |= {place + 2 for place in found if place + 2 < len(pieces) and pieces[place + 1] in _JOINING}
        return found | touching

    def lost(self, before: str, after: str) -> list[str]:
        """Words, phrases and signs of one text that must stay and that the other does not hold as often."""
        missing = self._held(before) - self._held(after)
        return list(missing.elements())

    def _held(self, text: str) -> Counter[str]:
        pieces = split(text)
        signs = [pieces[place - 1][-1:].translate(_ALIKE) for place in range(1, len(pieces), 2)]
        found = Counter(
            (sign if sign in "+-" and _number(word) else "") + _plain(word)
            for sign, word in zip(signs, pieces[1::2], strict=True)
            if self(word)
        )
        found.update("".join(phrase) for _, phrase in self._phrases(pieces))
        found.update({sign: _plain(text).count(sign) for sign in self.signs})
        return found

    def _phrases(self, pieces: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Where a phrase begins, and which it is."""
        if not self.phrases:
            return
        plain = [
            _plain(piece) if place % 2 else " ".join(f"|{_plain(piece)}|".split())[1:-1]
            for place, piece in enumerate(pieces)
        ]
        for phrase in self.phrases:
            first, *inner, last = phrase
            for start in range(1, len(plain) - len(inner), 2):
                end = start + len(inner)
                if plain[start:end] == inner and plain[start - 1].endswith(first) and plain[end].startswith(last):
                    yield start, phrase


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
