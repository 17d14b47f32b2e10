"""Tokenizers, the same in training and in serving. Independent of networks.

A text becomes a row of int32 token numbers that start at 1; 0 pads rows, and a missing text is a row of zeros.
"""

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

LONGEST = 32
"""Characters of a text that are read for each of its `max_length` tokens. Texts of words do not reach this limit."""

LONGEST_WORD, NGRAM_SIZES = 24, (3, 4, 5)
"""Characters of a word that are read, and the sizes of its character n-grams."""


class Tokens(Protocol):
    """A tokenizer: text → token numbers."""

    @property
    def max_length(self) -> int:
        """The largest number of tokens (words of `HashedNgrams`) that are read; longer texts are truncated."""

    @property
    def max_numbers(self) -> int:
        """The largest number of token numbers of a text."""

    @property
    def files(self) -> dict[str, bytes]:
        """The tokenizer's files in a bundle, name → bytes."""

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        """Return (int32 token numbers, whether the text was truncated)."""


BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() or unicodedata.category(c) == "Cc")
"""Whitespace, and control characters, which count as whitespace."""


def trimmed(text: str) -> str:
    """Strip whitespace and control characters. An empty result counts as a missing text."""
    return text.strip(BLANKS)


def cleaned(text: str, max_length: int) -> tuple[str, bool]:
    """Trim, truncate and compose (NFC) a text. Control characters become blanks, unpaired surrogates `?`.

    Returns (the text, whether it was truncated).
    """
    limit, text = LONGEST * max_length, trimmed(text)
    cut, text = len(text) > limit, text[:limit]
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text) if not text.isprintable() else text
    return text.strip(), cut


@dataclass(frozen=True)
class HashedNgrams:
    """Hash words, pairs of words, and n-grams of 3 to 5 characters of each word. It needs no vocabulary and reads any language and typo.

    max_length: words; buckets: different numbers of the hash.
    Source: Weinberger et al. 2009, arXiv:0902.2206; Bojanowski et al. 2017, arXiv:1607.04606, section 3.2.
    """

    max_length: int = 64
    buckets: int = 1 << 15
    files: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def max_numbers(self) -> int:
        """See `Tokens`. Each word counts itself, its pair with the next word, and its character n-grams."""
        return self.max_length * (2 + sum(LONGEST_WORD + 2 - n + 1 for n in NGRAM_SIZES))

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        text, cut = cleaned(text, self.max_length)
        words = _words(text)
        cut = cut or len(words) > self.max_length
        words = words[: self.max_length]
        grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
        for word in words:
            edged = f"<{word[:LONGEST_WORD]}>"
            grams += [edged[i : i + n] for n in NGRAM_SIZES for i in range(len(edged) - n + 1)]
        numbers = [zlib.crc32(gram.encode()) % self.buckets + 1 for gram in grams]
        return np.array(numbers, dtype=np.int32), cut


def _words(text: str) -> list[str]:
    """Split into case-folded runs of letters and digits; every other visible character is a separate word."""
    spaced = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else f" {c} " for c in text.casefold())
    return spaced.split()


class TokenizerTokens:
    """A tokenizer of the library `tokenizers`, from the content of its file `tokenizer.json`."""

    FILE = "tokenizer.json"

    def __init__(self, file: bytes, max_length: int = 128) -> None:
        """Load the tokenizer. ValueError for an invalid file, or a max_length that special tokens fill."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"texts need the extra encoders: pip install 'refract[encoders]' ({error})") from error
        try:
            self._tokenizer: Any = Tokenizer.from_str(file.decode("utf-8"))
        except Exception as error:  # the Rust library raises a plain Exception
            raise ValueError(f"{self.FILE}: not a tokenizer file ({str(error)[:200]}); save it again") from error
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise ValueError(
                f"text.max_length: {max_length}: expected more than {special}, the tokenizer's special tokens"
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._max_length, self._files = max_length, {self.FILE: file}

    def __eq__(self, other: object) -> bool:
        """Return whether both produce the same numbers for every text."""
        if not isinstance(other, TokenizerTokens):
            return False
        return (self._max_length, self._files) == (other._max_length, other._files)

    __hash__ = None  # type: ignore[assignment]

    @property
    def max_length(self) -> int:
        """See `Tokens`."""
        return self._max_length

    @property
    def max_numbers(self) -> int:
        """See `Tokens`."""
        return self._max_length

    @property
    def files(self) -> dict[str, bytes]:
        """See `Tokens`."""
        return self._files

    @property
    def vocabulary(self) -> int:
        """The highest token number plus one, in the tokenizer's numbering from 0."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        text, cut = cleaned(text, self._max_length)
        if not text:
            return np.zeros(0, dtype=np.int32), False
        encoding = self._tokenizer.encode(text)
        return np.array(encoding.ids, dtype=np.int32) + 1, cut or bool(encoding.overflowing)


def pad_rows(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Stack the token numbers of several texts in one int32 array (N, L), padded with zeros to the longest text; L is at least 1."""
    padded = np.zeros((len(texts), max(1, *map(len, texts)) if texts else 1), dtype=np.int32)
    for row, numbers in zip(padded, texts, strict=True):
        row[: len(numbers)] = numbers
    return padded
