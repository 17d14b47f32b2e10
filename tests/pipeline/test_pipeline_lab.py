"""The lab's claims hold, and a claim that does not hold is reported."""

import pytest

from refract.pipeline.cli import lab
from refract.pipeline.lab import experiments
from refract.pipeline.lab.experiment import Experiment, Outcome

LONG = ("overfitting", "activations", "zero-centred", "noise", "batch-norm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in experiments()])
def test_every_claim_holds_with_the_default_seed(name: str) -> None:
    outcome = experiments()[name].run(0)
    assert outcome.holds, outcome.summary
    assert outcome.summary and not outcome.summary.endswith(".")


@pytest.mark.slow
def test_a_claim_that_does_not_hold_ends_with_1_and_is_named(monkeypatch, capsys, tmp_path) -> None:
    wrong = Experiment(
        "Water runs uphill.", lambda seed: Outcome(False, "it ran down", {"height": [2.0, 1.0]}, "time", "height")
    )
    monkeypatch.setattr(lab, "experiments", lambda: {**experiments(), "water": wrong})
    assert lab.main(["water", "mlp-xor", "--plots", str(tmp_path / "plots")]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT HOLD: Water runs uphill." in printed and "holds: With one hidden layer" in printed
    assert printed.endswith("1 of 2 claims did not hold with seed 0: water\n")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["mlp-xor.png", "water.png"]


def test_an_unknown_experiment_is_rejected(capsys) -> None:
    assert lab.main(["perceptrn"]) == 2
    assert "did you mean perceptron?" in capsys.readouterr().err
