"""What a bundle says of itself: the record in `bundle.json`, checked field by field. Knows no files, no tensors."""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn, Self

from refract.models.classifier import NORMALIZE, TASKS

SCHEMA_VERSION = 1

# No scheme, no slash beyond the two prefixes: timm takes "hf-hub:…" and "local-dir:…" as names, and would fetch them.
_NETWORK_NAME = re.compile(r"(torchvision/|timm/)?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")


class BundleError(ValueError):
    """A bundle that cannot be written or must not be trusted. The message names the file or field and what to do."""


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """The record of a bundle; plain numbers, strings, lists and dicts, all checked at construction.

    task: one of TASKS; labels: in the order of the logits; network: name, image_size [height, width] and args;
    preprocess: plain numbers with "mean" and "std" of RGB in 0…1; temperature: > 0; thresholds: for multilabel one
    in 0…1 a label, else empty; abstain_below: the confidence in 0…1 below which an answer should be left to a person, None where none was
    chosen, as in bundles from before there was one; text: what reads texts, see `refract.models.factory.text_record`, None where nothing
    does; created: UTC, ISO 8601. BundleError names the field, its value and what was expected.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    task: str
    labels: tuple[str, ...]
    network: dict[str, Any]
    preprocess: dict[str, Any]
    text: dict[str, Any] | None = None
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    abstain_below: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(self, name, getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Every field, tuples as lists."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record from `to_dict`'s form. BundleError for an unknown version or field, a missing one, a bad value."""
        if not isinstance(values, Mapping):
            raise BundleError(f"expected a JSON object with the bundle's fields, received {type(values).__name__}")
        # The version first: a newer bundle should be told to be newer, not to have a strange field.
        _check_version(None, "schema_version", values.get("schema_version"))
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in values and name not in _LATER]:
            raise BundleError(f"field {missing[0]!r} is missing; expected the fields {', '.join(names)}")
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                raise BundleError(
                    f"unknown field {name!r}; {f'nearest is {near[0]!r}' if near else 'known: ' + ', '.join(names)}"
                )
        tuples = {n: tuple(values[n]) for n in ("labels", "thresholds") if isinstance(values[n], list)}
        return cls(**{**values, **tuples})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The record from `to_json`'s text. BundleError also for text that is not JSON."""
        return cls.from_dict(parse_json(text))


def parse_json(text: str | bytes) -> Any:
    """JSON without NaN and Infinity. BundleError with the place of the fault."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise BundleError(f"not valid JSON: {err}") from err


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _fail(name: str, value: object, expected: str) -> NoReturn:
    shown = repr(value)
    raise BundleError(f"field {name!r} is {shown[:120] + '…' if len(shown) > 120 else shown}: expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_version(_: object, name: str, value: object) -> None:
    if type(value) is not int or value != SCHEMA_VERSION:
        _fail(
            name, value, f"{SCHEMA_VERSION}, the only one this version of Refract reads; use the version that wrote it"
        )


def _check_text(_: object, name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        _fail(name, value, "a text that is not empty")


def _check_task(_: object, name: str, value: object) -> None:
    if value not in TASKS:
        near = difflib.get_close_matches(str(value), TASKS, n=1)
        _fail(name, value, f"one of {', '.join(TASKS)}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _check_labels(info: BundleInfo, name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(label, str) and label for label in value):
        _fail(name, value, "a tuple of texts that are not empty")
    if twice := [label for i, label in enumerate(value) if label in value[:i]]:
        _fail(name, value, f"each label once; {twice[0]!r} comes twice")
    if info.task == "binary" and len(value) != 2:
        _fail(name, value, "two labels for the task binary")
    if len(value) < (1 if info.task == "multilabel" else 2):
        _fail(name, value, f"more labels for the task {info.task}")


def _check_network(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or set(value) != {"name", "image_size", "args"}:
        _fail(name, value, "a dict with exactly the keys name, image_size, args")
    if not isinstance(value["name"], str) or not _NETWORK_NAME.fullmatch(value["name"]):
        _fail(f"{name}.name", value["name"], "the name of an own network, or of one of torchvision's or timm's")
    size = value["image_size"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(s) is int and s > 0 for s in size):
        _fail(f"{name}.image_size", size, "[height, width] in pixels, two whole numbers above 0")
    _check_plain(None, f"{name}.args", value["args"])


def _check_preprocess(_: object, name: str, value: object) -> None:
    _check_plain(None, name, value)
    normalize = value.get("normalize", "channel") if isinstance(value, dict) else None
    if normalize not in NORMALIZE:
        _fail(f"{name}.normalize", normalize, f"one of {', '.join(NORMALIZE)}")
    for key in ("mean", "std"):
        numbers = value.get(key) if isinstance(value, dict) else None
        if not isinstance(numbers, list | tuple) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            _fail(f"{name}.{key}", numbers, "three finite numbers, of RGB in 0…1")
        if key == "std" and min(numbers) <= 0:
            _fail(f"{name}.{key}", numbers, "three numbers above 0")


def _check_temperature(_: object, name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        _fail(name, value, "a finite number above 0")


def _check_thresholds(info: BundleInfo, name: str, value: object) -> None:
    count = len(info.labels) if info.task == "multilabel" else 0
    if not isinstance(value, tuple) or len(value) != count or not all(_is_number(t) and 0 <= t <= 1 for t in value):
        _fail(name, value, f"{count} numbers in 0…1 for the task {info.task} (one a label for multilabel, else none)")


def _check_share(_: object, name: str, value: object) -> None:
    if value is not None and not (_is_number(value) and 0 <= value <= 1):  # type: ignore[operator]
        _fail(name, value, "a number in 0…1, or none")


def _check_metrics(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(k, str) and _is_number(v) for k, v in value.items()):
        _fail(name, value, "a dict from names to finite numbers")


def _check_plain(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _fail(name, value, "a dict with texts as keys")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise BundleError(f"field {name!r} is not plain JSON: {err}") from err


def _check_versions(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        _fail(name, value, "a dict from library names to version texts")


def _check_created(_: object, name: str, value: object) -> None:
    try:
        offset = datetime.fromisoformat(value).utcoffset() if isinstance(value, str) else None
    except ValueError:
        offset = None
    if offset is None or offset.total_seconds() != 0:
        _fail(name, value, "a time in UTC like 2026-11-05T03:00:00+00:00")


def _check_text_part(_: object, name: str, value: object) -> None:
    if value is None:
        return
    _check_plain(None, name, value)
    known = {"name", "max_length", "pooling", "args", "config", "fusion", "width"}
    if not isinstance(value, dict) or set(value) != known:
        _fail(name, value, f"a dict with exactly the keys {', '.join(sorted(known))}, or none")
    if type(value["max_length"]) is not int or not 1 <= value["max_length"] <= 4096:
        _fail(f"{name}.max_length", value["max_length"], "a whole number in 1…4096")


_LATER = ("abstain_below", "text")
"""Fields that older bundles do not have."""

_CHECKS: Mapping[str, Callable[[Any, str, Any], None]] = MappingProxyType(
    {
        "schema_version": _check_version,
        "name": _check_text,
        "task": _check_task,
        "labels": _check_labels,
        "network": _check_network,
        "preprocess": _check_preprocess,
        "text": _check_text_part,
        "temperature": _check_temperature,
        "thresholds": _check_thresholds,
        "abstain_below": _check_share,
        "metrics": _check_metrics,
        "data": _check_plain,
        "config": _check_plain,
        "versions": _check_versions,
        "created": _check_created,
    }
)
