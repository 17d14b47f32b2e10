"""Ops on a sample's text: words and characters deleted, swapped, inserted and replaced. They read and write `refract.augment.text.words`'
pieces.

The four of words follow Wei & Zou 2019, arXiv:1901.11196 ("EDA"), section 2, with the deviations that are said.
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
from refract.augment.text import words
from refract.augment.text.paraphrases import check_cache, paraphrases

Places = list[int]


@dataclass(frozen=True, kw_only=True)
class TextOp(Op):
    """Works on the text of a sample; drawn by a key of its own, whatever befalls the image.

    share: of the words that are changed, in [0, 1]; of a text of few words at least one is. keep: words that stay as they are, see
    `refract.augment.text.words.protected_words`; by default what holds a digit, and negations.
    """

    kind: ClassVar[str] = "text"
    share: float = 0.1
    keep: tuple[str, ...] = (words.NUMBERS, words.NEGATIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("share", number("share", self.share, 0, 1))
        entries = (self.keep,) if isinstance(self.keep, str) else self.keep
        if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in entries):
            raise ValueError(f"keep: {self.keep!r} is not a list of words")
        self._set("keep", tuple(entries))
        words.protected_words(self.keep)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "p"}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {**own, "seed": below(rng, 1 << 53)}

    @classmethod
    def on_text(cls, args: Args, text: str) -> str:
        """The changed text. args: as drawn."""
        pieces = words.split(text)
        stay = words.protected_words(tuple(args["keep"])).indices(pieces)
        places = [place for place in range(1, len(pieces), 2) if place not in stay]
        if places and args["share"] > 0:
            cls.change(args, pieces, places, keyed_generator(args["seed"], 0, 0, 0))
        return "".join(pieces)

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        """Change `pieces`, of a text with words, in place. places: of the words that may be changed, at least one."""
        raise NotImplementedError


def _some(places: Places, share: float, rng: np.random.Generator) -> Places:
    """So many of the places as `share` says, at least one, in their order."""
    count = max(1, round(share * len(places)))
    if count == 1:
        return [places[below(rng, len(places))]]
    return [places[i] for i in sorted(rng.permutation(len(places))[:count].tolist())]


@dataclass(frozen=True, kw_only=True)
class WordDelete(TextOp):
    """Words are left out. Deviation from EDA: a share of them, not each by chance; one of the text's words always stays."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        chosen = _some(places, args["share"], rng)
        for place in chosen[:-1] if len(chosen) == len(pieces) // 2 else chosen:
            words.remove(pieces, place)


@dataclass(frozen=True, kw_only=True)
class WordSwap(TextOp):
    """Two words change places, so often as `share` of the words says."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        for _ in range(max(1, round(args["share"] * len(places)))):
            one, other = places[below(rng, len(places))], places[below(rng, len(places))]
            pieces[one], pieces[other] = pieces[other], pieces[one]


@dataclass(frozen=True, kw_only=True)
class WordCrop(TextOp):
    """A stretch of neighbouring words is left out, those that stay excepted; never all."""

    share: float = 0.3

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        count = min(max(1, round(args["share"] * len(places))), len(pieces) // 2 - 1)
        first = below(rng, len(places) - count + 1)
        for place in places[first : first + count]:
            words.remove(pieces, place)


@dataclass(frozen=True, kw_only=True)
class TableOp(TextOp):
    """table: a file of synonyms, see `refract.augment.text.words.synonyms`."""

    table: str

    def __post_init__(self) -> None:
        super().__post_init__()
        words.synonyms(str(self.table))
        self._set("table", str(Path(self.table)))


@dataclass(frozen=True, kw_only=True)
class WordSubstitute(TableOp):
    """Words become synonyms of a table; the share is of those that it has."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        table = words.synonyms(args["table"])
        known = [place for place in places if pieces[place].lower() in table]
        for place in _some(known, args["share"], rng) if known else ():
            others = table[pieces[place].lower()]
            pieces[place] = words.match_case(others[below(rng, len(others))], pieces[place])


@dataclass(frozen=True, kw_only=True)
class WordInsert(TableOp):
    """Before words that may change, synonyms of others of the text are put."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        table = words.synonyms(args["table"])
        known = [place for place in places if pieces[place].lower() in table]
        groups = [table[pieces[place].lower()] for place in _some(known, args["share"], rng)] if known else []
        for others in groups:
            where = places[below(rng, len(places))]
            pieces[where] = f"{others[below(rng, len(others))]} {pieces[where]}"


@dataclass(frozen=True, kw_only=True)
class WordSplit(TextOp):
    """A space is put into words of two characters or more."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        long = [place for place in places if len(pieces[place]) > 1]
        for place in _some(long, args["share"], rng) if long else ():
            word = pieces[place]
            at = 1 + below(rng, len(word) - 1)
            pieces[place] = f"{word[:at]} {word[at:]}"


@dataclass(frozen=True, kw_only=True)
class CharOp(TextOp):
    """One character in each of the chosen words is changed."""

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        long = [place for place in places if len(pieces[place]) > 1]  # of shorter ones nothing would be left
        for place in _some(long, args["share"], rng) if long else ():
            word = pieces[place]
            pieces[place] = cls.on_word(word, below(rng, len(word)), rng)

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        """word: of two characters or more; at: the drawn place in it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CharDelete(CharOp):
    """A character is left out."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        return word[:at] + word[at + 1 :]


@dataclass(frozen=True, kw_only=True)
class CharSwap(CharOp):
    """Two neighbouring characters change places."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


@dataclass(frozen=True, kw_only=True)
class CharInsert(CharOp):
    """A letter of a … z is put in."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        return word[:at] + _letter(rng) + word[at:]


@dataclass(frozen=True, kw_only=True)
class CharSubstitute(CharOp):
    """A character becomes a letter of a … z."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        return word[:at] + words.match_case(_letter(rng), word[at]) + word[at + 1 :]


def _letter(rng: np.random.Generator) -> str:
    return string.ascii_lowercase[below(rng, 26)]


@dataclass(frozen=True, kw_only=True)
class Keyboard(CharOp):
    """A letter becomes that of a neighbouring key (QWERTY); other characters stay."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        near = _neighbours().get(word[at].lower(), "")
        return word[:at] + words.match_case(near[below(rng, len(near))], word[at]) + word[at + 1 :] if near else word


@cache
def _neighbours() -> dict[str, str]:
    """Each key and those that touch it: a row's keys stand one apart, rows half a key and one key further right."""
    rows = ((0.0, "1234567890"), (0.5, "qwertyuiop"), (0.75, "asdfghjkl"), (1.25, "zxcvbnm"))
    at = {key: (x + shift, y) for y, (shift, row) in enumerate(rows) for x, key in enumerate(row)}
    return {
        key: "".join(k for k, (u, v) in at.items() if k != key and abs(u - x) <= 1 and abs(v - y) <= 1)
        for key, (x, y) in at.items()
    }


@dataclass(frozen=True, kw_only=True)
class OCR(CharOp):
    """A character becomes one that a scanner takes it for; those that look like no other stay."""

    @classmethod
    def on_word(cls, word: str, at: int, rng: np.random.Generator) -> str:
        places = [place for place, character in enumerate(word) if character in _LOOKALIKES]
        if not places:
            return word
        at = places[at % len(places)]
        other = _LOOKALIKES[word[at]]
        return word[:at] + other[below(rng, len(other))] + word[at + 1 :]


_ALIKE = ("0OoDQ", "1lIi", "2Zz", "5Ss", "6bG", "8B", "9gq", "ce", "uv", "nh", "ft", "vy", "CG", "EF", "PR", "UV", "MN")
_LOOKALIKES = {
    one: "".join(dict.fromkeys(c for group in _ALIKE if one in group for c in group if c != one))
    for one in "".join(_ALIKE)
}


@dataclass(frozen=True, kw_only=True)
class Spelling(TextOp):
    """Words become what people write for them: nlpaug's list of English misspellings (extra `text`); the share is of those that it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _misspellings()

    @classmethod
    def change(cls, args: Args, pieces: list[str], places: Places, rng: np.random.Generator) -> None:
        table = _misspellings()
        known = [place for place in places if pieces[place].lower() in table]
        for place in _some(known, args["share"], rng) if known else ():
            wrong = table[pieces[place].lower()]
            pieces[place] = words.match_case(wrong[below(rng, len(wrong))], pieces[place])


@cache
def _misspellings() -> dict[str, list[str]]:
    """From the package's file: to import the package would import PyTorch and transformers too, which takes six seconds."""
    from importlib.util import find_spec

    found = find_spec("nlpaug")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the list of misspellings is nlpaug's, which is not installed: pip install 'refract[text]'")
    file = Path(found.submodule_search_locations[0], "res", "word", "spelling", "spelling_en.txt")
    table: dict[str, list[str]] = {}
    for line in words.lines(str(file), "nlpaug"):
        right, *wrong = line.split()
        table.setdefault(right.lower(), []).extend(word for word in wrong if any(map(str.isalpha, word)))
    return {right: wrong for right, wrong in table.items() if wrong}


@dataclass(frozen=True, kw_only=True)
class BackTranslation(TextOp):
    """The text becomes one of its paraphrases, which `refract paraphrase` made; a text without any stays as it is. `share` has no effect.

    cache: the file that it wrote; paraphrases that have lost a word of `keep` are not taken.
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
        stays = words.protected_words(tuple(args["keep"]))
        found = [new for new in paraphrases(args["cache"], text) if not stays.lost(text, new)]
        return found[below(keyed_generator(args["seed"], 0, 0, 0), len(found))] if found else text


def run(steps: Any, text: str) -> str:
    """The text after the steps, as a policy drew them for it."""
    from refract.augment.ops import OPS

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
