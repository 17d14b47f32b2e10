"""Parsers of the values of options. A parser takes a text, and raises ValueError, which names what is accepted, for an invalid one."""

import math
from collections.abc import Callable

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in [low, high]."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a whole number in {low} … {high}")
        return int(text)

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Return a parser of numbers in [low, high], or in (low, high] if `above`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise ValueError(f"{text!r} is not a number {'above' if above else 'from'} {low:g} to {high:g}")
        return value

    return parse


def switch(text: str) -> bool:
    """Parse true or false."""
    if text.lower() not in TRUE + FALSE:
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE


def web_origin(text: str) -> str:
    """Parse an origin of web pages, or `*`."""
    from refract.serve.http.cors import is_origin

    if not is_origin(text):
        raise ValueError(
            f"{text!r} is not an origin such as https://app.example, in lower case and without a path; * allows all"
        )
    return text


def path_prefix(text: str) -> str:
    """Parse the path of a reverse proxy; empty for none."""
    from refract.serve.http.base_path import prefix_problem

    if text and (problem := prefix_problem(text)):
        raise ValueError(problem)
    return text
