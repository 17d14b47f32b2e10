"""Text ops: they delete, swap, insert and replace words and characters, in the pieces of `refract.augment.text.words.split`.

WordDelete, WordSwap, WordSubstitute and WordInsert follow Wei & Zou 2019, arXiv:1901.11196 ("EDA"), section 2. Each docstring states
the deviations.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from refract.augment.ops.base import Args, Op, Size, below, number
from refract.augment.random import keyed_generator
from refract.augment.registry import OPS
from refract.augment.text import words
from refract.augment.text.paraphrases import check_cache, paraphrases

Indices = list[int]
"""Indices of words in a list of pieces."""


@dataclass(frozen=True, kw_only=True)
class TextOp(Op):
    """Change the text of a sample. Its random key is independent of the image ops.

    fraction: the fraction of the words to change, in [0, 1]; above 0, at least one word changes. keep: protected words, see
    `refract.augment.text.words.protected_words`; the default protects words with a digit and negations.
    """

    kind: ClassVar[str] = "text"
    former: ClassVar[Mapping[str, str]] = MappingProxyType({"share": "fraction"})
    fraction: float = 0.1
    keep: tuple[str, ...] = (words.NUMBERS, words.NEGATIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("fraction", number("fraction", self.fraction, 0, 1))
        entries = (self.keep,) if isinstance(self.keep, str) else self.keep
        if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in entries):
            raise ValueError(f"keep: {self.keep!r} is not a list of words, phrases or .txt paths")
        self._set("keep", tuple(entries))
        words.protected_words(self.keep)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        parameters = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "p"}
        parameters = {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
        return {**parameters, "seed": below(rng, 1 << 53)}

    @classmethod
    def on_text(cls, args: Args, text: str) -> str:
        """Return the augmented text. args: the arguments of `draw`."""
        pieces = words.split(text)
        protected = words.protected_words(tuple(args["keep"])).indices(pieces)
        indices = [i for i in range(1, len(pieces), 2) if i not in protected]
        if indices and args["fraction"] > 0:
            cls.change(args, pieces, indices, keyed_generator(args["seed"], 0, 0, 0))
        return "".join(pieces)

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        """Change `pieces` in place. indices: the words that are not protected, at least one."""
        raise NotImplementedError


def _subset(indices: Indices, fraction: float, rng: np.random.Generator) -> Indices:
    """Draw this fraction of the indices, at least one, in their order."""
    count = max(1, round(fraction * len(indices)))
    if count == 1:
        return [indices[below(rng, len(indices))]]
    return [indices[i] for i in sorted(rng.permutation(len(indices))[:count].tolist())]


@dataclass(frozen=True, kw_only=True)
class WordDelete(TextOp):
    """Delete words. Deviations from EDA: a fixed fraction instead of a probability per word; at least one word of the text remains."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        chosen = _subset(indices, args["fraction"], rng)
        for index in chosen[:-1] if len(chosen) == len(pieces) // 2 else chosen:
            words.remove(pieces, index)


@dataclass(frozen=True, kw_only=True)
class WordSwap(TextOp):
    """Swap pairs of words. The number of swaps is `fraction` × the number of words, at least one."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        for _ in range(max(1, round(args["fraction"] * len(indices)))):
            first, second = indices[below(rng, len(indices))], indices[below(rng, len(indices))]
            pieces[first], pieces[second] = pieces[second], pieces[first]


@dataclass(frozen=True, kw_only=True)
class WordCrop(TextOp):
    """Delete consecutive words, except protected words. At least one word of the text remains."""

    fraction: float = 0.3

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        count = min(max(1, round(args["fraction"] * len(indices))), len(pieces) // 2 - 1)
        first = below(rng, len(indices) - count + 1)
        for index in indices[first : first + count]:
            words.remove(pieces, index)


@dataclass(frozen=True, kw_only=True)
class TableOp(TextOp):
    """table: path of a synonym table, see `refract.augment.text.words.synonyms`."""

    table: str

    def __post_init__(self) -> None:
        super().__post_init__()
        words.synonyms(str(self.table))
        self._set("table", str(Path(self.table)))


@dataclass(frozen=True, kw_only=True)
class WordSubstitute(TableOp):
    """Replace words by synonyms of a table. `fraction` applies to the words of the text that have synonyms."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        table = words.synonyms(args["table"])
        candidates = [i for i in indices if pieces[i].lower() in table]
        for index in _subset(candidates, args["fraction"], rng) if candidates else ():
            synonyms = table[pieces[index].lower()]
            pieces[index] = words.match_case(synonyms[below(rng, len(synonyms))], pieces[index])


@dataclass(frozen=True, kw_only=True)
class WordInsert(TableOp):
    """Insert synonyms of words of the text before random unprotected words."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        table = words.synonyms(args["table"])
        candidates = [i for i in indices if pieces[i].lower() in table]
        sources = _subset(candidates, args["fraction"], rng) if candidates else []
        groups = [table[pieces[i].lower()] for i in sources]
        for synonyms in groups:
            index = indices[below(rng, len(indices))]
            pieces[index] = f"{synonyms[below(rng, len(synonyms))]} {pieces[index]}"


@dataclass(frozen=True, kw_only=True)
class WordSplit(TextOp):
    """Insert a space into words of at least two characters."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        long = [i for i in indices if len(pieces[i]) > 1]
        for index in _subset(long, args["fraction"], rng) if long else ():
            word = pieces[index]
            at = 1 + below(rng, len(word) - 1)
            pieces[index] = f"{word[:at]} {word[at:]}"


@dataclass(frozen=True, kw_only=True)
class CharOp(TextOp):
    """Change one character in each chosen word of at least two characters."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        long = [i for i in indices if len(pieces[i]) > 1]  # a deletion would remove a word of one character
        for index in _subset(long, args["fraction"], rng) if long else ():
            word = pieces[index]
            pieces[index] = cls.on_word(word, below(rng, len(word)), rng)

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        """Return the changed word. word: at least two characters; at: a random index in it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CharDelete(CharOp):
    """Delete one character in each chosen word."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        return word[:at] + word[at + 1 :]


@dataclass(frozen=True, kw_only=True)
class CharSwap(CharOp):
    """Exchange two adjacent characters in each chosen word."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


@dataclass(frozen=True, kw_only=True)
class CharInsert(CharOp):
    """Insert a letter a … z in each chosen word."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        return word[:at] + _letter(rng) + word[at:]


@dataclass(frozen=True, kw_only=True)
class CharSubstitute(CharOp):
    """Replace one character by a letter a … z in each chosen word."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        return word[:at] + words.match_case(_letter(rng), word[at]) + word[at + 1 :]


def _letter(rng: np.random.Generator) -> str:
    return string.ascii_lowercase[below(rng, 26)]


@dataclass(frozen=True, kw_only=True)
class Keyboard(CharOp):
    """Replace a letter or digit by the character of an adjacent QWERTY key. Other characters are unchanged."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        near = _neighbours().get(word[at].lower(), "")
        return word[:at] + words.match_case(near[below(rng, len(near))], word[at]) + word[at + 1 :] if near else word


@cache
def _neighbours() -> dict[str, str]:
    """Map each key to its adjacent keys. Keys have distance 1 in a row; each row has a horizontal offset, in keys."""
    rows = ((0.0, "1234567890"), (0.5, "qwertyuiop"), (0.75, "asdfghjkl"), (1.25, "zxcvbnm"))
    at = {key: (x + shift, y) for y, (shift, row) in enumerate(rows) for x, key in enumerate(row)}
    return {
        key: "".join(k for k, (u, v) in at.items() if k != key and abs(u - x) <= 1 and abs(v - y) <= 1)
        for key, (x, y) in at.items()
    }


@dataclass(frozen=True, kw_only=True)
class OCR(CharOp):
    """Replace a character by one that optical character recognition confuses with it. Other characters are unchanged."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        candidates = [i for i, character in enumerate(word) if character in _LOOKALIKES]
        if not candidates:
            return word
        at = candidates[at % len(candidates)]
        lookalikes = _LOOKALIKES[word[at]]
        return word[:at] + lookalikes[below(rng, len(lookalikes))] + word[at + 1 :]


_ALIKE = ("0OoDQ", "1lIi", "2Zz", "5Ss", "6bG", "8B", "9gq", "ce", "uv", "nh", "ft", "vy", "CG", "EF", "PR", "UV", "MN")
_LOOKALIKES = {
    one: "".join(dict.fromkeys(c for group in _ALIKE if one in group for c in group if c != one))
    for one in "".join(_ALIKE)
}


@dataclass(frozen=True, kw_only=True)
class Spelling(TextOp):
    """Replace words by misspellings from nlpaug's English list (extra `text`). `fraction` applies to the words on the list."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _misspellings()

    @classmethod
    def change(cls, args: Args, pieces: list[str], indices: Indices, rng: np.random.Generator) -> None:
        table = _misspellings()
        candidates = [i for i in indices if pieces[i].lower() in table]
        for index in _subset(candidates, args["fraction"], rng) if candidates else ():
            misspellings = table[pieces[index].lower()]
            pieces[index] = words.match_case(misspellings[below(rng, len(misspellings))], pieces[index])


@cache
def _misspellings() -> dict[str, list[str]]:
    """Read the list from nlpaug's data file. Importing nlpaug would import PyTorch and transformers, which takes six seconds."""
    from importlib.util import find_spec

    package = find_spec("nlpaug")
    if package is None or not package.submodule_search_locations:
        raise ValueError("Spelling needs nlpaug, which is not installed; run: pip install 'refract[text]'")
    file = Path(package.submodule_search_locations[0], "res", "word", "spelling", "spelling_en.txt")
    table: dict[str, list[str]] = {}
    for line in words.lines(str(file), "nlpaug"):
        right, *wrong = line.split()
        table.setdefault(right.lower(), []).extend(word for word in wrong if any(map(str.isalpha, word)))
    return {right: wrong for right, wrong in table.items() if wrong}


@dataclass(frozen=True, kw_only=True)
class BackTranslation(TextOp):
    """Replace the text by one of its cached paraphrases, if it has any. `fraction` has no effect.

    cache: the file that `refract paraphrase` wrote. The op skips paraphrases that lost a word of `keep`.
    Source of the idea: Sennrich et al. 2016, arXiv:1511.06709; Xie et al. 2020, arXiv:1904.12848.
    """

    p: float = 0.5
    cache: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cache(str(self.cache))
        self._set("cache", str(self.cache))

    @classmethod
    def on_text(cls, args: Args, text: str) -> str:
        protected = words.protected_words(tuple(args["keep"]))
        candidates = [new for new in paraphrases(args["cache"], text) if not protected.lost(text, new)]
        return candidates[below(keyed_generator(args["seed"], 0, 0, 0), len(candidates))] if candidates else text


def run(steps: Any, text: str) -> str:
    """Apply the drawn text steps of a policy in order."""
    for step in steps:
        op = OPS[step.op]
        assert issubclass(op, TextOp)
        text = op.on_text(dict(step.args), text)
    return text


TEXT: Mapping[str, type[TextOp]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            WordDelete, WordSwap, WordCrop, WordSubstitute, WordInsert, WordSplit,
            CharInsert, CharSubstitute, CharSwap, CharDelete, Keyboard, OCR, Spelling, BackTranslation,
        )
    }
)  # fmt: skip
