"""The search: spaces as users write them, and studies that resume, prune, and end with a config that trains."""

import json
from pathlib import Path

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from small_data import Run

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.labels.decisions import Decision
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.training.run_directory import run_lock
from refract.pipeline.tuning.space import applies, read_space, with_values
from refract.pipeline.tuning.study import Search, _narrowed, open_study, trial_folder, with_decisions

CONFIG = """
data: {source: images, image_size: 24, workers: 0, batch_size: 16}
model: {name: mlp, args: {hidden: [16]}}
augment: {policy: [{Affine: {degrees: 10}}, HorizontalFlip]}
trainer: {max_epochs: 2, device: cpu, precision: fp32}
tracking: {model_name: null}
evaluation: {robustness: none}
"""
SPACE = """
optim.name: [adamw, sgd]
optim.lr: {low: 1e-5, high: 1e-1, log: true}
optim.momentum: {low: 0.5, high: 0.99, when: {optim.name: sgd}}
augment.policy.0.Affine.degrees: {low: 1, high: 30, whole: true}
"""


def space_of(tmp_path: Path, text: str):
    (tmp_path / "s.yaml").write_text(text)
    return read_space(tmp_path / "s.yaml")


def test_a_space_is_read_with_its_conditions(tmp_path: Path) -> None:
    name, rate, momentum, degrees = space_of(tmp_path, SPACE)
    assert name.choices == ("adamw", "sgd") and (rate.low, rate.high, rate.log) == (1e-5, 0.1, True)
    assert applies(momentum, {"optim.name": "sgd"}) and not applies(momentum, {"optim.name": "adamw"})
    assert degrees.whole and degrees.key == "augment.policy.0.Affine.degrees"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected config keys"),
        ("optim.lr: 3", "is not a list of values, or"),
        ("optim.lr: []", "is not a list of plain values"),
        ("optim.lr: {low: 1, high: 0}", "low must be below high"),
        ("optim.lr: {low: 0, high: 1, log: true}", "above 0 for log"),
        ("optim.lr: {low: 0, high: 1, step: 2}", "is not a list of values, or"),
        ("data.batch_size: {low: 1.5, high: 3, whole: true}", "whole needs integers"),
        ("optim.momentum: {low: 0, high: 1, when: {optim.name: sgd}}", "is not an earlier key of the space"),
        (
            "optim.name: [sgd]\noptim.lr: {low: 1, high: 2, when: {optim.name: sdg}}",
            "is not a choice of optim.name",
        ),
        ("optim.lr: {low: .nan, high: 1}", "is not a list of values, or"),
    ],
)
def test_mistakes_in_a_space_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(tmp_path, text)


def test_values_go_into_lists_and_ops_and_leave_the_config_alone() -> None:
    config = {"augment": {"policy": [{"Affine": None}, "HorizontalFlip"]}, "optim": {"lr": 1}}
    trial_config = with_values(
        config,
        {"augment.policy.0.Affine.degrees": 7, "augment.policy.1": "VerticalFlip", "optim.lr": 2},
    )
    assert trial_config == {"augment": {"policy": [{"Affine": {"degrees": 7}}, "VerticalFlip"]}, "optim": {"lr": 2}}
    assert config == {"augment": {"policy": [{"Affine": None}, "HorizontalFlip"]}, "optim": {"lr": 1}}
    for key in ("augment.policy.5", "augment.policies.0", "optim.lr.x", "augment.policy.1.p"):
        with pytest.raises(ConfigError, match="the config has"):
            with_values(config, {key: 1})


@given(st.lists(st.floats(1e-4, 1.0), max_size=6))
def test_the_fine_range_lies_in_the_coarse_one_and_holds_the_best(values: list[float]) -> None:
    from refract.pipeline.tuning.space import Dimension

    low, high = _narrowed(Dimension("x", low=1e-4, high=1.0), values)
    assert 1e-4 <= low < high <= 1.0 and all(low <= value <= high for value in values if len(set(values)) > 1)


def test_an_unusable_storage_is_named(tmp_path: Path) -> None:
    space = space_of(tmp_path, "optim.lr: [1, 2]")
    with pytest.raises(ConfigError, match="--storage: nonsense cannot be used"):
        open_study(Search("s", "tpe", 3, None, "nonsense", 0), space, Config(), tmp_path)
    search = Search("s", "random", 3, None, f"journal:{tmp_path}/j.log", 0)
    journal = open_study(search, space, Config(), tmp_path)
    assert journal.trials == []
    with pytest.raises(ConfigError, match="the space of the search s differs from that of its 0 trials"):
        open_study(search, space_of(tmp_path, "optim.lr: [1, 3]"), Config(), tmp_path)


def test_a_trial_that_was_killed_is_drawn_anew(tmp_path: Path) -> None:
    space = space_of(tmp_path, "optim.lr: [1, 2]")
    search = Search("s", "grid", 9, None, f"sqlite:///{tmp_path}/s.db", 0)
    study = open_study(search, space, Config(), tmp_path)
    for _ in range(2):
        trial = study.ask()
        trial.suggest_categorical("optim.lr", (1, 2))
        trial_folder(tmp_path, trial.number).mkdir()
    with run_lock(trial_folder(tmp_path, 0)):  # one lives, the other is gone
        again = open_study(search, space, Config(), tmp_path)
    assert [trial.state.name for trial in again.trials] == ["RUNNING", "FAIL", "WAITING"]
    assert again.trials[2].system_attrs["fixed_params"] == again.trials[1].params


def test_a_resumed_search_ignores_later_decisions_on_labels(tmp_path: Path) -> None:
    history = LabelHistory(tmp_path / "labels.db", create=True)
    config, space = (
        Config().changed({"data.labels": str(tmp_path / "labels.db")}),
        space_of(tmp_path, "optim.lr: [1, 2]"),
    )
    search = Search("s", "random", 3, None, f"journal:{tmp_path}/j.log", 0)
    first = with_decisions(open_study(search, space, config, tmp_path), config)
    history.append(Decision(content="0" * 64, path="x.png", action="relabel", labels=("dog",), reviewer="ann"))
    resumed = with_decisions(open_study(search, space, config, tmp_path), config)
    assert first.data.labels == resumed.data.labels == f"{tmp_path}/labels.db@0"


@pytest.mark.slow
def test_a_search_goes_on_and_its_best_config_trains(refract: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "s.yaml").write_text(SPACE)
    printed = refract("tune", "c.yaml", "s.yaml", "--trials", 2, "--sampler", "coarse-to-fine")
    assert "best: trial" in printed.stdout and "refract train runs/tune-c/best.yaml" in printed.stdout
    printed = refract("tune", "c.yaml", "s.yaml", "--trials", 4, "--workers", 2)
    assert "resuming c: 2 trials so far" in printed.stderr
    study = optuna.load_study(study_name="c", storage=f"sqlite:///{tmp_path}/runs/tune-c/study.db")
    assert 4 <= len(study.trials) <= 5, "two processes may begin the last at once"
    drawn = study.best_trial.user_attrs["drawn"]
    best = yaml.safe_load((tmp_path / "runs" / "tune-c" / "best.yaml").read_text())
    assert best["optim"]["lr"] == drawn["optim.lr"]
    assert best["augment"]["policy"][0]["Affine"]["degrees"] == drawn["augment.policy.0.Affine.degrees"]
    assert all(("optim.momentum" in t.params) == (t.params["optim.name"] == "sgd") for t in study.trials)
    html = (tmp_path / "runs" / "tune-c" / "report.html").read_text()
    assert "Importance of each key" in html or len({t.value for t in study.trials}) < 4
    assert html.count("data:image/png") >= 3 and "http" not in html.replace("http-equiv", "")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("refract").experiment_id], max_results=100)
    (parent,) = [run for run in runs if run.info.run_name == "tune-c"]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(nested) == len(study.trials) and all("optim.lr" in run.data.params for run in nested)
    refract("train", "runs/tune-c/best.yaml", "--trainer.run_name", "won", "--trainer.max_epochs", 1)


@pytest.mark.slow
def test_a_grid_is_gone_through_once_and_what_explodes_is_given_up(refract: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.replace("model_name: null", "enabled: false"))
    (tmp_path / "s.yaml").write_text("optim.lr: [1e-3, 1e3]\noptim.name: [sgd]\nloss.label_smoothing: [0, 0.1]\n")
    printed = refract("tune", "c.yaml", "s.yaml", "--sampler", "grid").stderr
    study = optuna.load_study(study_name="c", storage=f"sqlite:///{tmp_path}/runs/tune-c/study.db")
    assert len({json.dumps(t.params, sort_keys=True) for t in study.trials}) == 4 == len(study.trials)
    pruned = {t.params["optim.lr"] for t in study.trials if t.state == optuna.trial.TrialState.PRUNED}
    assert 1e3 in pruned and (
        "its loss is not finite" in printed or "times its first" in printed or "its score is low" in printed
    )
    wrong = "optim.momentum: {low: 0, high: 0.9, when: {optim.name: sgd}}\n"
    (tmp_path / "s.yaml").write_text("optim.name: [sgd, adam]\n" + wrong)
    printed = refract("tune", "c.yaml", "s.yaml", "--sampler", "grid", "--name", "g", code=2).stderr
    assert "a grid accepts no conditions" in printed
    (tmp_path / "s.yaml").write_text("optim.lrr: [1]\n")
    assert "no key 'optim.lrr'" in refract("tune", "c.yaml", "s.yaml", "--name", "h", code=2).stderr
