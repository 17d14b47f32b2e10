"""`Policy`: an ordered list of ops that draws plans. `load_policy` reads it from a preset, a YAML file or a list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from refract.augment.ops.base import Op, nearest
from refract.augment.ops.composition import (
    CompositionOp,
    OneOf,
    Ramp,
    SomeOf,
    Sometimes,
    changes_text,
    may_move,
    mixes_batch,
    size_after,
)
from refract.augment.ops.reader import PolicyError, read_ops
from refract.augment.plan import Plan, Step
from refract.augment.random import keyed_generator, op_word
from refract.augment.text.ops import BackTranslation

PolicySpec = str | Path | Sequence[Mapping[str, Mapping[str, Any] | None] | str] | Mapping[str, Any]


@dataclass(frozen=True)
class Policy:
    """Ops in the order of their application.

    exact: run each op separately, rounding and clipping after each, instead of fusing neighbours. Slower, and blurs more.
    """

    ops: tuple[Op, ...]
    exact: bool = False

    def __post_init__(self) -> None:
        seen: dict[str, int] = {}
        words = []
        for op in self.ops:
            name = op.name
            # The word depends on the occurrence, not on the position: adding an op does not change the draws of the others.
            words.append(op_word(f"{name}#{seen.get(name, 0)}"))
            seen[name] = seen.get(name, 0) + 1
        object.__setattr__(self, "_words", tuple(words))
        object.__setattr__(self, "_is_text", tuple(changes_text(op) for op in self.ops))
        _check_back_translation(self.ops, None)
        moving = tuple(may_move(op) for op in self.ops)
        object.__setattr__(self, "_moving", moving)
        geometric = [i for i, moves in enumerate(moving) if moves]
        object.__setattr__(self, "_resize_at", geometric[-1] + 1 if geometric else 0)

    @property
    def mixes(self) -> bool:
        """Whether the policy mixes the samples of a batch (MixUp, CutMix)."""
        return any(mixes_batch(op) for op in self.ops)

    @property
    def texts(self) -> bool:
        """Whether the policy changes texts."""
        return any(self._is_text)  # type: ignore[attr-defined]

    def draw(
        self,
        size: tuple[int, int],
        *,
        seed: int,
        epoch: int,
        index: int,
        to: tuple[int, int] | None = None,
        repeat: int = 0,
    ) -> Plan:
        """Draw the plan for the image of one sample, of `size` (height, width).

        repeat: number of the sample's draw in this epoch, from 0 (repeated augmentation).
        to: size of the result. The plan resizes to it after the last geometric op, and fuses the two.
        """
        steps: list[Step] = []
        current = size
        words: tuple[int, ...] = self._words  # type: ignore[attr-defined]
        resize_at: int = self._resize_at  # type: ignore[attr-defined]
        moving: tuple[bool, ...] = self._moving  # type: ignore[attr-defined]
        is_text: tuple[bool, ...] = self._is_text  # type: ignore[attr-defined]
        for position, (op, word) in enumerate(zip(self.ops, words, strict=True)):
            if position == resize_at:
                current = _resize(steps, current, to)
            if is_text[position]:
                continue
            rng = keyed_generator(seed, epoch if op.by_epoch else 0, index, word, repeat)
            drawn = op.steps(rng, current, epoch)
            if moving[position]:
                current = size_after(drawn, current)
            steps += drawn
        if resize_at == len(self.ops):
            _resize(steps, current, to)
        return Plan(size, tuple(steps), self.exact)

    def draw_mixing(self, size: tuple[int, int], *, seed: int, epoch: int, index: int, repeat: int = 0) -> Plan:
        """Draw only the batch ops of `draw`'s plan. size: (height, width) of the images that are mixed."""
        words: tuple[int, ...] = self._words  # type: ignore[attr-defined]
        steps: list[Step] = []
        for op, word in zip(self.ops, words, strict=True):
            if mixes_batch(op):
                steps += op.steps(keyed_generator(seed, epoch, index, word, repeat), size, epoch)
        return Plan(size, tuple(steps), self.exact)

    def draw_text(self, *, seed: int, epoch: int, index: int, repeat: int = 0) -> tuple[Step, ...]:
        """Draw the steps for the text of one sample, independently of the draws for its image."""
        words: tuple[int, ...] = self._words  # type: ignore[attr-defined]
        is_text: tuple[bool, ...] = self._is_text  # type: ignore[attr-defined]
        steps: list[Step] = []
        for op, word, for_text in zip(self.ops, words, is_text, strict=True):
            if for_text:
                rng = keyed_generator(seed, epoch if op.by_epoch else 0, index, word, repeat)
                steps += op.steps(rng, (0, 0), epoch)
        return tuple(steps)

    def to_spec(self) -> list[Any] | dict[str, Any]:
        """Return the policy as input of `load_policy`, with every parameter written out. JSON and YAML values only."""
        ops = [_spec(op) for op in self.ops]
        return {"exact": True, "ops": ops} if self.exact else ops


def _check_back_translation(ops: Sequence[Op], before: Op | None) -> Op | None:
    """Check that no BackTranslation may follow another text op: a changed text has no paraphrases, so it would have no effect.

    before: an op before `ops` that may have changed the text. Returns `before` or the first such op of `ops`. PolicyError otherwise.
    """
    for op in ops:
        if isinstance(op, BackTranslation) and before is not None:
            raise PolicyError(
                f"policy: BackTranslation follows {before.name}, but a changed text has no paraphrases; put it before the other text "
                "ops, or into a OneOf with them"
            )
        if isinstance(op, (OneOf, Ramp, Sometimes)):
            branches = [op.ops, op.otherwise] if isinstance(op, Sometimes) else [(inner,) for inner in op.ops]
            after = [_check_back_translation(branch, before) for branch in branches]
            before = next((inner for inner in after if inner is not None), None)
        elif isinstance(op, SomeOf) and not op.in_order:
            before = _check_back_translation([*op.ops, *op.ops] if len(op.ops) > 1 else op.ops, before)
        elif isinstance(op, CompositionOp):
            before = _check_back_translation(op.ops, before)
        elif op.kind == "text":
            before = before or op
    return before


def load_policy(spec: PolicySpec | Policy) -> Policy:
    """Read a policy. PolicyError says what is wrong and where.

    spec: a preset's name (`presets()` lists them), the path of a YAML file, or a list with one entry per op:
    `{"Rotate": {"degrees": 10}}`, or `"HorizontalFlip"` for the default parameters. The mapping `{"exact": True, "ops": […]}` around the
    list disables fusing.
    """
    if isinstance(spec, Policy):
        return spec
    if isinstance(spec, (str, Path)):
        return _from_name_or_file(str(spec))
    return _policy(spec, "policy")


def presets() -> list[str]:
    """Return the names of the policies that Refract ships."""
    files = resources.files("refract.augment").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _from_name_or_file(name: str) -> Policy:
    import yaml

    from refract.augment.yaml_text import read_yaml

    if name in presets():
        where, text = (
            f"preset {name}",
            resources.files("refract.augment").joinpath("presets", f"{name}.yaml").read_text("utf-8"),
        )
    else:
        path = Path(name)
        if not path.is_file():
            raise PolicyError(
                f"policy {name!r} is neither a file nor a preset ({', '.join(presets())}){nearest(name, presets())}"
            )
        where = str(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"{where}: cannot be read as UTF-8 text: {error}") from error
    try:
        entries = read_yaml(text)
    except yaml.YAMLError as error:
        raise PolicyError(f"{where}: not valid YAML: {error}") from error
    return _policy([] if entries is None else entries, where)


def _policy(entries: Any, where: str) -> Policy:
    if not isinstance(entries, Mapping) or "ops" not in entries:
        return Policy(tuple(read_ops(entries, where)))
    for key in entries:
        if key not in ("exact", "ops"):
            raise PolicyError(
                f"{where}: no key {key!r} next to ops{nearest(key, ('exact', 'ops'))} (known: exact, ops)"
            )
    exact = entries.get("exact", False)
    if not isinstance(exact, bool):
        raise PolicyError(f"{where}: exact: {exact!r} is neither true nor false")
    return Policy(tuple(read_ops(entries["ops"], where)), exact)


def _resize(steps: list[Step], current: tuple[int, int], to: tuple[int, int] | None) -> tuple[int, int]:
    if to is None or current == to:
        return current
    steps.append(Step("Resize", {"box": [0, 0, *current], "size": list(to)}))
    return to


def _spec(op: Op) -> dict[str, Any]:
    return {type(op).__name__: {item.name: _plain(getattr(op, item.name)) for item in fields(op)}}


def _plain(value: Any) -> Any:
    if isinstance(value, Op):
        return _spec(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
