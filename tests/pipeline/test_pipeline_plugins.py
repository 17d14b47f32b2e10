"""Plugins: the example of docs/plugins.md in a training, and in the commands that use its bundle."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_data import Run, paint
from warm_process import WarmProcess

from refract import plugins
from refract.augment import Augmenter
from refract.cli import main
from refract.models.bundle.bundle import load_bundle
from refract.models.registry import build
from refract.models.training.losses import losses_of
from refract.models.training.objective import classification_loss
from refract.pipeline.config.config import ConfigError, check_loss, load_config
from refract.pipeline.data.manifest import DataError, load_manifest
from refract.pipeline.evaluation.custom_metrics import custom_metrics
from refract.pipeline.retraining.run import begin, run_config, worth_resuming
from refract.pipeline.training.run_directory import unfinished
from refract.plugins import PluginError, load

DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"
EXAMPLE = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)[0]
EXAMPLE_CONFIG = re.findall(r"```yaml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)[0]


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """Remove the plugins of a test from the registries of this process."""
    yield
    for each in plugins._loaded.values():
        each.remove_entries()
    plugins._loaded.clear()


@pytest.fixture(scope="module")
def trained(warm: WarmProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example was trained, with a loader worker: my_plugin.py, c.yaml, images/ and runs/first/."""
    root = tmp_path_factory.mktemp("trained")
    paint(root / "images", range(12))
    (root / "photos").mkdir()
    for path in (root / "images").glob("*/*.png"):
        shutil.copy(path, root / "photos" / f"{path.parent.name}-{path.name}")
    (root / "my_plugin.py").write_text(EXAMPLE)
    values = yaml.safe_load(EXAMPLE_CONFIG)
    values["data"] |= {"image_size": 16, "workers": 1, "memory": "never"}
    values |= {
        "trainer": {"max_epochs": 1, "run_name": "first"},
        "evaluation": {"robustness": "none"},
        "tracking": {"enabled": False},
    }
    (root / "c.yaml").write_text(yaml.safe_dump(values))
    done = warm.run(["train", "c.yaml"], cwd=root, env=os.environ, seconds=240)
    assert done.returncode == 0, done.stderr
    return root


def test_a_training_uses_each_kind_and_its_run_and_bundle_name_the_plugin(trained: Path) -> None:
    run = trained / "runs" / "first"
    assert (run / "plugins" / "my_plugin.py").read_text() == EXAMPLE
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["plugins"] == ["plugins/my_plugin.py"] and stored["loss"]["name"] == "hinge"
    info = json.loads((run / "bundle" / "bundle.json").read_text())
    assert info["plugins"] == [{"name": "my_plugin.py", "sha256": sha256(EXAMPLE.encode()).hexdigest()}]
    assert info["labels"] == ["blue", "green", "red"], "from the plugin's source"
    assert info["network"]["name"] == "TinyNet" and 0 <= info["metrics"]["worst_recall"] <= 1
    assert "worst_recall" in (run / "report.html").read_text()


@pytest.mark.slow
def test_the_ranks_that_rank_0_starts_load_the_plugin(trained: Path, warm: WarmProcess) -> None:
    options = ["--trainer.devices", "2", "--trainer.device", "cpu", "--trainer.run_name", "two", "--data.workers", "0"]
    done = warm.run(["train", "c.yaml", *options], cwd=trained, env=os.environ, seconds=240)
    assert done.returncode == 0, done.stderr
    info = json.loads((trained / "runs" / "two" / "bundle" / "bundle.json").read_text())
    assert info["network"]["name"] == "TinyNet" and 0 <= info["metrics"]["worst_recall"] <= 1
    assert (trained / "runs" / "two" / "plugins" / "my_plugin.py").read_text() == EXAMPLE


def test_commands_need_the_plugin_of_a_bundle_and_work_with_it(trained: Path, refract: Run, tmp_path: Path) -> None:
    bundle, image = trained / "runs" / "first" / "bundle", next((trained / "images").glob("*/*.png"))
    message = refract("predict", bundle, image, code=2).stderr
    assert "the network 'TinyNet' needs the plugin my_plugin.py, which is not loaded; add --plugin FILE" in message
    option = ("--plugin", trained / "my_plugin.py")
    assert "label" in json.loads(refract("predict", bundle, image, "--json", *option).stdout)
    paint(tmp_path / "new", range(20, 24))
    refract("evaluate", bundle, "new", "--json", "numbers.json", *option)
    assert 0 <= json.loads(Path("numbers.json").read_text())["metrics"]["worst_recall"] <= 1
    # A worker process of `refract score` comes from a clean server process, so it inherits no module.
    done = refract("score", bundle, trained / "images", "-o", "out.parquet", "--jobs", "1", *option)
    assert "36 rows" in done.stdout and not done.stderr.count("without a prediction")


def test_resume_and_rerun_use_the_copies_of_the_run(trained: Path, refract: Run, tmp_path: Path) -> None:
    shutil.copytree(trained / "photos", "photos")
    run = shutil.copytree(trained / "runs" / "first", tmp_path / "runs" / "first")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("workers: 1", "workers: 0")
    )  # a loader worker would import PyTorch anew
    assert "identical weights: yes" in refract("rerun", run).stdout
    shutil.rmtree(run / "bundle")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished": False}))
    refract("train", "--resume", run)
    assert load_bundle(run / "bundle").info.plugins[0]["name"] == "my_plugin.py"
    (run / "plugins" / "my_plugin.py").unlink()
    (run / "run.json").write_text(json.dumps(record | {"finished": False}))
    message = refract("train", "--resume", run, code=2).stderr
    assert f"plugin {run}/plugins/my_plugin.py: cannot be read" in message


def test_resume_auto_recognises_a_plugin_by_its_content(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(trained, "copy"))
    record = json.loads(Path("runs/first/run.json").read_text())
    Path("runs/first/run.json").write_text(json.dumps(record | {"finished": False}))
    assert unfinished(load_config("c.yaml"), "c") == Path("runs/first")
    Path("my_plugin.py").write_text(EXAMPLE + "\n# edited\n")
    assert unfinished(load_config("c.yaml"), "c") is None


def test_a_server_loads_only_the_plugins_of_its_option(trained: Path, warm: WarmProcess, tmp_path: Path) -> None:
    arguments = ["serve", str(trained / "runs" / "first" / "bundle"), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    refused = warm.run([*arguments, "--backend", "eager"], cwd=tmp_path, env=environment, seconds=100)
    assert refused.returncode == 2 and "needs the plugin my_plugin.py" in refused.stderr
    option = ["--plugin", str(trained / "my_plugin.py")]
    unknown = warm.run([*arguments, *option, "--backend", "mine"], cwd=tmp_path, env=environment, seconds=100)
    assert unknown.returncode == 2 and "'mine' is unknown" in unknown.stderr and "my-eager" in unknown.stderr
    process = warm.start([*arguments, *option, "--backend", "my-eager"], cwd=tmp_path, env=environment)
    with process.output:
        assert any(line.startswith("Refract serves first") for line in process.output)
        process.kill()
    process.wait(20)


def test_a_bundle_warns_of_a_plugin_with_other_content(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my_plugin.py").write_text(EXAMPLE + "\n# edited\n")
    load(["my_plugin.py"])
    load_bundle(trained / "runs" / "first" / "bundle").classifier()
    assert "the plugin my_plugin.py differs from the one that trained" in caplog.text


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import torch\n\n1 / 0\n", "bad.py, line 3: ZeroDivisionError: division by zero; correct it"),
        ("def f():\n    raise KeyError('x')\n\nf()\n", "bad.py, line 2: KeyError: 'x'"),
        ("def f(:\n", "bad.py, line 1: SyntaxError: invalid syntax"),
        ("raise SystemExit\n", "bad.py, line 1: SystemExit; correct it"),
        (
            "from refract.plugins import network\n\n@network\ndef lenet5(num_classes, *, image_size): ...\n",
            "bad.py, line 3: the network 'lenet5' exists already, in refract.models.architectures.lenet; "
            "rename the network of bad.py",
        ),
        (
            "from refract.plugins import metric\n\n@metric\ndef nll(probabilities, truth): ...\n",
            "the metric 'nll' exists already, in refract.pipeline.evaluation",
        ),
        ("from refract.plugins import op\n\n@op\ndef Shift(): ...\n", "expected a class derived from"),
        ("from refract.plugins import backend\n\nbackend(3)\n", "got 3; expected a refract.serve"),
    ],
)
def test_a_broken_plugin_gives_one_line_with_file_and_line(
    code: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text(code)
    assert main(["ops", "--plugin", "bad.py"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere.py", "plugin nowhere.py: cannot be read: No such file or directory; a path is relative to"),
        ("my-ops.py", "'my-ops' is not the name of a Python module; rename the file"),
        ("no.such.module", "plugin no.such.module: expected a path that ends in .py, the name of a module"),
    ],
)
def test_a_missing_plugin_is_named(entry: str, message: str) -> None:
    with pytest.raises(PluginError, match=re.escape(message)):
        load([entry])


METRIC = "from refract.plugins import metric\n\n@metric\ndef {name}(probabilities, truth):\n    return {value}\n"


def test_two_plugins_with_one_name_are_refused_with_both_origins(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(METRIC.format(name="same", value=1))
    with pytest.raises(PluginError) as raised:
        load(["a.py", "b.py"])
    assert f"{tmp_path / 'b.py'}, line 3: the metric 'same' exists already, in {tmp_path / 'a.py'}" in str(raised.value)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.py").write_text(METRIC.format(name="other", value=1))
    with pytest.raises(PluginError, match=r"two plugins are called a.py: .*folder/a.py; rename one"):
        load(["folder/a.py"])


def test_an_edited_file_replaces_its_entries_and_a_failed_one_leaves_none(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    truth, probabilities = np.zeros(2, int), np.ones((2, 2), np.float32)
    for value in (1, 2):
        file.write_text(METRIC.format(name="mine", value=value))
        load(["m.py", "m.py"])
        assert custom_metrics(probabilities, truth) == {"mine": value}
    file.write_text(METRIC.format(name="mine", value=3) + "1 / 0\n")
    with pytest.raises(PluginError, match="m.py, line 6: ZeroDivisionError"):
        load(["m.py"])
    assert not custom_metrics(probabilities, truth)


def test_a_failing_metric_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in {"whole": "1", "broken": "1 / 0", "empty": "float('nan')"}.items():
        (tmp_path / f"{name}.py").write_text(METRIC.format(name=name, value=value))
        load([f"{name}.py"])
    assert custom_metrics(np.ones((2, 2), np.float32), np.zeros(2, int)) == {"whole": 1}
    assert "the metric broken is skipped: it raised ZeroDivisionError" in caplog.text
    assert "the metric empty is skipped: it returned nan" in caplog.text


def test_modules_and_entry_points_are_loaded_only_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "extra_metrics-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "extra_metrics.py").write_text(METRIC.format(name="installed", value=1))
    (tmp_path / "site" / "extra_metrics-1.0.dist-info" / "METADATA").write_text("Name: extra-metrics\nVersion: 1.0\n")
    (tmp_path / "site" / "extra_metrics-1.0.dist-info" / "entry_points.txt").write_text(
        "[refract.plugins]\nextra = extra_metrics\n"
    )
    (tmp_path / "site" / "broken_package").mkdir()
    (tmp_path / "site" / "broken_package" / "__init__.py").write_text("\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(PluginError, match="plugin broken_package.ops: .*__init__.py, line 2: ZeroDivisionError"):
        load(["broken_package.ops"])
    load([])
    assert plugins.provider("metric", "installed") is None
    load(["extra"])
    loaded = plugins.provider("metric", "installed")
    assert loaded is not None and loaded.name == "extra" and loaded.path.endswith("site/extra_metrics.py")


def test_a_config_finds_its_plugins_next_to_itself(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "c.yaml").write_text("plugins: [mine.py, package.module]\n")
    (tmp_path / "mine.py").touch()
    assert load_config("project/c.yaml").plugins == (str(tmp_path / "mine.py"), "package.module")
    (tmp_path / "project" / "mine.py").touch()
    assert load_config("project/c.yaml").plugins[0] == str(tmp_path / "project" / "mine.py")
    assert load_config(None, ["--plugins", "[mine.py]"]).plugins == (str(tmp_path / "mine.py"),)
    assert "plugins" not in load_config(None).to_dict()
    (tmp_path / "empty.yaml").write_text("plugins:\n")
    with pytest.raises(ConfigError, match=r"^empty.yaml: plugins: the list is empty"):
        load_config("empty.yaml")


def test_a_retraining_run_stores_copies_and_resumes_only_with_the_same_content(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(METRIC.format(name="mine", value=1))
    (tmp_path / "c.yaml").write_text("plugins: [m.py]\ntracking: {model_name: m}\n")
    folder = begin(load_config("c.yaml"), force=False)
    assert run_config(folder).plugins == (str(folder.absolute() / "plugins" / "m.py"),)
    assert worth_resuming(folder, load_config("c.yaml"))
    (tmp_path / "m.py").write_text(METRIC.format(name="mine", value=2))
    assert not worth_resuming(folder, load_config("c.yaml"))


def test_an_unknown_loss_is_refused_before_the_plugins_only_without_plugins() -> None:
    with pytest.raises(ConfigError, match=r"loss.name: 'hinge' is not one of auto, .*needs the key plugins"):
        load_config(None, ["--loss.name", "hinge"])
    Path("a.py").write_text(
        "from refract.plugins import loss\n\n@loss\ndef hinge(logits, targets):\n    return logits[:, 0]\n"
    )
    config = load_config(None, ["--loss.name", "hinge", "--plugins", "[a.py]"])
    with pytest.raises(ConfigError, match=r"the config: loss.name: 'hinge' is not one of auto, "):
        check_loss(config, "the config")
    load(config.plugins)
    check_loss(config, "the config")
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"loss 'hinge' returned the shape \(2,\): expected \(2, 3\)"):
        classification_loss(logits, torch.tensor([0, 1]), task="multiclass", name="hinge")


def test_a_command_runs_after_the_option_and_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_plugin.py").write_text(EXAMPLE)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a-1.png").touch()
    assert main(["--plugin", "my_plugin.py", "count-images", "photos"]) == 0
    assert capsys.readouterr().out == "1\n"
    assert main(["--plugin", "my_plugin.py", "count-images", "--quiet", "photos"]) == 0, "as each command"
    assert capsys.readouterr().out == "1\n"
    assert main(["--plugin=my_plugin.py", "--help"]) == 0
    assert "Plugins:\n  count-images  Count the PNG images of a folder." in capsys.readouterr().out
    (tmp_path / "clash.py").write_text("from refract.plugins import command\n\n@command\ndef train(arguments): ...\n")
    assert main(["--plugin", "clash.py", "train", "c.yaml"]) == 2
    assert (
        "clash.py, line 3: the command 'train' exists already, in refract.pipeline.cli.train" in capsys.readouterr().err
    )
    assert main(["--plugin"]) == 2
    capsys.readouterr()
    assert main(["--plugin", "my_plugin.py", "train", "c.yaml"]) == 2
    assert (
        "train is not a command of these plugins; use `refract train --plugin FILE …`, or the key plugins"
        in capsys.readouterr().err
    )


def test_a_failing_source_is_named_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(
        "from refract.plugins import source\n\n@source\ndef shop(text):\n    raise OSError(text)\n"
    )
    load(["s.py"])
    with pytest.raises(DataError, match=r"data.source: shop:cats: the plugin's source shop raised OSError: cats"):
        load_manifest("shop:cats")


def test_the_entries_work_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "my_plugin.py").write_text(EXAMPLE)
    load(["my_plugin.py"])
    names = ("Solarise", "TinyNet", "hinge", "worst_recall", "listed", "count_images")
    assert all(callable(vars(sys.modules["refract_plugin_my_plugin"])[name]) for name in names), "decorated, and usable"
    augmenter = Augmenter([{"Solarise": {"threshold": 100}}])
    pixels = np.array([[[50, 100, 200]]], np.uint8)
    assert augmenter(pixels, epoch=0, index=0).tolist() == [[[50, 155, 55]]]
    network = build("TinyNet", 3, image_size=(16, 16), width=4)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    value = classification_loss(torch.zeros(2, 3), torch.tensor([0, 1]), task="multiclass", name="hinge")
    assert float(value) == 3


def test_a_loss_declares_tasks_and_reduction_and_gets_its_arguments() -> None:
    Path("a.py").write_text(
        "from refract.plugins import loss\n\n@loss(tasks=('multiclass',), reduction='mean')\n"
        "def flat(logits, targets, *, gamma, scale=1.0):\n    return logits * 0 + scale * gamma\n"
    )
    load(["a.py"])
    logits = torch.zeros(2, 3)
    assert float(classification_loss(logits, torch.tensor([0, 1]), task="multiclass", name="flat", gamma=5.0)) == 5.0
    assert "flat" in losses_of("multiclass") and "flat" not in losses_of("multilabel")
    with pytest.raises(ValueError, match="loss='flat' does not support the task multilabel"):
        classification_loss(logits, torch.zeros(2, 3), task="multilabel", name="flat")
    Path("b.py").write_text(
        "from refract.plugins import loss\n\n@loss(tasks=('ranking',))\ndef other(logits, targets):\n    return logits\n"
    )
    with pytest.raises(PluginError, match=r"b.py.*tasks=\('ranking',\): expected some of"):
        load(["b.py"])
