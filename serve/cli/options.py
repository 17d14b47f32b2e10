"""Read the options of `refract serve` from the command line, the environment and a YAML file, in this order of precedence."""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from refract.serve.cli.config import DEFAULTS, OPTIONS, Option, ServeConfig
from refract.serve.cli.values import switch

PREFIX = "REFRACT_SERVE_"
"""The start of the name of each environment variable."""

CONFIG = "config"
READ = {CONFIG: Option("read options from this YAML file", Path, "FILE", many=False), **OPTIONS}
"""The options of the command line and of the environment. A file does not name another file."""

FORMER_FLAGS = {"sample_fraction": "--sample-share"}
"""Option → its name on the command line in earlier versions, which is accepted."""

SET_ELSEWHERE = (
    "An option such as --max-batch can also be the variable REFRACT_SERVE_MAX_BATCH, or the key max_batch of the file of --config; "
    "the command line precedes the environment, the environment precedes the file."
)


def parse(argv: list[str], environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """Return the options. Exits with 2 and a message that names the invalid option and where it was set."""
    parser = _parser()
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(argv)).items()
    }
    try:
        values = _from_environment(environ) | arguments
        origins = {name: _variable(name) for name in values if name not in arguments}
        if file := values.pop(CONFIG, None):
            keys = _from_file(file)
            origins = {name: f"{file}: {name}" for name in keys if name not in values} | origins
            values = keys | values
        return ServeConfig(**values, origins=origins)
    except ValueError as err:
        parser.error(str(err))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refract serve",
        usage="refract serve SOURCE [--option VALUE …]; --help lists the options",
        description="Serve a bundle over HTTP. Clients POST images to /v1/predict; /docs describes the API.",
        epilog=SET_ELSEWHERE,
        argument_default=argparse.SUPPRESS,  # so that an option of the environment or the file is not hidden by a default
    )
    for name, option in READ.items():
        _add(parser, name, option)
    return parser


def _add(parser: argparse.ArgumentParser, name: str, option: Option) -> None:
    default = DEFAULTS.get(name)
    has_default = default is not None and default is not False and default not in ("", ())
    text = f"{option.help} (default: {default})" if has_default else option.help
    flags = [f"--{name.replace('_', '-')}", *([FORMER_FLAGS[name]] if name in FORMER_FLAGS else [])]
    if name == "source":
        parser.add_argument(name, nargs="?", metavar=option.metavar, help=text)
    elif option.parse is switch:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
    elif option.many:
        parser.add_argument(*flags, type=_typed(option), nargs="+", action="extend", metavar=option.metavar, help=text)
    else:
        parser.add_argument(*flags, type=_typed(option), metavar=option.metavar, help=text)


def _typed(option: Option) -> Callable[[str], Any]:
    """Return the parser of a value for argparse, which hides the message of a ValueError."""

    def typed(text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return typed


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    known = {_variable(name): name for name in READ}
    values: dict[str, Any] = {}
    for variable in sorted(name for name in environ if name.startswith(PREFIX)):
        text = environ[variable]
        if variable not in known:
            _reject_unknown(variable, known, "the environment", "variable")
        if not text.strip():
            raise ValueError(f"{variable} is empty; give it a value or unset it")
        option = READ[known[variable]]
        values[known[variable]] = _value(variable, option, re.split(r"[\s,]+", text.strip()) if option.many else text)
    return values


def _from_file(file: Path) -> dict[str, Any]:
    import yaml

    from refract.augment.yaml_text import read_yaml

    try:
        document = read_yaml(file.read_text("utf-8"))
    except OSError as err:
        raise ValueError(f"cannot read {file}: {err.strerror}") from err
    except (UnicodeDecodeError, yaml.YAMLError) as err:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(document, dict):
        raise ValueError(f"{file}: expected keys and values, such as `max_batch: 32`, got {type(document).__name__}")
    for key in document:
        if key not in OPTIONS:
            _reject_unknown(str(key), OPTIONS, str(file), "key")
    return {name: _value(f"{file}: {name}", OPTIONS[name], value) for name, value in document.items()}


def _reject_unknown(name: str, known: Iterable[str], where: str, kind: str) -> NoReturn:
    (*near,) = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`refract serve --help` lists the options"
    raise ValueError(f"{where}: no {kind} {name!r}; {hint}")


def _value(where: str, option: Option, value: Any) -> Any:
    """Return the value of an option that was set in the environment or in a file. where: names it in errors."""
    try:
        if option.many:
            return tuple(option.parse(_text(item, option)) for item in (value if isinstance(value, list) else [value]))
        return option.parse(_text(value, option))
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from err


def _text(value: Any, option: Option) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) and option.parse is not switch:
        raise ValueError(f"{value} is a truth value; put a text in quotes")
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{value!r} is not a single value" if value is not None else "the value is missing")
    return str(value)
