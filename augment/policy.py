"""A policy: the ops in order, from a preset's name, a YAML file or a list. It draws plans."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from augment.ops import OPS, Op
from augment.ops.geometric import GEOMETRIC
from augment.plan import Plan, Step
from augment.random import keyed_generator, op_word

PolicySpec = str | Path | Sequence[Mapping[str, Mapping[str, Any] | None] | str]


class PolicyError(ValueError):
    """A policy cannot be read; the message names the place, the op, the parameter and what is accepted."""


@dataclass(frozen=True)
class Policy:
    """Ops in the order in which they are applied."""

    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        seen: dict[str, int] = {}
        words = []
        for op in self.ops:
            name = type(op).__name__
            # Named by occurrence, not by place: an op that is added leaves the draws of the others as they were.
            words.append(op_word(f"{name}#{seen.get(name, 0)}"))
            seen[name] = seen.get(name, 0) + 1
        object.__setattr__(self, "_words", tuple(words))
        geometric = [i for i, op in enumerate(self.ops) if op.kind == "geometric"]
        object.__setattr__(self, "_resize_at", geometric[-1] + 1 if geometric else 0)

    def draw(
        self, size: tuple[int, int], *, seed: int, epoch: int, index: int, to: tuple[int, int] | None = None
    ) -> Plan:
        """The plan for one sample of `size` (height, width).

        to: the size that the result shall have; a Resize to it follows the last geometric op, with which it fuses.
        """
        steps: list[Step] = []
        current = size
        words: tuple[int, ...] = self._words  # type: ignore[attr-defined]
        resize_at: int = self._resize_at  # type: ignore[attr-defined]
        for place, (op, word) in enumerate(zip(self.ops, words, strict=True)):
            if place == resize_at:
                current = _resize(steps, current, to)
            rng = keyed_generator(seed, epoch, index, word)
            # `p` takes the stream's first number even where it is 1, so that changing it leaves the other draws as they were.
            if rng.random() >= op.p:
                continue
            args = op.draw(rng, current)
            if args is None:
                continue
            name = type(op).__name__
            steps.append(Step(name, args))
            if name in GEOMETRIC:
                current = GEOMETRIC[name].geometry(args, current)[1]
        if resize_at == len(self.ops):
            _resize(steps, current, to)
        return Plan(size, tuple(steps))

    def to_list(self) -> list[dict[str, dict[str, Any]]]:
        """What `load_policy` reads, with every parameter written out; JSON and YAML values only."""
        return [{type(op).__name__: _plain(asdict(op))} for op in self.ops]


def load_policy(spec: PolicySpec | Policy) -> Policy:
    """Read a policy.

    spec: a preset's name (`presets()` lists them), the path of a YAML file, or a list with an entry for each op:
    `{"Rotate": {"degrees": 10}}`, or just `"HorizontalFlip"` where the defaults do. PolicyError says what is wrong and where.
    """
    if isinstance(spec, Policy):
        return spec
    if isinstance(spec, (str, Path)):
        return _from_name_or_file(str(spec))
    return Policy(tuple(_ops(spec, "policy")))


def presets() -> list[str]:
    """The names of the policies that come with Refract."""
    files = resources.files("augment").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _from_name_or_file(name: str) -> Policy:
    import yaml

    if name in presets():
        where, text = (
            f"preset {name}",
            resources.files("augment").joinpath("presets", f"{name}.yaml").read_text("utf-8"),
        )
    else:
        path = Path(name)
        if not path.is_file():
            raise PolicyError(
                f"policy {name!r} is neither a file nor a preset ({', '.join(presets())}){_nearest(name, presets())}"
            )
        where = str(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"{where}: cannot be read as UTF-8 text: {error}") from error
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PolicyError(f"{where}: not valid YAML: {error}") from error
    return Policy(tuple(_ops([] if entries is None else entries, where)))


def _ops(entries: Any, where: str) -> Iterator[Op]:
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
        raise PolicyError(
            f"{where}: a policy is a list of ops such as [{{HorizontalFlip: {{p: 0.5}}}}], not {entries!r}"
        )
    for number, entry in enumerate(entries, start=1):
        yield _op(entry, f"{where}, op {number}")


def _op(entry: Any, where: str) -> Op:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise PolicyError(
            f"{where}: expected one op's name with its parameters, such as {{Rotate: {{degrees: 10}}}}; got {entry!r}"
        )
    ((name, parameters),) = entry.items()
    if name not in OPS:
        raise PolicyError(f"{where}: no op is called {name!r}{_nearest(name, OPS)}. Known: {', '.join(OPS)}")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise PolicyError(f"{where}, {name}: parameters are a mapping such as {{p: 0.5}}, not {parameters!r}")
    known = [item.name for item in fields(OPS[name])]
    for parameter in parameters:
        if parameter not in known:
            raise PolicyError(
                f"{where}, {name}: no parameter {parameter!r}{_nearest(parameter, known)}. Known: {', '.join(known)}"
            )
    try:
        return OPS[name](**parameters)
    except (TypeError, ValueError) as error:
        message = str(error).replace(f"{name}.__init__() ", "")
        raise PolicyError(f"{where}, {name}: {message}") from error


def _resize(steps: list[Step], current: tuple[int, int], to: tuple[int, int] | None) -> tuple[int, int]:
    if to is None or current == to:
        return current
    steps.append(Step("Resize", {"box": [0, 0, *current], "size": list(to)}))
    return to


def _nearest(name: Any, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
