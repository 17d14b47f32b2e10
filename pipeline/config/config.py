"""The one configuration: typed, read from YAML, overridden on the command line, saved with every run and bundle."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.models.credentials import masked_values
from refract.pipeline.config.renamed import with_new_keys, with_new_options
from refract.pipeline.config.sections import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrackingConfig,
    TrainerConfig,
)
from refract.pipeline.retraining.settings import GateConfig, RetrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and what is accepted."""


@dataclass
class Config:
    """All of it; `to_dict` is what runs and bundles store."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)

    def to_dict(self, *, credentials: bool = False) -> dict[str, Any]:
        """Plain JSON and YAML values, masked as `refract.models.credentials` says. credentials: leave them in, for a config that nobody
        keeps."""
        values: dict[str, Any] = _plain(asdict(self))
        return values if credentials else masked_values(values)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config (None: all defaults) and apply overrides such as `--optim.lr 3e-3` or `--optim.lr=3e-3`.

    ConfigError names an unknown key and the nearest valid one, or an ill-typed value and its key.
    """
    values = {} if path is None else _read_yaml(Path(path))
    return config_from_dict(values, overrides, where="the config" if path is None else str(path))


def config_from_dict(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "the stored config"
) -> Config:
    """`load_config` for values at hand, such as those that a bundle stores. Keys of earlier versions are accepted."""
    try:
        values, overrides = with_new_keys(values, where), with_new_options(overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key in _unknown_keys(values, Config, ""):
        raise ConfigError(f"{where}: no key {key!r}{_nearest(key)}")
    for key in _override_keys(overrides):
        if key not in _KEYS:
            raise ConfigError(f"command line: no option --{key}{_nearest(key)}")
    import jsonargparse

    parser, blamed = _parser(), where
    try:
        namespace = parser.parse_object(dict(values))
        blamed = "command line"
        namespace = parser.parse_args(list(overrides), namespace=namespace)
        made = parser.instantiate(namespace)
        config = Config(**{item.name: made[item.name] for item in fields(Config)})
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{blamed}: {_plain_words(str(error))}") from error
    _check(config, where, frozenset(_override_keys(overrides)))
    return config


@cache
def _parser() -> "ArgumentParser":
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="refract train", exit_on_error=False)
    parser.add_class_arguments(Config)
    return parser


def help_text() -> str:
    """A line for each key: its default and what it means."""
    lines = []
    for section in fields(Config):
        default = getattr(Config(), section.name)
        notes = dict(re.findall(r"^ +(\w+): (.+)$", type(default).__doc__ or "", re.MULTILINE))
        lines.append(f"{section.name}: {(type(default).__doc__ or '').splitlines()[0]}")
        lines += [
            f"  --{section.name}.{f.name} {getattr(default, f.name)!r}\n        {notes[f.name]}"
            for f in fields(default)
        ]
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    from refract.augment.yaml_text import read_yaml

    try:
        values = read_yaml(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; `refract init FOLDER -o {path}` writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected sections ({', '.join(f.name for f in fields(Config))}), got {type(values).__name__}"
        )
    return values


def _unknown_keys(values: Mapping[str, Any], kind: type, prefix: str) -> Iterator[str]:
    known = {item.name: item for item in fields(kind)}
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
            continue
        section = known[key].default_factory
        if isinstance(section, type) and is_dataclass(section):
            if isinstance(value, Mapping):
                yield from _unknown_keys(value, section, f"{prefix}{key}.")
            elif value is None:
                raise ConfigError(f"{prefix}{key}: the section is empty; leave its line out for the defaults")
            else:
                some = ", ".join(item.name for item in fields(section)[:3])
                raise ConfigError(f"{prefix}{key}: expected a section of keys, as {some}, not {value!r}")


def _override_keys(overrides: Sequence[str]) -> list[str]:
    return [part[2:].split("=", 1)[0] for part in overrides if part.startswith("--")]


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        section = item.default_factory
        yield prefix + item.name
        if isinstance(section, type) and is_dataclass(section):
            yield from _keys(section, f"{prefix}{item.name}.")


_KEYS = tuple(_keys(Config))


def _nearest(key: str) -> str:
    match = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.4)
    # A key without its section is the commonest slip: `lr` for `optim.lr`.
    inside = [known for known in _KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    best = inside or match
    return f"; did you mean {best[0]!r}?" if best else f"; known sections: {', '.join(f.name for f in fields(Config))}"


def _check(config: Config, where: str, overridden: frozenset[str]) -> None:
    """The ranges that a type cannot say, and what does not go together."""
    model, trainer = config.model, config.trainer
    sections = (
        config.data, model, config.text, trainer, config.evaluation, config.tracking, config.gate, config.retrain,
    )  # fmt: skip
    rules = chain.from_iterable(section.rules() for section in sections)
    for key, value, holds, accepted in rules:
        if not holds:
            blamed = "command line" if key in overridden else where
            raise ConfigError(f"{blamed}: {key}: {value!r} is not {accepted}")
    if trainer.patience is not None and trainer.swa_start is not None:
        raise ConfigError(
            f"{where}: trainer.patience could end the training before trainer.swa_start's average begins; choose one"
        )
    if model.weights != "none" and model.init == "lsuv":
        raise ConfigError(
            f"{where}: model.init: lsuv scales every layer, and model.weights loads them; take init: default, or another for the head"
        )
    if model.name == "none" and config.text.name == "none":
        raise ConfigError(f"{where}: model.name and text.name are both none: nothing would be read")
    if config.text.name != "none" and config.text.drop_image + config.text.drop_text > 1:
        raise ConfigError(f"{where}: text.drop_image and text.drop_text are more than 1 together")
    if trainer.ema and trainer.swa_start is not None:
        raise ConfigError(f"{where}: trainer.ema and trainer.swa_start both average the weights; choose one")


def _plain_words(message: str) -> str:
    """jsonargparse's account of an ill-typed value, on one line and without Python's type syntax."""
    message = " ".join(message.split())
    for pattern, words in (
        (r'Parser key "([^"]+)":', r"\1:"),
        (r"<class '(\w+)'>", r"\1"),
        (r"Expected a (?=[aeiou])", "Expected an "),
        (r"typing\.Literal\[([^]]*)\]", r"one of \1"),
    ):
        message = re.sub(pattern, words, message)
    return message


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
