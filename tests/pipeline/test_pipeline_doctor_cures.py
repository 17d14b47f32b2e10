"""Cures are accepted by the run's config, findings of transfers, and each finding is logged once."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from refract.pipeline.config.config import config_from_dict
from refract.pipeline.doctor.findings import early, late
from refract.pipeline.doctor.record import Record
from refract.pipeline.doctor.watch import Doctor
from refract.pipeline.evaluation.label_errors import NoiseEvidence
from refract.pipeline.finding import Finding, Setting, cure, treatable

CONFIGS: dict[str, dict[str, Any]] = {
    "scratch": {"model": {"name": "cnn", "args": {"widths": [8, 16]}}},
    "init": {"model": {"name": "cnn", "init": "large_gaussian"}},
    "weights": {"model": {"name": "resnet18", "weights": "weights.pth"}, "optim": {"lr": 0.1}},
    "averaged": {"trainer": {"swa_start": 0.5}, "data": {"sampler": "balanced"}},
    "feature-extract": {
        "model": {"name": "resnet18", "weights": "default", "mode": "feature-extract"}, "data": {"mean": [0.1] * 3, "std": [0.5] * 3},
        "trainer": {"ema": 0.9, "patience": 3}, "optim": {"name": "sgd", "lr": 1.0, "clip_norm": 1.0},
    },
}  # fmt: skip

NOISE = NoiseEvidence(10, 500, 0.1, 0.15, 125, 18, 36, 4)


def records(base: Record) -> Iterator[Record]:
    """A record for each finding, with the config values of `base`."""
    layers = [f"l{k}" for k in range(6)]
    falling = [2.3 * 0.97**step + 0.1 for step in range(60)]
    rows = [{"train_accuracy": t, "val_accuracy": v, "val_loss": x} for t, v, x in
            [(0.6, 0.6, 0.9), (0.8, 0.7, 0.8), (0.9, 0.72, 0.9), (0.97, 0.71, 1.0), (0.99, 0.7, 1.2)]]  # fmt: skip
    flat = [{"train_accuracy": 0.5, "val_accuracy": 0.5, "val_loss": 1.0}] * 5
    even = {"cat": 0.5, "dog": 0.5}
    known = {name: getattr(base, name) for name in ("lr", "optimizer", "network", "args", "weights", "mode")}
    for more in (
        {"losses": [20.0]},
        {"unreached": ["head.weight"]},
        {"inputs": {"val": (5.0, 9.0)}},
        {"inputs": {"train": (1.5, 1.0), "val": (0.0, 1.0)}},
        {"ops": ("GaussianNoise",)},
        {"normalisation": ((0.1,) * 3, (0.5,) * 3), "weights_normalisation": ((0.485, 0.456, 0.406), (0.22,) * 3)},
        {"losses": falling + [0.3 * 1.04**step for step in range(80)]},
        {"losses": [2.3 - 0.0001 * step for step in range(200)]},
        {"losses": [2.3 - 0.003 * step for step in range(200)], "history": [{}] * 4},
        {"gradients": [{name: 10.0 ** (2 * k - 10) for k, name in enumerate(layers)}]},
        {"gradients": [{name: 10.0 ** (2 - 2 * k) for k, name in enumerate(layers)}]},
        {"dead": {"relu": 0.9}},
        {"saturated": {"tanh": 0.9}},
        {"history": rows},
        {"history": flat},
        {"said": {"cat": 0.95, "dog": 0.05}, "truth": even},
        {"noise": NOISE},
        {"seconds": {"waiting": 80.0, "forward": 30.0}},
        {"said": {"cat": 1.0}, "truth": even, "answered": 200, "wrong": 0.5},
        {"said": {"cat": 1.0}, "truth": even, "answered": 200, "wrong": 0.5, "losses": [0.7] * 20, "history": [{}] * 5},
        {"said": even, "truth": even, "answered": 200, "wrong": 0.5, "history": [{"train_accuracy": 0.99}]},
    ):  # fmt: skip
        yield Record(classes=10, **{**known, **more})


def findings_of(values: dict[str, Any]) -> tuple[Any, list[Finding]]:
    config = config_from_dict(values)
    model = config.model
    base = Record(
        10, config.optim.lr or 1e-3, config.optim.name, model.name, dict(model.args), model.weights, model.mode
    )
    return config, [finding for record in records(base) for finding in (*early(record), *late(record))]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_cure_is_accepted_by_the_runs_config_and_changes_it(name: str) -> None:
    config, findings = findings_of(CONFIGS[name])
    assert {"initial loss", "label noise", "overfitting", "class collapse", "dead ReLUs"} <= {f.name for f in findings}
    assert all(finding.advice for finding in findings), "words are left where the config accepts no cure"
    cures = {str(settings): settings for finding in findings for settings in finding.cures}
    combined_finding = treatable(Finding("all", "seen", "advice", tuple(cures.values())), config)
    assert len(combined_finding.cures) > len(cures) / 2
    for settings in combined_finding.cures:
        values = config.to_dict()
        for setting in settings:
            section, key = setting.key.split(".")
            values[section][key] = setting.value
            assert str(setting) in combined_finding.cure
        assert config_from_dict(values).to_dict() != config.to_dict(), settings


def test_cures_depend_on_the_initial_weights() -> None:
    _, findings = findings_of(CONFIGS["weights"])
    keys = {setting.key for finding in findings for settings in finding.cures for setting in settings}
    assert "model.init" not in keys, "loaded weights say how they begin"
    first = next(finding for finding in findings if finding.name == "initial loss")
    assert "model.mode: linear-then-fine-tune" in first.cure and "optim.lr: 0.0003" in first.cure
    config, findings = findings_of(CONFIGS["init"])
    first = next(treatable(finding, config) for finding in findings if finding.name == "initial loss")
    assert first.cure.startswith("set model.init: default or model.init: xavier_normal; ")


def test_a_cure_that_the_config_rejects_or_already_has_is_skipped() -> None:
    cures = (cure("trainer.patience", 3), cure("data.sampler", "balanced"), cure("optim.lr", 0.25))
    config = config_from_dict(CONFIGS["averaged"])
    finding = treatable(Finding("x", "seen", "advice", cures), config)
    assert finding.cure == "set optim.lr: 0.25; advice", (
        "patience excludes swa_start, and the sampler is balanced already"
    )
    assert treatable(Finding("x", "seen", "advice", cures[:2]), config).cure == "advice"


def test_findings_are_stored_and_read_again() -> None:
    finding = Finding("x", "seen", "advice", ((Setting("data.mean", None), Setting("data.std", None)),))
    assert Finding.from_dict(finding.to_dict()) == finding
    assert finding.cure == "set data.mean: null with data.std: null; advice"
    assert Finding.from_dict({"name": "x", "evidence": "seen", "cure": "as it was"}).cure == "as it was"


def test_a_transfer_that_learned_nothing_is_compared_with_chance() -> None:
    even = {"cat": 0.5, "dog": 0.5}

    def names(**more: Any) -> list[str]:
        values = {"weights": "w.pth", "said": even, "truth": even, "answered": 200, "wrong": 0.48} | more
        return [finding.name for finding in late(Record(2, 0.1, **values))]

    assert names() == ["the transfer learned nothing"]
    assert names(said={"cat": 1.0}, wrong=0.5) == ["the transfer learned nothing"], "not a class collapse as well"
    assert not names(wrong=0.35), "better than chance"
    assert not names(answered=10), "too few samples for a conclusion"
    assert not names(weights="none"), "no transfer"
    uneven = {"cat": 0.9, "dog": 0.1}
    assert names(said={"cat": 1.0}, truth=uneven, wrong=0.1) == ["the transfer learned nothing"], (
        "the majority's fraction"
    )
    assert not names(said=uneven, truth=uneven, wrong=0.02), "better than the majority"


def test_the_cure_of_a_failed_transfer_depends_on_the_record() -> None:
    even = {"cat": 0.5, "dog": 0.5}

    def words(**more: Any) -> str:
        values = {"lr": 3e-4, "weights": "w", "said": even, "truth": even, "answered": 200, "wrong": 0.5} | more
        (finding,) = (f for f in late(Record(2, **values)) if f.name == "the transfer learned nothing")
        return finding.cure

    assert words(lr=0.5).startswith("set optim.lr: 0.0003 or ")
    assert words(lr=1e-6, mode="feature-extract").startswith("set optim.lr: 0.003 or ")
    assert "trainer.max_epochs: 20" in words(losses=[0.7] * 20, history=[{}] * 5)
    assert words(history=[{"train_accuracy": 1.0}]).startswith("set model.mode: feature-extract or ")
    imagenet, other = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3)
    advice = words(normalisation=other, weights_normalisation=imagenet)
    assert advice.startswith("set data.mean: null with data.std: null or ")
    assert "data.mean: null" not in words(normalisation=imagenet, weights_normalisation=imagenet)


def test_each_finding_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    doctor = Doctor(Record(10, 0.1, losses=[20.0], ops=("GaussianNoise",)), config_from_dict({}))
    with caplog.at_level(logging.WARNING):
        doctor.report(early(doctor.record))
        doctor.record.noise = NOISE
        findings = doctor.findings([])
        doctor.report(findings)
    names = [finding.name for finding in findings]
    assert names == ["initial loss", "trained on corruptions", "label noise"]
    assert all(caplog.text.count(f"doctor: {name}") == 1 for name in names)
    resumed = Doctor(Record(10, 0.1), config_from_dict({}))
    resumed.load_state_dict(doctor.state_dict() | {"noise": None})
    caplog.clear()
    resumed.report(findings)
    assert "doctor" not in caplog.text, "a resumed run has reported them"
