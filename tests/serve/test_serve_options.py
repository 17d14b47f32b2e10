"""The options of `refract serve`, set on the command line, in the environment and in a YAML file."""

from dataclasses import fields
from pathlib import Path

import pytest

from refract.serve.cli import command
from refract.serve.cli.config import DEFAULTS, OPTIONS, ServeConfig
from refract.serve.cli.options import parse
from refract.serve.requests.limits import MIB, Limits
from refract.serve.runtime.settings import ServiceSettings


@pytest.fixture
def write(tmp_path: Path):
    """Write serve.yaml, and return the arguments that read it."""

    def write(text: str) -> list[str]:
        (tmp_path / "serve.yaml").write_text(text, "utf-8")
        return ["bundle", "--config", str(tmp_path / "serve.yaml")]

    return write


def rejected(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str] | None = None) -> str:
    """Return the message of a command that must exit with 2."""
    with pytest.raises(SystemExit) as end:
        parse(argv, environ or {})
    assert end.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2].strip()


def test_the_command_line_precedes_the_environment_which_precedes_the_file(write) -> None:
    argv = write("port: 1\nmax_batch: 1\ndeadline_s: 1\n")
    config = parse([*argv, "--port", "3"], {"REFRACT_SERVE_PORT": "2", "REFRACT_SERVE_MAX_BATCH": "2", "PORT": "4"})
    assert (config.port, config.max_batch, config.deadline_s, config.max_requests) == (3, 2, 1.0, 256)


def test_every_option_can_be_set_in_each_place(write) -> None:
    """Each with its default, or with an example where there is none."""
    examples = {
        "source": "folder", "challenger": "other", "canary": "0.5", "keys": "keys", "admin_keys": "admin", "rate": "3",
        "cors_origin": "https://a.example", "root_path": "/models", "metrics_port": "9", "grpc_port": "8", "traces": "http://a",
        "sample": "DIR", "plugin": "my_plugin.py", "min_familiarity": "0.1", "feedback_dir": "DIR",
    }  # fmt: skip
    texts = {name: examples.get(name, str(DEFAULTS[name])) for name in OPTIONS if name != "shadow"}
    from_environment = parse([], {f"REFRACT_SERVE_{name.upper()}": text for name, text in texts.items()})
    flags = {name: f"--{name.replace('_', '-')}" for name in texts}
    lines = [f"{flags[name]}={text}" for name, text in texts.items() if name not in ("source", "access_log", "similar")]
    from_command_line = parse(["folder", *lines, "--no-access-log", "--no-similar"], {})
    from_file = parse(write("\n".join(f"{name}: {text}" for name, text in texts.items() if name != "source")), {})
    assert from_environment == from_command_line
    for name in OPTIONS:
        value = getattr(from_environment, name)
        assert getattr(from_file, name) == (value if name != "source" else "bundle")
        assert type(value) is type(DEFAULTS[name]) or DEFAULTS[name] is None


def test_an_option_is_accepted_by_its_former_name() -> None:
    assert parse(["folder", "--sample", "DIR", "--sample-share", "0.2"], {}).sample_fraction == 0.2


def test_the_defaults_are_those_of_the_service() -> None:
    config = ServeConfig(source="x")
    assert (config.max_body_mb * MIB, config.max_pixels) == (Limits().max_body_bytes, Limits().max_pixels)
    for field in fields(ServiceSettings):
        if field.name != "max_queue":  # not an option
            assert getattr(config, field.name) == field.default


def test_a_file_and_its_values_can_come_from_the_environment(write) -> None:
    path = write("access_log: true\ncors_origin: [https://a.example, '*']\nmax_pixels: 50_000_000\nrate: 5\n")[2]
    environ = {"REFRACT_SERVE_CONFIG": path, "REFRACT_SERVE_SOURCE": "models:/a@b", "REFRACT_SERVE_KEYS": "/keys"}
    config = parse([], environ)
    assert (config.source, config.access_log, config.max_pixels, config.rate) == ("models:/a@b", True, 50_000_000, 5)
    assert (config.cors_origin, config.keys) == (("https://a.example", "*"), Path("/keys"))
    assert parse(["--no-access-log"], environ).access_log is False
    several = parse(["x"], {"REFRACT_SERVE_CORS_ORIGIN": "https://a.example, https://b.example"})
    assert several.cors_origin == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-batch: 3", "FILE: no key 'max-batch'; did you mean 'max_batch'?"),
        ("zzz: 3", "FILE: no key 'zzz'; `refract serve --help` lists the options"),
        ("config: other.yaml", "FILE: no key 'config'"),
        ("port: 70000", "FILE: port: '70000' is not a whole number in 0 … 65535"),
        ("port: 80.5", "FILE: port: '80.5' is not a whole number in 0 … 65535"),
        ("deadline_s: 0", "FILE: deadline_s: '0' is not a number above 0 to 100000"),
        ("keys:", "FILE: keys: the value is missing"),
        ("keys: no", "FILE: keys: False is a truth value; put a text in quotes"),
        ("host: [a, b]", "FILE: host: ['a', 'b'] is not a single value"),
        ("access_log: 3", "FILE: access_log: '3' is neither true nor false"),
        ("backend: cuda", "FILE: backend: 'cuda' is unknown; accepted are auto, eager, "),
        ("cors_origin: [https://a.example/]", "FILE: cors_origin: 'https://a.example/' is not an origin"),
        ("rate: 3", "FILE: rate limits each API key: it needs --keys FILE"),
        ("port: 81\ngrpc_port: 81", "FILE: grpc_port: 81 is also that of FILE: port; choose another port"),
        ("shadow: 0.1\ncanary: 0.1\nchallenger: x", "given: FILE: challenger, FILE: shadow, FILE: canary"),
        ("port: 1\nport: 2", "FILE: not valid YAML: duplicate key 'port'"),
        ("- port", "FILE: expected keys and values, such as `max_batch: 32`, got list"),
        ("port: [", "FILE: not valid YAML: "),
    ],
)
def test_an_error_names_the_file_and_the_key(text: str, message: str, write, capsys) -> None:
    argv = write(text)
    assert message.replace("FILE:", f"{argv[2]}:") in rejected(capsys, argv)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("PROT", "1", "the environment: no variable 'REFRACT_SERVE_PROT'; did you mean 'REFRACT_SERVE_PORT'?"),
        ("PORT", "tcp://10.0.0.1", "REFRACT_SERVE_PORT: 'tcp://10.0.0.1' is not a whole number in 0 … 65535"),
        ("KEYS", "", "REFRACT_SERVE_KEYS is empty; give it a value or unset it"),
        ("RATE", "3", "REFRACT_SERVE_RATE limits each API key: it needs --keys FILE"),
        ("CONFIG", "/nowhere", "cannot read /nowhere: No such file or directory"),
    ],
)
def test_an_error_names_the_variable(variable: str, text: str, message: str, capsys) -> None:
    assert rejected(capsys, ["x"], {f"REFRACT_SERVE_{variable}": text}) == message


def test_a_backend_of_a_plugin_needs_the_option_plugin(write, capsys) -> None:
    for argv in (["x", "--backend", "mine", "--plugin", "a.py", "b.py"], write("backend: mine\nplugin: [a.py, b.py]")):
        config = parse(argv, {})
        assert (config.backend, config.plugin) == ("mine", ("a.py", "b.py"))
    message = rejected(capsys, ["x", "--backend", "mine"])
    assert message.startswith("--backend: 'mine' is unknown; accepted are auto, ") and "needs --plugin FILE" in message


def test_a_missing_source_is_named(capsys) -> None:
    message = rejected(capsys, ["x", "--feedback-keep", "0", "--feedback-dir", "DIR"])
    assert message == "--feedback-dir needs predictions to judge: --feedback-keep is 0"
    assert rejected(capsys, []).startswith("SOURCE is missing; expected the folder of a bundle, models:/NAME@ALIAS")


def test_a_file_that_cannot_be_used_is_named_with_the_place_of_its_option(write, tmp_path) -> None:
    (tmp_path / "short").write_text("1234567\n")
    config = parse(write(f"admin_keys: {tmp_path}/short\n"), {"REFRACT_SERVE_KEYS": str(tmp_path / "none")})
    with pytest.raises(command.InvalidOptionError, match=r"^REFRACT_SERVE_KEYS: .*/none: No such file"):
        command._keys(config)
    with pytest.raises(command.InvalidOptionError, match=r"/serve.yaml: admin_keys: .*/short: line 1: an API key"):
        command._admin_keys(config)
