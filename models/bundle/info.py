"""A bundle's metadata: the fields of `bundle.json`, validated at construction. Independent of files and tensors."""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, NoReturn, Self

import numpy as np

from refract.errors import InputError
from refract.models.classifier import NORMALIZE
from refract.models.hierarchy import BackOff, Hierarchy, HierarchyError
from refract.models.tasks import SINGLE_LABEL, TASKS

SCHEMA_VERSION = 1

# No scheme, and no slash beyond the two prefixes: timm accepts "hf-hub:…" and "local-dir:…" as names and would fetch them.
_NETWORK_NAME = re.compile(r"(torchvision/|timm/)?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")


class BundleError(InputError):
    """Raised for a bundle that cannot be written or verified. The message names the file or field and what to do."""


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """The metadata of a bundle: plain numbers, strings, lists and dicts, all validated at construction.

    - task: one of TASKS
    - labels: in the order of the logits
    - network: name, image_size [height, width] and args
    - preprocess: plain numbers with "mean" and "std" of RGB in 0…1
    - plugins: name and sha256 of each plugin that the network needs, empty without one
    - text: the text encoder, see `refract.models.factory.text_record`; None for a classifier of images alone
    - temperature: above 0
    - thresholds: for multilabel one number in 0…1 for each label, else empty
    - abstain_below: the confidence in 0…1 below which a person should decide; None without a limit, as in older bundles
    - hierarchy: `parents`, name → parent of each class and each inner node, None for a root, and `threshold`, the probability in 0…1 at
      which an inner node is predicted, None without one: see `refract.models.hierarchy.Hierarchy`; None without a hierarchy
    - created: UTC, ISO 8601

    BundleError names the field, its value and the accepted values.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    task: str
    labels: tuple[str, ...]
    network: dict[str, Any]
    preprocess: dict[str, Any]
    plugins: tuple[dict[str, str], ...] = ()
    text: dict[str, Any] | None = None
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    abstain_below: float | None = None
    hierarchy: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(self, name, getattr(self, name))

    @cached_property
    def tree(self) -> Hierarchy | None:
        """The hierarchy of the labels, None without one."""
        return None if self.hierarchy is None else Hierarchy(self.labels, self.hierarchy["parents"])

    def back_offs(self, probabilities: np.ndarray) -> list[BackOff | None]:
        """Return, for each row of probabilities (N, C), the ancestor that is certain enough where no class is; None for none."""
        if self.tree is None or self.hierarchy is None:
            return [None] * len(probabilities)
        return self.tree.back_offs(probabilities, self.abstain_below, self.hierarchy["threshold"])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, tuples as lists.

        Without plugins and without a hierarchy these keys are absent, so that an older Refract reads the bundle.
        """
        values = json.loads(json.dumps(asdict(self), allow_nan=False))
        return {key: value for key, value in values.items() if value or key not in _ABSENT_IF_EMPTY}

    def to_json(self) -> str:
        """Return the fields as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the metadata from the result of `to_dict`. BundleError for an unknown version, an unknown or missing field, or a bad
        value."""
        if not isinstance(values, Mapping):
            raise BundleError(f"expected a JSON object with the bundle's fields, received {type(values).__name__}")
        # Check the version first, so that the error for a newer bundle names its version and not an unknown field.
        _check_version(None, "schema_version", values.get("schema_version"))
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in values and name not in _OPTIONAL]:
            raise BundleError(f"field {missing[0]!r} is missing; expected the fields {', '.join(names)}")
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                raise BundleError(
                    f"unknown field {name!r}; {f'nearest is {near[0]!r}' if near else 'known: ' + ', '.join(names)}"
                )
        tuples = {n: tuple(values[n]) for n in ("labels", "thresholds", "plugins") if isinstance(values.get(n), list)}
        return cls(**{**values, **tuples})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Build the metadata from the result of `to_json`. BundleError as `from_dict`, and for text that is not JSON."""
        return cls.from_dict(parse_json(text))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; reject NaN and Infinity. BundleError names the position of the fault."""
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
        _fail(name, value, f"{SCHEMA_VERSION}, the only version that this Refract reads; use the Refract that wrote it")


def _check_text(_: object, name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        _fail(name, value, "a non-empty text")


def _check_task(_: object, name: str, value: object) -> None:
    if value not in TASKS:
        near = difflib.get_close_matches(str(value), TASKS, n=1)
        _fail(name, value, f"one of {', '.join(TASKS)}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _check_labels(info: BundleInfo, name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(label, str) and label for label in value):
        _fail(name, value, "a tuple of non-empty texts")
    if duplicates := [label for label, count in Counter(value).items() if count > 1]:
        _fail(name, value, f"each label once; {duplicates[0]!r} occurs twice")
    if info.task == "binary" and len(value) != 2:
        _fail(name, value, "two labels for the task binary")
    if len(value) < (1 if info.task == "multilabel" else 2):
        _fail(name, value, f"at least {1 if info.task == 'multilabel' else 2} labels for the task {info.task}")


def _check_network(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or set(value) != {"name", "image_size", "args"}:
        _fail(name, value, "a dict with exactly the keys name, image_size, args")
    if not isinstance(value["name"], str) or not _NETWORK_NAME.fullmatch(value["name"]):
        _fail(f"{name}.name", value["name"], "the name of a network of Refract, torchvision or timm")
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
            _fail(f"{name}.{key}", numbers, "three finite numbers, for RGB in 0…1")
        if key == "std" and min(numbers) <= 0:
            _fail(f"{name}.{key}", numbers, "three numbers above 0")


def _check_temperature(_: object, name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        _fail(name, value, "a finite number above 0")


def _check_thresholds(info: BundleInfo, name: str, value: object) -> None:
    count = len(info.labels) if info.task == "multilabel" else 0
    if not isinstance(value, tuple) or len(value) != count or not all(_is_number(t) and 0 <= t <= 1 for t in value):
        _fail(
            name,
            value,
            f"{count} numbers in 0…1 for the task {info.task} (one for each label for multilabel, else none)",
        )


def _check_fraction(_: object, name: str, value: object) -> None:
    if value is not None and not (_is_number(value) and 0 <= value <= 1):  # type: ignore[operator]
        _fail(name, value, "a number in 0…1, or none")


def _check_metrics(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(k, str) and _is_number(v) for k, v in value.items()):
        _fail(name, value, "a dict of names to finite numbers")


def _check_plain(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _fail(name, value, "a dict whose keys are texts")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise BundleError(f"field {name!r} is not plain JSON: {err}") from err


def _check_versions(_: object, name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        _fail(name, value, "a dict of library names to version texts")


def _check_created(_: object, name: str, value: object) -> None:
    try:
        offset = datetime.fromisoformat(value).utcoffset() if isinstance(value, str) else None
    except ValueError:
        offset = None
    if offset is None or offset.total_seconds() != 0:
        _fail(name, value, "a time in UTC like 2026-11-05T03:00:00+00:00")


def _check_text_encoder(_: object, name: str, value: object) -> None:
    if value is None:
        return
    _check_plain(None, name, value)
    known = {"name", "max_length", "pooling", "args", "config", "fusion", "width"}
    if not isinstance(value, dict) or set(value) != known:
        _fail(name, value, f"a dict with exactly the keys {', '.join(sorted(known))}, or none")
    if type(value["max_length"]) is not int or not 1 <= value["max_length"] <= 4096:
        _fail(f"{name}.max_length", value["max_length"], "a whole number in 1…4096")


def _check_plugins(_: object, name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(
        isinstance(plugin, dict)
        and set(plugin) == {"name", "sha256"}
        and all(isinstance(v, str) for v in plugin.values())
        for plugin in value
    ):
        _fail(name, value, "a tuple of {'name': text, 'sha256': text}")


def _check_hierarchy(info: BundleInfo, name: str, value: object) -> None:
    if value is None:
        return
    if info.task not in SINGLE_LABEL:
        _fail(name, value, f"none for the task {info.task}")
    if not isinstance(value, dict) or set(value) != {"parents", "threshold"}:
        _fail(name, value, "a dict with exactly the keys parents, threshold, or none")
    _check_fraction(None, f"{name}.threshold", value["threshold"])
    parents = value["parents"]
    if not isinstance(parents, dict) or not all(
        isinstance(node, str) and node and (parent is None or (isinstance(parent, str) and parent))
        for node, parent in parents.items()
    ):
        _fail(f"{name}.parents", parents, "a dict of node names to the names of their parents, null for a root")
    try:
        Hierarchy(info.labels, parents)
    except HierarchyError as err:
        raise BundleError(f"field '{name}.parents': {err}") from err


_ABSENT_IF_EMPTY = ("plugins", "hierarchy")

_OPTIONAL = ("abstain_below", "text", *_ABSENT_IF_EMPTY)
"""Fields that may be missing: older bundles do not have them, and `to_dict` omits some that are empty."""

_CHECKS: Mapping[str, Callable[[Any, str, Any], None]] = MappingProxyType(
    {
        "schema_version": _check_version,
        "name": _check_text,
        "task": _check_task,
        "labels": _check_labels,
        "network": _check_network,
        "preprocess": _check_preprocess,
        "plugins": _check_plugins,
        "text": _check_text_encoder,
        "temperature": _check_temperature,
        "thresholds": _check_thresholds,
        "abstain_below": _check_fraction,
        "hierarchy": _check_hierarchy,
        "metrics": _check_metrics,
        "data": _check_plain,
        "config": _check_plain,
        "versions": _check_versions,
        "created": _check_created,
    }
)
