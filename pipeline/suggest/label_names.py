"""Classify the names of the classes: signs, or classes that a horizontal flip swaps."""

import re
from collections.abc import Sequence

_NUMBERS = "zero|one|two|three|four|five|six|seven|eight|nine"

_SIDES = (
    ("left", "right"), ("l", "r"), ("links", "rechts"), ("gauche", "droite"), ("izquierda", "derecha"), ("sinistra", "destra"),
    ("clockwise", "counterclockwise"), ("clockwise", "anticlockwise"), ("east", "west"),
)  # fmt: skip
"""Pairs of words that a horizontal flip swaps."""


def are_signs(labels: Sequence[str]) -> bool:
    """Return whether all names are single characters, numbers or number words, as for handwriting, plates and alphabets."""
    return bool(labels) and all(
        len(label) == 1 or re.fullmatch(rf"\d+|{_NUMBERS}", label.lower()) is not None for label in labels
    )


def exchanged_by_flip(labels: Sequence[str]) -> tuple[str, str] | None:
    """Return two names that differ only by a word of `_SIDES`, such as `turn left` and `turn right`, or None."""
    label_of = {tuple(_words(label)): label for label in labels}
    for words, label in label_of.items():
        for one, other in _SIDES:
            partner = label_of.get(tuple(other if word == one else word for word in words))
            if one in words and partner is not None:
                return label, partner
    return None


def _words(label: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return [word for word in re.split(r"[\W_\d]+", spaced.lower()) if word]
