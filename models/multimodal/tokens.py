"""How a text becomes numbers, in training and in serving alike. Knows nothing of networks.

A text is an int32 row of token numbers from 1 on; 0 fills rows up, and a text that is missing is a row of zeros.
"""

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

LONGEST = 32
"""Characters that are looked at for each token that is kept: what follows could not be reached by texts of words."""


LONGEST_WORD, STRETCHES = 24, (3, 4, 5)
"""Characters of a word that are looked at, and of the stretches that are made of it."""


class Tokens(Protocol):
    """A text's numbers."""

    @property
    def max_length(self) -> int:
        """Tokens of a text that are read; the rest is left out."""

    @property
    def most(self) -> int:
        """Numbers that a text comes to at most."""

    @property
    def files(self) -> dict[str, bytes]:
        """What a bundle carries for it, name → bytes."""

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        """(int32 numbers, whether the text was cut)."""


BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() or unicodedata.category(c) == "Cc")
"""Blanks, and control characters, which are read as such."""


def trimmed(text: str) -> str:
    """Without the blanks at its ends: nothing is left where nothing is said, and the text is then a missing one."""
    return text.strip(BLANKS)


def cleaned(text: str, max_length: int) -> tuple[str, bool]:
    """(the text trimmed and composed, with blanks for control characters and `?` for halves of surrogate pairs, whether it was cut)."""
    limit, own = LONGEST * max_length, trimmed(text)
    cut, own = len(own) > limit, own[:limit]
    own = unicodedata.normalize("NFC", own.encode("utf-8", "replace").decode("utf-8"))
    own = "".join(" " if unicodedata.category(c) == "Cc" else c for c in own) if not own.isprintable() else own
    return own.strip(), cut


@dataclass(frozen=True)
class HashedNgrams:
    """Words, pairs of words, and stretches of 3 to 5 characters of each word, by their hashes: it knows every language and every slip,
    and needs no vocabulary (Weinberger et al. 2009, arXiv:0902.2206; Bojanowski et al. 2017, arXiv:1607.04606, section 3.2).

    max_length: words; buckets: numbers that the hashes fall on.
    """

    max_length: int = 64
    buckets: int = 1 << 15
    files: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def most(self) -> int:
        """As of `Tokens`: a word, its pair with the next, and its stretches."""
        return self.max_length * (2 + sum(LONGEST_WORD + 2 - n + 1 for n in STRETCHES))

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        own, cut = cleaned(text, self.max_length)
        words = _words(own)
        cut = cut or len(words) > self.max_length
        words = words[: self.max_length]
        grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
        for word in words:
            edged = f"<{word[:LONGEST_WORD]}>"
            grams += [edged[i : i + n] for n in STRETCHES for i in range(len(edged) - n + 1)]
        numbers = [zlib.crc32(gram.encode()) % self.buckets + 1 for gram in grams]
        return np.array(numbers, dtype=np.int32), cut


def _words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits; other visible marks stand alone."""
    spaced = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else f" {c} " for c in text.casefold())
    return spaced.split()


class TokenizerTokens:
    """A tokenizer of the library tokenizers, by the text of its file `tokenizer.json`."""

    FILE = "tokenizer.json"

    def __init__(self, file: bytes, max_length: int = 128) -> None:
        """ValueError for a file that is none, or a max_length that its own marks fill."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"texts need the extra encoders: pip install 'refract[encoders]' ({error})") from error
        try:
            self._tokenizer: Any = Tokenizer.from_str(file.decode("utf-8"))
        except Exception as error:  # of its own kind, from Rust
            raise ValueError(f"{self.FILE}: is no file of a tokenizer ({str(error)[:200]})") from error
        own = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= own:
            raise ValueError(
                f"text.max_length: {max_length} leaves no room for a text: {own} tokens only mark its ends"
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._max_length, self._files = max_length, {self.FILE: file}

    def __eq__(self, other: object) -> bool:
        """Whether it makes the same numbers of any text."""
        own = (self._max_length, self._files)
        return isinstance(other, TokenizerTokens) and own == (other._max_length, other._files)

    __hash__ = None  # type: ignore[assignment]

    @property
    def max_length(self) -> int:
        """As of `Tokens`."""
        return self._max_length

    @property
    def most(self) -> int:
        """As of `Tokens`."""
        return self._max_length

    @property
    def files(self) -> dict[str, bytes]:
        """As of `Tokens`."""
        return self._files

    @property
    def vocabulary(self) -> int:
        """One more than the highest number of a token, as the tokenizer counts them."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        own, cut = cleaned(text, self._max_length)
        if not own:
            return np.zeros(0, dtype=np.int32), False
        found = self._tokenizer.encode(own)
        return np.array(found.ids, dtype=np.int32) + 1, cut or bool(found.overflowing)


def rows(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of several texts as one int32 array N×L, filled up with zeros to the longest; L is at least 1."""
    found = np.zeros((len(texts), max(1, *map(len, texts)) if texts else 1), dtype=np.int32)
    for row, numbers in zip(found, texts, strict=True):
        row[: len(numbers)] = numbers
    return found
