"""The typed configuration: read from YAML, overridden on the command line, saved with every run and bundle."""

import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from refract.errors import InputError
from refract.models.credentials import masked_values
from refract.models.fields import NotAccepted, accepted
from refract.models.training.losses import loss_names
from refract.models.training.specs import LossSpec, OptimSpec
from refract.pipeline.config.plugin_files import absolute_paths
from refract.pipeline.config.renamed import with_new_keys, with_new_options
from refract.pipeline.config.retraining_sections import GateConfig, RetrainConfig
from refract.pipeline.config.sections import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TextConfig,
    TrackingConfig,
    TrainerConfig,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class ConfigError(InputError):
    """Raised for an invalid configuration; the message names the key and the accepted values."""


@dataclass(frozen=True)
class Config:
    """The whole configuration; runs and bundles store `to_dict`.

    Args:
        plugins: Python files (relative to the config's folder or the current folder), modules, or entry points of the group refract.plugins
            that add ops, networks, losses, metrics or sources.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimSpec = field(default_factory=OptimSpec)
    loss: LossSpec = field(default_factory=LossSpec)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    plugins: tuple[str, ...] = ()

    def to_dict(self, *, credentials: bool = False) -> dict[str, Any]:
        """Return plain JSON and YAML values, with credentials masked by `refract.models.credentials`. Without plugins there is no such key.

        credentials: keep them, for a config that is not stored.
        """
        values: dict[str, Any] = _plain(asdict(self))
        if not self.plugins:
            del values["plugins"]
        return values if credentials else masked_values(values)

    @property
    def reads(self) -> frozenset[str]:
        """The modalities that the network reads: `images`, `texts`, or both."""
        modalities = {"images": self.model.reads_images, "texts": self.text.reads_texts}
        return frozenset(name for name, is_read in modalities.items() if is_read)

    @property
    def loads_weights(self) -> bool:
        """Whether training starts from loaded weights, of the image network or of the text network."""
        return self.model.weights != "none" or self.text.loads_weights

    def changed(self, values: Mapping[str, Any]) -> "Config":
        """Return a copy with new values. values: dotted key, such as `data.source`, → value."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return replace(self, **{name: replace(getattr(self, name), **section) for name, section in sections.items()})


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config (None: all defaults) and apply overrides such as `--optim.lr 3e-3` or `--optim.lr=3e-3`.

    Raises ConfigError: it names an unknown key and the nearest valid one, or the key and value of a wrong type.
    """
    values = {} if path is None else _read_yaml(Path(path))
    config = config_from_dict(values, overrides, where="the config" if path is None else str(path))
    folders = [Path()] if path is None else [Path(path).parent, Path()]
    return replace(config, plugins=absolute_paths(config.plugins, *folders))


def config_from_dict(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "the stored config"
) -> Config:
    """Build a Config from a mapping, such as the one stored in a bundle. Former key names are accepted.

    where: name of the source in errors. Raises ConfigError as `load_config`.
    """
    try:
        values, overrides = with_new_keys(values, where), with_new_options(overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key in _unknown_keys(values, Config, "", where):
        raise ConfigError(f"{where}: no key {key!r}{_nearest(key)}")
    if values.get("plugins", ()) is None:
        raise ConfigError(f"{where}: plugins: the list is empty; remove the key, or name a plugin")
    for key in _override_keys(overrides):
        if key not in _KEYS:
            raise ConfigError(f"command line: no option --{key}{_nearest(key)}")
    import jsonargparse

    parser, source = _parser(), where
    try:
        namespace = parser.parse_object(dict(values))
        if overrides:  # without them, the parser would validate the values a second time
            source = "command line"
            namespace = parser.parse_args(list(overrides), namespace=namespace)
        sections = parser.instantiate(namespace)
        config = Config(**{item.name: sections[item.name] for item in fields(Config)})
    except NotAccepted as error:
        section = next(item.name for item in fields(Config) if item.default_factory is error.owner)
        source = "command line" if f"{section}.{error.key}" in _override_keys(overrides) else where
        raise ConfigError(f"{source}: {section}.{error.key}: {error.value!r} is not {error.expected}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {_plain_words(str(error))}") from error
    check(config, where, frozenset(_override_keys(overrides)))
    return config


@cache
def _parser() -> "ArgumentParser":
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="refract train", exit_on_error=False)
    parser.add_class_arguments(Config)
    return parser


def help_text() -> str:
    """Return the configuration reference: each key with its default and its meaning."""
    lines = [f"--plugins {_as_yaml(Config().plugins)}", _indented(described(Config)[1]["plugins"])]
    for section in fields(Config):
        default = getattr(Config(), section.name)
        if not is_dataclass(default) or isinstance(default, type):
            continue
        summary, meanings = described(type(default))
        lines.append(f"{section.name}: {summary}")
        for item in fields(default):
            lines.append(f"  --{section.name}.{item.name} {_as_yaml(getattr(default, item.name))}")
            lines.append(_indented(meanings[item.name]))
    return "\n".join(lines)


def described(section: type) -> tuple[str, dict[str, str]]:
    """Return the summary of a section, and the meaning of each key with its accepted values.

    The meanings are the entries `key: meaning` of the section's docstring; a deeper indented line continues an entry.
    """
    text = section.__doc__ or ""
    entries = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)$", text, re.MULTILINE)
    meanings = {key: " ".join(meaning.split()) for key, meaning in entries}
    for item in fields(section):
        if words := accepted(item):
            meanings[item.name] += f" {words[0].upper()}{words[1:]}."
    return text.splitlines()[0], meanings


def _as_yaml(value: Any) -> str:
    """Return a default as YAML and the command line take it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _indented(text: str) -> str:
    indent = " " * 8
    return textwrap.fill(text, 110, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    from refract.augment.yaml_text import read_yaml

    try:
        values = read_yaml(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; `refract init FOLDER -o {path}` writes one") from error
    except IsADirectoryError as error:
        run = path / "config.yaml"
        hint = f"did you mean {run}?" if run.is_file() else f"`refract init {path} -o my.yaml` writes one for images"
        raise ConfigError(f"{path}: a folder, not a config; {hint}") from error
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


def _unknown_keys(values: Mapping[str, Any], kind: type, prefix: str, where: str) -> Iterator[str]:
    """Yield the keys that no section has. ConfigError for a section that is no mapping."""
    known = {item.name: item for item in fields(kind)}
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
            continue
        section = known[key].default_factory
        if isinstance(section, type) and is_dataclass(section):
            if isinstance(value, Mapping):
                yield from _unknown_keys(value, section, f"{prefix}{key}.", where)
            elif value is None:
                raise ConfigError(f"{where}: {prefix}{key}: the section is empty; remove the line to use the defaults")
            else:
                examples = ", ".join(item.name for item in fields(section)[:3])
                raise ConfigError(
                    f"{where}: {prefix}{key}: got {value!r}; expected a section with keys such as {examples}"
                )


def _override_keys(overrides: Sequence[str]) -> list[str]:
    return [part[2:].split("=", 1)[0] for part in overrides if part.startswith("--")]


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        section = item.default_factory
        yield prefix + item.name
        if isinstance(section, type) and is_dataclass(section):
            yield from _keys(section, f"{prefix}{item.name}.")


_KEYS = tuple(_keys(Config))


_USUAL = {
    "learning_rate": "optim.lr",
    "epochs": "trainer.max_epochs",
    "num_workers": "data.workers",
    "optimizer": "optim.name",
    "wd": "optim.weight_decay",
    "img_size": "data.image_size",
    "pretrained": "model.weights",
    "dataset": "data.source",
}
"""Other libraries' names of keys, which are spelt unlike Refract's."""


def _nearest(key: str) -> str:
    match = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.4)
    # A key without its section is the most common mistake: `lr` for `optim.lr`.
    same_name = [known for known in _KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    best = [_USUAL[name]] if (name := key.rpartition(".")[2]) in _USUAL else same_name or match
    return f"; did you mean {best[0]!r}?" if best else f"; known sections: {', '.join(f.name for f in fields(Config))}"


def check(config: Config, where: str, overridden: frozenset[str] = frozenset()) -> None:
    """Raise ConfigError for a value out of range, or for keys that contradict each other.

    where: name of the config's source; overridden: keys set on the command line.
    """
    model, trainer = config.model, config.trainer
    for key, words in _nulls(config):
        raise ConfigError(
            f"{'command line' if key in overridden else where}: {key}: null is not accepted; expected {words}"
        )
    rules = chain.from_iterable(
        section.rules() for section in (config.data, trainer, config.tracking, config.gate, config.retrain)
    )
    for key, value, holds, expected in rules:
        if not holds:
            source = "command line" if key in overridden else where
            raise ConfigError(f"{source}: {key}: {value!r} is not {expected}")
    if not config.plugins:
        check_loss(config, "command line" if "loss.name" in overridden else where)
    if trainer.patience is not None and trainer.swa_start is not None:
        raise ConfigError(
            f"{where}: trainer.patience may stop training before the averaging of trainer.swa_start starts; remove one of them"
        )
    if model.weights != "none" and model.init == "lsuv":
        raise ConfigError(
            f"{where}: model.init: lsuv rescales every layer and would overwrite model.weights; use default or another init"
        )
    if model.name == "none" and config.text.name == "none":
        raise ConfigError(f"{where}: model.name and text.name are both none; set one, so that the model has an input")
    if config.text.name != "none" and config.text.drop_image + config.text.drop_text > 1:
        raise ConfigError(f"{where}: the sum of text.drop_image and text.drop_text is above 1; it is at most 1")
    if trainer.ema and trainer.swa_start is not None:
        raise ConfigError(f"{where}: trainer.ema and trainer.swa_start both average the weights; remove one of them")


def _nulls(config: Config) -> Iterator[tuple[str, str]]:
    """Yield each key that is null although its type has no null, and the accepted values: jsonargparse lets null pass."""
    for name in (item.name for item in fields(Config)):
        section = getattr(config, name)
        for item in fields(section) if is_dataclass(section) else ():
            if getattr(section, item.name) is None and item.type is not Any and type(None) not in get_args(item.type):
                default = getattr(type(section)(), item.name)
                yield f"{name}.{item.name}", accepted(item) or f"a value such as {_as_yaml(default)}"


def check_loss(config: Config, where: str) -> None:
    """Raise ConfigError for an unknown loss. With plugins, this holds only after they are loaded."""
    name, names = config.loss.name, loss_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        missing = "no plugin of the config adds it" if config.plugins else "a plugin's loss needs the key plugins"
        hint = f"did you mean {near[0]!r}?" if near else missing
        raise ConfigError(f"{where}: loss.name: {name!r} is not one of {', '.join(names)}; {hint}")


def _plain_words(message: str) -> str:
    """Rewrite jsonargparse's message on a value of a wrong type as one line without Python's type syntax."""
    message = " ".join(message.split())
    for pattern, words in (
        (r'Parser key "([^"]+)":', r"\1:"),
        (r"<class '(\w+)'>", r"\1"),
        (r"Expected a (?=[aeiou])", "Expected an "),
        (r"typing\.Literal\[([^]]*)\]", r"one of \1"),
        (r"Expected an? one of", "Expected one of"),
    ):
        message = re.sub(pattern, words, message)
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value type: \w+ Given value:"
    return re.sub(union, lambda match: f"Expected {_of_union(match[1])}. Got value:", message)


def _of_union(types: str) -> str:
    """Return the types of a union in words: `int or null`."""
    return " or ".join(re.split(r", (?![^\[]*\])", types.replace("NoneType", "null")))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
