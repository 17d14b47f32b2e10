"""What the names of the classes say: signs, or classes that a flip from left to right exchanges."""

import re
from collections.abc import Sequence

_NUMBERS = "zero|one|two|three|four|five|six|seven|eight|nine"

_SIDES = (
    ("left", "right"), ("l", "r"), ("links", "rechts"), ("gauche", "droite"), ("izquierda", "derecha"), ("sinistra", "destra"),
    ("clockwise", "counterclockwise"), ("clockwise", "anticlockwise"), ("east", "west"),
)  # fmt: skip
"""Words that a flip exchanges."""


def are_signs(labels: Sequence[str]) -> bool:
    """Whether all names are single letters, numbers or their words: handwriting, plates, alphabets."""
    return bool(labels) and all(
        len(label) == 1 or re.fullmatch(rf"\d+|{_NUMBERS}", label.lower()) is not None for label in labels
    )


def exchanged_by_flip(labels: Sequence[str]) -> tuple[str, str] | None:
    """Two names that differ by a word for a side alone, such as `turn left` and `turn right`; None where there are none."""
    known = {tuple(_words(label)): label for label in labels}
    for words, label in known.items():
        for one, other in _SIDES:
            partner = known.get(tuple(other if word == one else word for word in words))
            if one in words and partner is not None:
                return label, partner
    return None


def _words(label: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return [word for word in re.split(r"[\W_\d]+", spaced.lower()) if word]
