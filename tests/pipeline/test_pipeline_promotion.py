"""The gate, on bundles of which one is made worse in one respect; and the commands that promote and roll back, on a real registry."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from small_data import COLORS, make_image, write_image

from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.retraining_sections import GateConfig
from refract.pipeline.tracking.aliases import aliases


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> str:
    return f"sqlite:///{shutil.copy(new_tracking, tmp_path_factory.mktemp('registry'))}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ and the bundle of a network that knows their three colours."""
    from refract.pipeline.config.config import config_from_dict
    from refract.pipeline.training.run import train

    root = tmp_path_factory.mktemp("gate")
    for label in COLORS:
        for number in range(40):
            write_image(root / "images" / label / f"{number:02}.jpg", make_image(label, number))
    values = {
        "data": {"source": str(root / "images"), "image_size": 16, "workers": 0},
        "augment": {"policy": "none"},
        "model": {"name": "lenet5"},
        "optim": {"lr": 0.01},
        "trainer": {"max_epochs": 6, "runs_dir": str(root / "runs"), "run_name": "r"},
        "evaluation": {"robustness": "none"},
        "tracking": {"enabled": False},
    }
    result = train(config_from_dict(values))
    assert result is not None
    assert result.metrics["accuracy"] > 0.9
    return root


def altered(trained: Path, tmp_path: Path, **changes: Any) -> Any:
    """A bundle as the trained one, but for its info, or, with `deaf`, a class that it never gives."""
    from refract.models.bundle.bundle import load_bundle, save_bundle

    bundle = load_bundle(trained / "runs/r/bundle")
    classifier = bundle.classifier()
    if (label := changes.pop("deaf", None)) is not None:
        from refract.models.head import head_of

        with torch.no_grad():
            head_of(classifier.network).bias[bundle.info.labels.index(label)] -= 1000
    path = tmp_path / "altered"
    save_bundle(path, replace(bundle.info, **changes), classifier, [])
    return load_bundle(path)


def verdict(trained: Path, challenger: Any, champion: Any, **config: Any) -> dict[str, Any]:
    from refract.pipeline.data.manifest import load_manifest
    from refract.pipeline.retraining.gate import gate

    config = {"robustness_loss": None, "latency_ratio": None, "calibration_error": None} | config
    manifest = load_manifest(trained / "images")
    result = gate(GateConfig(**config), challenger, champion, manifest, "h")
    return {line.name: line for line in result.lines} | {"passed": result.passed, "text": result.text()}


def test_the_gate_passes_an_equal_challenger_and_reports_its_values(trained: Path, tmp_path: Path) -> None:
    from refract.models.bundle.bundle import load_bundle

    champion = load_bundle(trained / "runs/r/bundle")
    outcome = verdict(trained, altered(trained, tmp_path), champion, robustness_loss=0.1, latency_ratio=50.0)
    assert outcome["passed"], outcome["text"]
    assert outcome["margin"].value == 0
    assert outcome["robustness"].value == 0
    assert 0.1 < outcome["latency_ratio"].value < 10, "one network twice"
    assert not verdict(trained, champion, champion, latency_ratio=0.01)["latency_ratio"].passed
    assert not verdict(trained, champion, champion, margin=0.01)["margin"].passed
    first = verdict(trained, champion, None)
    assert first["passed"]
    assert "no champion" in first["margin"].summary


def test_a_class_that_is_never_predicted_fails(trained: Path, tmp_path: Path) -> None:
    from refract.models.bundle.bundle import load_bundle

    champion = load_bundle(trained / "runs/r/bundle")
    worse = altered(trained, tmp_path, deaf="red")
    outcome = verdict(trained, worse, champion)
    failed = {name for name, line in outcome.items() if name not in ("passed", "text") and not line.passed}
    assert failed == {"margin", "interval", "recall red"}
    assert outcome["recall red"].value == 0
    assert outcome["margin"].value == pytest.approx(-1 / 3, abs=0.05)
    assert "FAILED  recall red" in outcome["text"]
    assert verdict(trained, champion, worse)["passed"], "the other way round it is a gain"
    alone = verdict(trained, worse, None, recall=0.5)
    assert not alone["recall"].passed
    assert verdict(trained, worse, None, recall_of={"blue": 0.5})["passed"]
    assert not verdict(trained, worse, None, recall_of={"red": 0.5})["recall red"].passed
    with pytest.raises(ConfigError, match="'purple' is not a class"):
        verdict(trained, worse, None, recall_of={"purple": 0.5})


def test_limits_of_calibration_size_latency_and_labels(trained: Path, tmp_path: Path) -> None:
    from refract.models.bundle.bundle import load_bundle

    champion = load_bundle(trained / "runs/r/bundle")
    vague = altered(trained, tmp_path, temperature=champion.info.temperature * 200)
    assert verdict(trained, champion, None, calibration_error=0.3)["passed"]
    assert not verdict(trained, vague, None, calibration_error=0.3)["calibration_error"].passed
    for name, limit in (
        ("size", {"size_mb": 1e-4}),
        ("latency", {"latency_ms": 1e-6}),
        ("accuracy", {"accuracy": 1.0}),
    ):
        outcome = verdict(trained, altered(trained, tmp_path / name, deaf="red"), None, **limit)
        assert not outcome[name].passed, name
    other = altered(trained, tmp_path / "labels", labels=("blue", "green", "scarlet"))
    outcome = verdict(trained, other, champion)
    assert not outcome["labels"].passed
    assert "red" in outcome["labels"].summary
    assert outcome["recall red"].value == 0, "a prediction that the holdout does not have is wrong"


def test_the_commands_promote_and_roll_back(
    trained: Path, registry: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from refract.cli import main

    client = MlflowClient(registry, registry)
    client.create_registered_model("colors")
    for _ in range(2):
        client.create_model_version("colors", source=(trained / "runs/r/bundle").as_uri())
    client.create_model_version("colors", source=(trained / "images").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)

    def printed(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        streams = capsys.readouterr()
        return streams.out + streams.err

    assert "--why" in printed("promote", "colors", 1, "--force", code=2)
    assert "was not compared by a gate" in printed("promote", "colors", 1, code=2)
    assert "is now version 1" in printed("promote", "colors", 1, "--force", "--why", "the first one")
    printed("promote", "colors", 2, "--force", "--why", "seen by hand")
    assert client.get_model_version("colors", "2").tags["promotion.why"] == "seen by hand"
    assert aliases(client, "colors") == {"champion": "2", "previous": "1"}
    assert "version 1 again" in printed("rollback", "colors")
    assert aliases(client, "colors") == {"champion": "1", "previous": "2"}
    client.set_model_version_tag("colors", "2", "gate", "passed")
    client.set_model_version_tag("colors", "2", "gate.against", "7")
    assert "did not pass the gate against the present champion (version 1)" in printed(
        "promote", "colors", 2, code=2
    ), "it was another champion"
    client.set_model_version_tag("colors", "2", "gate.against", "1")
    assert "is now version 2" in printed("promote", "colors", 2)
    assert "no registered model" in printed("rollback", "colours", code=2)
    assert "no version 7" in printed("promote", "colors", 7, "--force", "--why", "x", code=2)
    assert "a bundle?" in printed("promote", "colors", 3, "--force", "--why", "x", code=2), "it is not a bundle"
    assert aliases(client, "colors")["champion"] == "2"

    assert "is already version 2" in printed("promote", "colors", "02", "--why", "seen again")
    assert aliases(client, "colors") == {"champion": "2", "previous": "1"}, "02 is the same version"
    assert client.get_model_version("colors", "2").tags["promotion.why"] == "seen again"
    assert "version 'latest': expected a number" in printed("promote", "colors", "latest", code=2)
    assert "has 5,000 characters, at most 4,000 are accepted" in printed(
        "promote", "colors", 2, "--why", "x" * 5000, code=2
    )
    client.set_registered_model_alias("colors", "previous", "3")
    assert "a bundle?" in printed("rollback", "colors", code=2), "the restored bundle must load"
    client.create_model_version("colors", source=(trained / "nowhere").as_uri())
    client.set_registered_model_alias("colors", "previous", "4")
    assert "version 4 cannot be downloaded" in printed("rollback", "colors", code=2)
    assert aliases(client, "colors") == {"champion": "2", "previous": "4"}
