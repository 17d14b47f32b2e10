"""Each finding of the doctor appears for a training with that fault, and none for a healthy training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import COLORS, Run, make_image, write_image
from torch import nn

from refract.pipeline.cli.doctor import main
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.doctor.findings import late
from refract.pipeline.doctor.record import Record
from refract.pipeline.doctor.run import make_doctor
from refract.pipeline.doctor.stored import read_findings
from refract.pipeline.doctor.watch import Doctor
from refract.pipeline.training.fit import Assembly, assemble, fit

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

BASE: dict[str, Any] = {
    "data": {
        "workers": 0,
        "batch_size": 16,
        "image_size": 24,
        "normalize": "data",
        "val_fraction": 0.2,
        "test_fraction": 0.1,
    },
    "model": {"name": "cnn", "args": {"widths": [8, 16]}},
    "optim": {"lr": 0.01},
    "trainer": {"max_epochs": 2, "precision": "fp32", "device": "cpu"},
    "tracking": {"enabled": False},
    "evaluation": {"robustness": "none"},
}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    for label in COLORS:
        for number in range(40):
            write_image(root / label / f"{number:02}.png", make_image(label, number)[:, :24])
    return root


def assembled(colours: Path, *overrides: object, **sections: dict[str, Any]) -> Assembly:
    values = {name: {**section, **sections.get(name, {})} for name, section in BASE.items()}
    values["data"]["source"] = str(colours)
    for name, section in sections.items():
        values.setdefault(name, section)
    return assemble(config_from_dict(values, list(map(str, overrides))))


def finding_names(assembly: Assembly, tmp_path: Path, doctor: Doctor | None = None) -> set[str]:
    doctor = doctor or make_doctor(assembly)
    history = fit(assembly, tmp_path / "run", None, watchers=[doctor])
    return {finding.name for finding in doctor.findings(history)}


@pytest.mark.parametrize("name", ["cnn", "resnet20", "lenet5", "mlp", "fastnet"])
def test_a_healthy_training_gets_no_finding(name: str, colours: Path, tmp_path: Path) -> None:
    rate = {"lr": 0.002} if name != "fastnet" else {"name": "sgd", "lr": 0.1}
    side = 32 if name == "lenet5" else 24
    assembly = assembled(
        colours, model={"name": name, "args": {}}, augment={"policy": "cifar"}, data={"image_size": side}, optim=rate,
        trainer={"max_epochs": 6},
    )  # fmt: skip
    assert finding_names(assembly, tmp_path) == set()


def test_a_learning_rate_that_is_too_high_or_too_low(colours: Path, tmp_path: Path) -> None:
    tanh = {"model": {"name": "mlp", "args": {"hidden": [64, 64], "activation": "tanh"}}, "trainer": {"max_epochs": 15}}
    assembly = assembled(colours, "--optim.name", "sgd", "--optim.lr", 10, "--optim.warmup", 0.6, **tanh)
    assert "learning rate too high" in finding_names(assembly, tmp_path / "a")
    assembly = assembled(colours, "--optim.lr", 1e-7, **tanh)
    assert {"learning rate too low", "the loss does not fall"} & finding_names(assembly, tmp_path / "b")


def test_learning_rate_findings_from_recorded_losses() -> None:
    falling = [2.3 * 0.97**step + 0.1 for step in range(200)]
    assert not list(late(Record(10, 0.1, losses=falling)))
    risen = falling[:60] + [0.3 * 1.04**step for step in range(60)]
    (finding,) = late(Record(10, 0.1, losses=risen))
    assert finding.name == "learning rate too high" and "× in" in finding.evidence and "optim.lr: 0.01" in finding.cure
    (finding,) = late(Record(10, 0.1, losses=[2.3 - 0.0001 * step for step in range(200)]))
    assert finding.name == "the loss does not fall"
    crawl = [2.3 - 0.003 * step for step in range(200)]
    (finding,) = late(Record(10, 1e-4, losses=crawl, history=[{}] * 4))
    assert finding.name == "learning rate too low" and "optim.lr: 0.001" in finding.cure


def test_an_initial_loss_that_is_too_high(colours: Path, tmp_path: Path) -> None:
    assembly = assembled(colours, "--model.init", "large_gaussian", "--model.args", "{norm: none, widths: [8, 16]}")
    assert "initial loss" in finding_names(assembly, tmp_path)


def test_parameters_without_a_gradient(colours: Path, tmp_path: Path) -> None:
    assembly = assembled(colours)
    network = assembly.module.classifier.network
    network.register_parameter("forgotten", nn.Parameter(torch.ones(3)))
    assert "no gradient" in finding_names(assembly, tmp_path)


def test_inputs_out_of_range_and_a_policy_that_shifts_them(colours: Path, tmp_path: Path) -> None:
    assembly = assembled(colours, data={"normalize": "fixed", "mean": [0, 0, 0], "std": [0.01, 0.01, 0.01]})
    assert "input range" in finding_names(assembly, tmp_path / "a")
    assembly = assembled(colours, augment={"policy": [{"Brightness": {"factor": [3, 4]}}]})
    assert "augmentation shifts the images" in finding_names(assembly, tmp_path / "b")


def test_a_policy_similar_to_the_robustness_test(colours: Path, tmp_path: Path) -> None:
    assembly = assembled(colours, augment={"policy": [{"OneOf": {"ops": ["GaussianBlur", "HorizontalFlip"]}}]})
    doctor = make_doctor(assembly)
    assert "trained on corruptions" in finding_names(assembly, tmp_path, doctor)
    assert doctor.record.ops == ("OneOf", "GaussianBlur", "HorizontalFlip")


def test_vanishing_and_exploding_gradients(colours: Path, tmp_path: Path) -> None:
    deep = {"name": "mlp", "args": {"hidden": [32] * 12, "activation": "sigmoid"}}
    assembly = assembled(colours, "--model.init", "xavier_normal", model=deep)
    assert "vanishing gradient" in finding_names(assembly, tmp_path)
    layers = [f"l{k}" for k in range(6)]
    growing = {name: 10.0 ** (2 - 2 * k) for k, name in enumerate(layers)}
    assert [finding.name for finding in late(Record(3, 0.1, gradients=[growing]))] == ["exploding gradient"]
    assert not list(late(Record(3, 0.1, gradients=[dict.fromkeys(layers, 0.01)])))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_zero_head_is_not_a_vanishing_gradient(epochs: int, colours: Path, tmp_path: Path) -> None:
    """A new head on loaded weights starts at zero."""
    assembly = assembled(colours, model={"args": {"widths": [8, 16, 16, 16]}}, trainer={"max_epochs": epochs})
    head = [module for module in assembly.module.classifier.network.modules() if isinstance(module, torch.nn.Linear)][
        -1
    ]
    torch.nn.init.zeros_(head.weight)
    assert not {"vanishing gradient", "exploding gradient"} & finding_names(assembly, tmp_path)


def test_dead_and_saturated_units(colours: Path, tmp_path: Path) -> None:
    relu = {"name": "mlp", "args": {"hidden": [64, 64]}}
    assembly = assembled(colours, model=relu)
    with torch.no_grad():
        assembly.module.classifier.network.layers[0].bias.fill_(-1e3)
    assert "dead ReLUs" in finding_names(assembly, tmp_path / "a")
    tanh = {"name": "mlp", "args": {"hidden": [64, 64], "activation": "tanh"}}
    assembly = assembled(colours, "--model.init", "large_gaussian", model=tanh)
    assert "saturated units" in finding_names(assembly, tmp_path / "b")


def test_a_network_that_cannot_learn_one_batch(colours: Path, tmp_path: Path) -> None:
    assembly = assembled(colours, "--model.args", "{widths: [8, 16], dropout: 0.999}")
    assert "one batch is not learned" in finding_names(assembly, tmp_path)


def test_over_and_underfitting() -> None:
    def history(train: list[float], val: list[float], losses: list[float]) -> list[dict[str, float]]:
        rows = zip(train, val, losses, strict=True)
        return [{"train_accuracy": t, "val_accuracy": v, "val_loss": loss} for t, v, loss in rows]

    over = history([0.6, 0.8, 0.9, 0.97, 0.99], [0.6, 0.7, 0.72, 0.71, 0.7], [0.9, 0.8, 0.85, 1.0, 1.2])
    assert [finding.name for finding in late(Record(3, 0.1, history=over))] == ["overfitting"]
    under = history([0.3, 0.5, 0.55, 0.552, 0.553], [0.3, 0.5, 0.54, 0.55, 0.55], [1.5, 1.2, 1.1, 1.1, 1.1])
    assert [finding.name for finding in late(Record(3, 0.1, history=under))] == ["underfitting"]
    assert not list(late(Record(3, 0.1, soft=True, history=under))), "mixed targets are not counted right"
    well = history([0.6, 0.8, 0.9, 0.95, 0.97], [0.6, 0.8, 0.88, 0.93, 0.94], [0.9, 0.5, 0.4, 0.3, 0.3])
    assert not list(late(Record(3, 0.1, history=well)))


def test_class_collapse_and_a_slow_loader() -> None:
    (finding,) = late(Record(3, 0.1, said={"cat": 0.95, "dog": 0.05}, truth={"cat": 0.5, "dog": 0.5}))
    assert (
        finding.name == "class collapse"
        and "95% of the test predictions are cat, but only 50% of the labels are" in finding.evidence
    )
    assert not list(late(Record(3, 0.1, said={"cat": 0.95, "dog": 0.05}, truth={"cat": 0.93, "dog": 0.07})))
    slow = {"waiting": 80.0, "forward": 30.0, "backward": 50.0, "optimiser": 10.0}
    assert not list(late(Record(3, 0.1, seconds={part: value / 10 for part, value in slow.items()}, workers=0)))
    (finding,) = late(Record(3, 0.1, seconds=slow, workers=0))
    assert finding.name == "the loader is the bottleneck" and "data.workers: 2" in finding.cure
    (finding,) = late(Record(3, 0.1, seconds=slow, workers=4))
    assert "data.memory: always" in finding.cure and "with 4 worker processes" in finding.evidence


@pytest.mark.parametrize("share", [0.0, 0.15])
def test_randomly_wrong_labels(share: float, tmp_path: Path) -> None:
    """Train on colours, a fraction of which has another colour's label."""
    from refract.pipeline.training.run import train

    draw = np.random.default_rng(0)
    for label in COLORS:
        others = [other for other in COLORS if other != label]
        for number in range(150):
            given = others[draw.integers(2)] if draw.random() < share else label
            write_image(tmp_path / "data" / given / f"{label}{number:03}.png", make_image(label, number)[:, :24])
    values = {name: dict(section) for name, section in BASE.items()}
    values["data"] |= {"source": str(tmp_path / "data"), "test_fraction": 0.4}
    values["trainer"] |= {"runs_dir": str(tmp_path), "run_name": "r", "max_epochs": 6}
    train(config_from_dict(values))
    names = {finding.name for finding in read_findings(tmp_path / "r")[0]}
    assert ("label noise" in names) == (share > 0), names


def test_a_transfer_that_learned_nothing_and_its_cure(colours: Path, tmp_path: Path) -> None:
    """The second training ruins the weights of the first by its learning rate. The finding's first cure helps."""
    from refract.pipeline.training.run import train

    values = {name: dict(section) for name, section in BASE.items()}
    values["data"] |= {"source": str(colours), "test_fraction": 0.4}
    values["trainer"] |= {"runs_dir": str(tmp_path), "max_epochs": 3}
    train(config_from_dict(values, ["--trainer.run_name", "first"]))
    values["model"]["weights"] = str(tmp_path / "first" / "bundle")
    values["optim"] |= {"name": "sgd", "lr": 300.0}
    train(config_from_dict(values, ["--trainer.run_name", "ruined"]))
    findings = {finding.name: finding for finding in read_findings(tmp_path / "ruined")[0]}
    assert "the transfer learned nothing" in findings, findings
    for setting in findings["the transfer learned nothing"].cures[0]:
        section, key = setting.key.split(".")
        values[section][key] = setting.value
    result = train(config_from_dict(values, ["--trainer.run_name", "cured"]))
    assert result is not None and result.metrics["accuracy"] > 0.9
    assert "the transfer learned nothing" not in {finding.name for finding in read_findings(tmp_path / "cured")[0]}


def test_a_run_without_steps_has_no_line_of_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "doctor.json").write_text('{"findings": [], "record": {"seconds": {}}}')
    assert main([str(tmp_path)]) == 0 and capsys.readouterr().out == "no problem found\n"
    (tmp_path / "doctor.json").write_text('{"findings": [], "record": {"seconds": {"steps": 3.0, "waiting": 1.0}}}')
    assert main([str(tmp_path)]) == 0 and "time: steps 75%, waiting 25% of 4.0 s\n" in capsys.readouterr().out


def test_the_doctor_changes_no_weight(colours: Path, tmp_path: Path) -> None:
    def weights(watched: bool) -> torch.Tensor:
        assembly = assembled(colours, "--model.args", "{widths: [8, 16], dropout: 0.3}")
        watchers = [make_doctor(assembly)] if watched else []
        fit(assembly, tmp_path / str(watched), None, watchers=watchers)
        return torch.cat([value.float().flatten() for value in assembly.module.classifier.state_dict().values()])

    assert torch.equal(weights(True), weights(False))


def test_findings_go_to_the_console_the_run_and_the_report(refract: Run, colours: Path, tmp_path: Path) -> None:
    values = {name: dict(section) for name, section in BASE.items() if name != "tracking"}
    values["data"]["source"] = str(colours)
    values["trainer"] |= {"max_epochs": 6}
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    output = refract("train", "c.yaml", "--augment.policy", "[GaussianBlur]", "--trainer.run_name", "r").stderr
    assert output.count("doctor: trained on corruptions: the policy has GaussianBlur") == 1
    findings, record = read_findings(tmp_path / "runs" / "r")
    assert [finding.name for finding in findings] == ["trained on corruptions"] and len(record["losses"]) > 20
    shown = refract("doctor", "runs/r").stdout
    assert "trained on corruptions\n  seen:  the policy has GaussianBlur" in shown and "time: waiting" in shown
    html = (tmp_path / "runs" / "r" / "report.html").read_text()
    assert "<strong>trained on corruptions</strong>" in html
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    assert "GaussianBlur" in run.data.tags["doctor.trained on corruptions"]
    assert "has no doctor.json" in refract("doctor", tmp_path, code=2).stderr
    assert "give the run's folder, runs/r" in refract("doctor", "runs/r/bundle", code=2).stderr
