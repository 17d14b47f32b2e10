"""The configuration: errors name the key, and a saved config reads the same."""

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from refract.cli import main
from refract.models.training.losses import LOSSES
from refract.models.training.optimizers import OPTIMIZERS
from refract.models.training.schedules import SCHEDULES
from refract.pipeline.config.config import _KEYS, _USUAL, Config, ConfigError, config_from_dict, help_text, load_config
from refract.pipeline.config.renamed import RENAMED, RENAMED_VALUES
from refract.pipeline.config.schema import json_schema
from refract.pipeline.training.run import train
from refract.pipeline.tuning.space import read_space, with_values

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-2, name: sgd}\ndata: {image_size: [32, 48]}\n")
    config = load_config(file, ["--optim.lr", "3e-3", "--model.name=lenet5", "--data.batch_size", "7"])
    assert (config.optim.lr, config.optim.name, config.model.name, config.data.batch_size) == (3e-3, "sgd", "lenet5", 7)
    assert config.data.sides() == (32, 48)


def test_policy_as_a_list_on_the_command_line() -> None:
    config = load_config(None, ["--augment.policy", "[{HorizontalFlip: {p: 0.5}}]"])
    assert config.augment.policy == [{"HorizontalFlip": {"p": 0.5}}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"no key 'optim.lrr'; did you mean 'optim.lr'\?"),
        ("lr: 1", r"no key 'lr'; did you mean 'optim.lr'\?"),
        ("optmi: {lr: 1}", r"no key 'optmi'; did you mean 'optim'\?"),
        ("optim: {lr: fast}", "optim.lr.*fast"),
        ("optim: {name: adma}", "optim.name.*adma"),
        ("trainer: {ema: 1}", r"trainer.ema: 1.* is not a number in \[0, 1\)"),
        ("data: {batch_size: 0}", "data.batch_size: 0 is not a whole number of at least 1"),
        ("data: {image_size: 3}", "data.image_size: 3 is not at least 8 pixels"),
        ("data: {val_fraction: 1.5}", r"data.val_fraction: 1.5 is not a number in \(0, 1\)"),
        ("trainer: {run_name: ../up}", "run_name: '../up' is not a plain folder name"),
        ("optim:", "optim: the section is empty"),
        ("- a", "expected sections"),
        ("optim: {lr: 1", "not valid YAML"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_errors_of_unknown_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no option --optim.lrate; did you mean 'optim.lr'\?"):
        load_config(None, ["--optim.lrate", "1"])
    with pytest.raises(ConfigError, match=r"no option --learning_rate; did you mean 'optim.lr'\?"):
        load_config(None, ["--learning_rate", "1"])
    with pytest.raises(ConfigError, match=r"no option --trainer.epochs; did you mean 'trainer.max_epochs'\?"):
        load_config(None, ["--trainer.epochs", "1"])
    with pytest.raises(ConfigError, match="optim.lr"):
        load_config(None, ["--optim.lr", "quick"])


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder, not a config; `refract init .* -o my.yaml` writes one"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"a folder, not a config; did you mean .*config\.yaml\?"):
        load_config(tmp_path)


def test_the_names_of_other_libraries_lead_to_keys() -> None:
    assert set(_USUAL.values()) <= set(_KEYS)
    assert not {key.rpartition(".")[2] for key in _KEYS} & set(_USUAL)


def test_the_error_of_a_missing_file_names_refract_init() -> None:
    with pytest.raises(ConfigError, match="refract init"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_read_and_save_the_same(path: Path) -> None:
    config = load_config(path)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
        max_size=4,
    )
)
def test_any_mapping_is_read_or_rejected(values: dict) -> None:
    try:
        config_from_dict(values)
    except ConfigError as error:
        assert str(error)


def test_help_explains_every_key() -> None:
    text = help_text()
    for section, values in Config().to_dict().items():
        for key in values:
            assert f"--{section}.{key} " in text
    one_line = " ".join(text.split())
    assert "; squash keeps the whole image and changes its aspect ratio. --data.crop_ratio" in one_line, (
        "continuation lines are joined"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.lr", -1.0, "a number above 0, or null"),
        ("optim.clip_norm", -1.0, "a number above 0, or null"),
        ("optim.layer_decay", 2.0, "a number in (0, 1]"),
        ("optim.schedule", "cosin", "one of constant, linear, cosine, .*; did you mean 'cosine'?"),
        ("loss.label_smoothing", 1.0, "a number in [0, 1)"),
        ("gate.calibration_error", 2.0, "a number in [0, 1], or null"),
        ("trainer.seed", 2**32, "a whole number in [0, 4294967296)"),
        ("loss.name", "focla", "one of auto, cross_entropy, bce, .*; did you mean 'focal'?"),
    ],
)
def test_values_are_checked_when_the_config_is_read(key: str, value: object, expected: str) -> None:
    section, name = key.split(".")
    message = re.escape(f"{key}: {value!r} is not {expected}").replace(r"\.\*", ".*")
    with pytest.raises(ConfigError, match=f"^c.yaml: {message}$"):
        config_from_dict({section: {name: value}}, ["--optim.sam=0.1"], where="c.yaml")
    with pytest.raises(ConfigError, match=f"^command line: {message}$"):
        load_config(None, [f"--{key}={value}"])


def test_help_and_schema_give_the_accepted_values_of_the_optimiser_and_the_loss() -> None:
    text, sections = " ".join(help_text().split()), json_schema()["$defs"]
    assert (
        f"loss, of Refract or of a plugin; auto is bce for multilabel, else cross_entropy. One of auto, {', '.join(LOSSES)}."
        in text
    )
    assert "amount of label smoothing. A number in [0, 1)." in text
    assert sections["LossSpec"]["properties"]["name"]["anyOf"][0]["enum"] == ["auto", *LOSSES], "for editors"
    assert sections["OptimSpec"]["properties"]["name"]["enum"] == [*OPTIMIZERS]
    assert sections["LossSpec"]["properties"]["label_smoothing"]["exclusiveMaximum"] == 1


def test_the_documentation_names_every_loss_optimizer_and_schedule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    for heading, table in (("Optimisers", OPTIMIZERS), ("Schedules", SCHEDULES), ("Losses", LOSSES)):
        (line,) = [line for line in page.splitlines() if line.startswith(f"- **{heading}**")]
        assert set(table) <= set(re.findall(r"[a-z_]+", line)), heading


def test_reading_a_config_imports_no_pytorch() -> None:
    code = "import sys, refract.pipeline.config.config as c; c.help_text(); c.load_config(None); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_network_with_a_fixed_input_size_rejects_start_size() -> None:
    config = config_from_dict(
        {"model": {"name": "lenet5"}, "trainer": {"start_size": 0.5}, "tracking": {"enabled": False}}
    )
    with pytest.raises(
        ConfigError, match=r"^model\.name: lenet5 cannot train on 2 images of 16×16 pixels in some epochs"
    ):
        train(config)


def test_a_config_is_changed_only_in_a_copy() -> None:
    config = Config()
    changed = config.changed({"data.source": "images", "trainer.seed": 3, "trainer.run_name": "a"})
    assert (changed.data.source, changed.trainer.seed, changed.trainer.run_name) == ("images", 3, "a")
    assert config == Config() and changed.optim is config.optim
    for section in (config, *(each for each in vars(config).values() if is_dataclass(each))):
        with pytest.raises(FrozenInstanceError):
            setattr(section, fields(section)[0].name, None)


def test_null_is_refused_by_name_where_a_key_has_no_null() -> None:
    for section in (item for item in fields(Config) if is_dataclass(item.default_factory)):
        for item in fields(section.default_factory):
            try:
                config = config_from_dict({section.name: {item.name: None}})
            except ConfigError as error:
                assert f"{section.name}.{item.name}" in str(error), error
            else:
                assert "None" in str(item.type), f"{section.name}.{item.name}: {getattr(config, section.name)}"
    with pytest.raises(
        ConfigError, match=r"config: trainer\.runs_dir: null is not accepted; expected a value such as runs"
    ):
        config_from_dict({"trainer": {"runs_dir": None}}, where="the config")


def test_a_section_of_another_type_is_named() -> None:
    for value in (3, "x", [1], True):
        with pytest.raises(ConfigError, match="optim: got .*; expected a section with keys such as name, lr, "):
            config_from_dict({"optim": value})


def messages_of_refract(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without those of other libraries: a thread of MLflow's client still warns of the server of an earlier test."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("refract")]


def test_former_keys_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {val_share: 0.3}\ntrainer: {recompute: true}\n")
    config = load_config(file, ["--data.test_share=0.25", "--text.drop_picture", "0.2"])
    assert (config.data.val_fraction, config.data.test_fraction, config.text.drop_image) == (0.3, 0.25, 0.2)
    assert config.trainer.gradient_checkpointing
    assert f"{file}: data.val_share is deprecated; write data.val_fraction" in caplog.messages
    assert "command line: data.test_share is deprecated; write data.test_fraction" in caplog.messages
    caplog.clear()
    assert load_config(None, ["--data.test_fraction=0.25"]).data.test_fraction == 0.25
    assert not messages_of_refract(caplog)


def test_a_key_under_its_former_and_its_present_name_is_rejected() -> None:
    values = {"retrain": {"tell": "a", "notify": "b"}}
    with pytest.raises(ConfigError, match="retrain.tell is the former name of retrain.notify; remove retrain.tell"):
        config_from_dict(values)


@pytest.mark.parametrize("options", [["--retrain.drift", "tell"], ["--retrain.drift=tell"]])
def test_former_values_are_read_with_a_warning(
    options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("retrain: {drift: tell}\n")
    assert load_config(file).retrain.drift == "warn"
    assert f"{file}: retrain.drift: tell is deprecated; write retrain.drift: warn" in caplog.messages
    caplog.clear()
    assert load_config(None, ["--retrain.drift", "stop", *options]).retrain.drift == "warn"
    assert messages_of_refract(caplog) == ["command line: retrain.drift: tell is deprecated; write retrain.drift: warn"]
    caplog.clear()
    file.write_text("retrain: {drift: warn, notify: tell}\n")
    assert load_config(file, ["--retrain.drift", "stop", "--retrain.notify", "tell"]).retrain.notify == "tell"
    assert not messages_of_refract(caplog)


@pytest.mark.parametrize("key", RENAMED_VALUES)
def test_a_renamed_value_leads_to_an_accepted_value(key: str) -> None:
    section, name = key.split(".")
    for value in RENAMED_VALUES[key].values():
        config_from_dict({section: {name: value}})


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_leads_to_a_key_of_the_same_section(old: str) -> None:
    section, key = RENAMED[old].split(".")
    assert old.startswith(f"{section}.") and hasattr(getattr(Config(), section), key)


def test_the_schema_accepts_every_config_of_the_repository_and_describes_every_key() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for path in CONFIGS:
        validator.validate(yaml.safe_load(path.read_text("utf-8")))
    validator.validate(Config().to_dict())
    for section in schema["$defs"].values():
        assert all(key["description"] for key in section["properties"].values())
    assert schema["$defs"]["DataConfig"]["properties"]["batch_size"]["default"] == Config().data.batch_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lrr": 1}}, "'lrr' was unexpected"),
        ({"optim": {"name": "adma"}}, "'adma' is not one of"),
        ({"data": {"batch_size": "many"}}, "'many' is not of type 'integer'"),
        ({"optmi": {}}, "'optmi' was unexpected"),
        ({"loss": {"gamma": "fast"}}, "'fast' does not match"),
        ({"loss": {"label_smoothing": 1.0}}, "1.0 is greater than or equal to the maximum of 1"),
    ],
)
def test_the_schema_names_mistakes(values: dict, message: str) -> None:
    (error,) = Draft202012Validator(json_schema()).iter_errors(values)
    assert message in error.message


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+5.e-1", ".5e-1", "2.5e-01"])
def test_schema_and_loader_accept_numbers_that_yaml_reads_as_strings(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"optim: {{lr: {text}, warmup: {text}}}\ndata: {{mean: [{text}, 0.5, 0.5]}}\n")
    Draft202012Validator(json_schema()).validate(yaml.safe_load(file.read_text()))
    config = load_config(file)
    assert (config.optim.lr, config.optim.warmup, config.data.mean) == (
        float(text),
        float(text),
        (float(text), 0.5, 0.5),
    )


def test_the_schema_marks_former_keys_as_deprecated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    former = schema["$defs"]["DataConfig"]["properties"]["val_share"]
    assert former["deprecated"] and "number" in former["type"] and "data.val_fraction" in former["description"]
    assert main(["config", "keys"]) == 0
    assert capsys.readouterr().out == help_text() + "\n"


def test_an_option_under_its_former_and_its_present_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--data.val_share is the former name of --data.val_fraction"):
        load_config(None, ["--data.val_share", "0.3", "--data.val_fraction=0.2"])


def test_a_search_space_may_name_a_former_key(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("data.val_share: [0.1, 0.2]\ndata.batch_size: {choices: [8], when: {data.val_share: 0.1}}\n")
    first, second = read_space(path)
    assert first.key == "data.val_fraction" and second.when == (("data.val_fraction", 0.1),)
    assert with_values(Config().to_dict(), {first.key: 0.2})["data"]["val_fraction"] == 0.2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--retrain.keep_snapshots=text", "retrain.keep_snapshots: Expected int or null. Got value: text"),
        ("--data.image_size=a", "data.image_size: Expected int or tuple[int, int]. Got value: a"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_the_types(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [option])
    assert message in str(refused.value) and "Union" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.source", "https://user:hunter2secret@host/a.zip", "a URL without credentials, which runs would store"),
        ("data.source", "https://host/a.zip?sig=hunter2secret", "a URL without credentials"),
        ("trainer.runs_dir", "s3://bucket/runs", "a local folder; set trainer.copy_to to copy runs to a URL"),
    ],
)
def test_urls_in_a_config(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        section, name = key.split(".")
        config_from_dict({section: {name: value}})
    assert key in str(refused.value) and "hunter2secret" not in str(refused.value)
    assert config_from_dict({"data": {"source": "hf://datasets/acme/photos@main"}}).data.source.endswith("@main")
