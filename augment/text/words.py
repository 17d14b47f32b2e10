"""Splitting of texts into words and separators, so that an augmented text keeps the original spacing and punctuation."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

# Letters, digits, and marks that Python's \w does not match: combining marks and the vowel signs of Indic scripts and of Thai.
_LETTER = r"[\w\u0300-\u036f\u0900-\u0e7f]"
# Chinese and Japanese do not use spaces: each character counts as a word.
_WORD = re.compile(
    rf"([\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff]){_LETTER})+(?:['’.\-\u2011]{_LETTER}+)*)"
)

# Separators that join the adjacent words to one token, or separate two Chinese or Japanese characters.
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
    """Split into [separator, word, separator, …, separator]. Words have odd indices; joining the pieces restores the text."""
    return _WORD.split(text)


def remove(pieces: list[str], index: int) -> None:
    """Delete the word at `index` and one adjacent space, in place."""
    pieces[index] = ""
    before, after = pieces[index - 1], pieces[index + 1]
    if before[-1:].isspace():
        if after not in _JOINING or index + 2 >= len(pieces):
            pieces[index - 1] = before[:-1]
    elif after[:1].isspace() and not any(pieces[:index]):
        pieces[index + 1] = after[1:]


def match_case(word: str, model: str) -> str:
    """Return `word` with the capitalisation of `model`: all capitals, or a capital first letter."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


@cache
def protected_words(entries: tuple[str, ...]) -> "ProtectedWords":
    """Build the set of words that an op must keep. Each entry, in any case, is one of:

    - a word, a phrase (`New York`, `C++`, `AT&T`) or a sign (`€`);
    - `<numbers>`: words with a digit, including a leading + or −;
    - `<negations>`: no, not, don't and similar words in seven languages;
    - the path of a `.txt` file with one entry per line.

    Raises ValueError for a file that cannot be read.
    """
    expanded: set[str] = set()
    for entry in entries:
        expanded.update(lines(entry, "keep") if entry.endswith(".txt") else [entry])
    return ProtectedWords(frozenset(" ".join(_plain(entry).split()) for entry in expanded))


def _plain(piece: str) -> str:
    """Case-fold a piece and unify its apostrophes and hyphens."""
    return (piece if piece.isascii() else piece.translate(_ALIKE)).casefold()


def _number(word: str) -> bool:
    """Whether the word contains a digit or a numeral such as ½ or Ⅷ. Chinese numerals count as words."""
    return not word.isalpha() and any(unicodedata.category(character)[0] == "N" for character in word)


class ProtectedWords:
    """Words, phrases and signs that an op must keep. entries: normalised entries, including the lines of the files."""

    def __init__(self, entries: frozenset[str]) -> None:
        self.entries = entries
        self.numbers, self.negations = NUMBERS in entries, NEGATIONS in entries
        pieces_of = {entry: split(entry) for entry in entries - {NUMBERS, NEGATIONS, ""}}
        self.words = {entry for entry, pieces in pieces_of.items() if pieces[1:2] == [entry]}
        self.signs = [entry for entry, pieces in pieces_of.items() if len(pieces) == 1]
        self.phrases = [pieces_of[entry] for entry in sorted(pieces_of.keys() - self.words - set(self.signs))]
        self.words |= set(_NEGATIONS.split()) if self.negations else set()

    def __call__(self, word: str) -> bool:
        """Whether the word is protected in any context."""
        plain = _plain(word)
        if plain in self.words or (self.negations and plain.endswith("n't")) or (self.numbers and _number(plain)):
            return True
        return bool(self.signs) and any(sign in plain for sign in self.signs)

    def indices(self, pieces: Sequence[str]) -> set[int]:
        """Return the indices of the protected words in the pieces of `split`.

        A word is protected by itself, in a phrase, or because it touches a protected word and a change could merge the two.
        """
        protected = {i for i in range(1, len(pieces), 2) if self(pieces[i])}
        for start, phrase in self._phrases(pieces):
            protected.update(range(start, start + len(phrase) - 2, 2))
        touching = {i - 2 for i in protected if i > 1 and pieces[i - 1] in _JOINING}
        touching |= {i + 2 for i in protected if i + 2 < len(pieces) and pieces[i + 1] in _JOINING}
        return protected | touching

    def lost(self, before: str, after: str) -> list[str]:
        """Return the protected words, phrases and signs that occur less often in `after` than in `before`."""
        missing = self._counts(before) - self._counts(after)
        return list(missing.elements())

    def _counts(self, text: str) -> Counter[str]:
        pieces = split(text)
        signs = [pieces[i - 1][-1:].translate(_ALIKE) for i in range(1, len(pieces), 2)]
        counts = Counter(
            (sign if sign in "+-" and _number(word) else "") + _plain(word)
            for sign, word in zip(signs, pieces[1::2], strict=True)
            if self(word)
        )
        counts.update("".join(phrase) for _, phrase in self._phrases(pieces))
        counts.update({sign: _plain(text).count(sign) for sign in self.signs})
        return counts

    def _phrases(self, pieces: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield (index of the first word, the phrase's pieces) for each protected phrase in the text."""
        if not self.phrases:
            return
        plain = [
            _plain(piece) if i % 2 else " ".join(f"|{_plain(piece)}|".split())[1:-1] for i, piece in enumerate(pieces)
        ]
        for phrase in self.phrases:
            first, *inner, last = phrase
            for start in range(1, len(plain) - len(inner), 2):
                end = start + len(inner)
                if plain[start:end] == inner and plain[start - 1].endswith(first) and plain[end].startswith(last):
                    yield start, phrase


@cache
def synonyms(file: str) -> dict[str, tuple[str, ...]]:
    """Read a synonym table: lower-case word → its synonyms.

    file: one group of synonyms per line, separated by commas. Raises ValueError if the file cannot be read, is empty or has a line with
    fewer than two words.
    """
    table: dict[str, list[str]] = {}
    for number, line in enumerate(lines(file, "table"), start=1):
        group = list(dict.fromkeys(word.strip() for word in line.split(",") if word.strip()))
        if len(group) < 2:
            raise ValueError(
                f"table: {file}, entry {number}: {line[:60]!r} has fewer than two words separated by commas"
            )
        for word in group:
            others = table.setdefault(word.lower(), [])
            others += [other for other in group if other != word and other not in others]
    if not table:
        raise ValueError(f"table: {file} contains no words; write one group of synonyms per line")
    return {word: tuple(others) for word, others in table.items()}


def lines(file: str, name: str) -> Sequence[str]:
    """Read the lines of a UTF-8 file, without empty lines and `#` comments. name: parameter at the start of a ValueError."""
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{name}: {file} cannot be read ({reason})") from error
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
