"""Aliases that always name a valid champion, on a real registry; and the gate, on bundles of which one is made worse in one respect."""

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from small_data import COLORS, picture, write_picture

from pipeline.config import ConfigError
from pipeline.retraining.aliases import Busy, PromotionError, aliases, promote, rollback
from pipeline.retraining.settings import GateConfig


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> str:
    return f"sqlite:///{shutil.copy(new_tracking, tmp_path_factory.mktemp('registry'))}"


@pytest.fixture
def model(registry: str, request: pytest.FixtureRequest) -> tuple[MlflowClient, str]:
    """A registered model with the versions 1 to 3, of which 1 is champion."""
    client, name = MlflowClient(registry, registry), request.node.name.replace("[", "-").replace("]", "")
    client.create_registered_model(name)
    for _ in range(3):
        client.create_model_version(name, source="file:///nowhere")
    client.set_registered_model_alias(name, "champion", "1")
    return client, name


class Dies(Exception):
    pass


class Mortal:
    """A client whose process ends at its n-th request, before it or after it."""

    def __init__(self, client: MlflowClient, at: int, *, after: bool) -> None:
        self._client, self._left, self._after = client, at, after

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            if self._left < 0:
                raise Dies  # a dead process tidies nothing up
            self._left -= 1
            if self._left < 0 and not self._after:
                raise Dies
            found = value(*args, **options)
            if self._left < 0:
                raise Dies
            return found

        return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_champion_is_named_at_every_instant_of_a_promotion(
    model: tuple[MlflowClient, str], after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = model
    monkeypatch.setattr("pipeline.retraining.aliases.STALE_S", 0.0)  # the dead one's lock
    seen = set()
    for at in range(30):
        client.set_registered_model_alias(name, "champion", "1")
        client.set_registered_model_alias(name, "previous", "3")
        try:
            promote(Mortal(client, at, after=after), name, "2", instead_of="1")
        except Dies:
            now = aliases(client, name)
            assert (now["champion"], now["previous"]) in {("1", "3"), ("1", "1"), ("2", "1")}
            seen.add((now["champion"], now["previous"]))
            promote(client, name, "2", instead_of="1")  # the resumed night
            assert aliases(client, name)["champion"] == "2"
            assert aliases(client, name)["previous"] == "1"
        else:
            break
    else:
        pytest.fail("it never came to its end")
    assert seen == {("1", "3"), ("1", "1"), ("2", "1")}, "every instant was tried"


def test_rollback_goes_back_and_forth_and_survives_its_death(
    model: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = model
    monkeypatch.setattr("pipeline.retraining.aliases.STALE_S", 0.0)
    with pytest.raises(PromotionError, match="no version is known to go back to"):
        rollback(client, name)
    promote(client, name, "2", instead_of="1")
    assert rollback(client, name) == ("1", "2")
    assert aliases(client, name) == {"champion": "1", "previous": "2"}
    assert "rolled_back" in client.get_model_version(name, "2").tags
    assert rollback(client, name) == ("2", "1")
    for at in range(30):
        client.set_registered_model_alias(name, "champion", "2")
        client.set_registered_model_alias(name, "previous", "1")
        try:
            rollback(Mortal(client, at, after=True), name)
        except Dies:
            now = aliases(client, name)
            assert now in ({"champion": champion, "previous": previous} for champion, previous in ("21", "11", "12"))
        else:
            break


def test_a_comparison_with_another_champion_counts_for_nothing(model: tuple[MlflowClient, str]) -> None:
    client, name = model
    promote(client, name, "2", instead_of="1")
    with pytest.raises(PromotionError, match="the champion is version 2 by now"):
        promote(client, name, "3", instead_of="1")
    assert aliases(client, name) == {"champion": "2", "previous": "1"}
    with pytest.raises(PromotionError, match="no version 9"):
        promote(client, name, "9", instead_of="2")
    with pytest.raises(PromotionError, match="no registered model"):
        aliases(client, "unheard-of")


def test_of_concurrent_promoters_one_wins(model: tuple[MlflowClient, str], registry: str) -> None:
    client, name = model
    told: dict[str, str] = {}
    start = threading.Barrier(2)

    def move(version: str) -> None:
        own = MlflowClient(registry, registry)
        start.wait()
        try:
            promote(own, name, version, instead_of="1")
            told[version] = "won"
        except PromotionError as error:
            told[version] = str(error)

    threads = [threading.Thread(target=move, args=(version,)) for version in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [version for version, words in told.items() if words == "won"]
    assert len(winners) == 1
    assert aliases(client, name) == {"champion": winners[0], "previous": "1"}
    assert "by now" in next(words for words in told.values() if words != "won"), "it waited for its turn"


def hold(client: MlflowClient, name: str, holder: str) -> None:
    client.create_registered_model(f"{name}.promoting", tags={"holder": holder})


def locks(client: MlflowClient, name: str) -> list[str]:
    return [model.tags["holder"] for model in client.search_registered_models() if model.name == f"{name}.promoting"]


def test_a_lock_is_kept_by_the_living_alone(model: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch) -> None:
    client, name = model
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    hold(client, name, f"{platform.node()} {dead.pid} x")
    monkeypatch.setattr("pipeline.retraining.aliases.SETTLE_S", 0.0)
    promote(client, name, "2", instead_of="1")

    monkeypatch.setattr("pipeline.retraining.aliases.STALE_S", 0.3)
    hold(client, name, f"{platform.node()} {os.getppid()} x")
    began = time.monotonic()
    promote(client, name, "3", instead_of="2")
    assert time.monotonic() - began >= 0.3, "it might have lived"
    assert not locks(client, name)


class Between:
    """A client that does something else just before its first call of a method."""

    def __init__(self, client: MlflowClient, method: str, first: Callable[[], object]) -> None:
        self._client, self._method, self._first = client, method, first

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if name != self._method:
            return value

        def call(*args: Any, **options: Any) -> Any:
            self._method = ""
            self._first()
            return value(*args, **options)

        return call


def test_others_who_come_and_go_are_not_waited_for_for_ever(
    model: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = model
    monkeypatch.setattr("pipeline.retraining.aliases.STALE_S", 0.2)
    monkeypatch.setattr("pipeline.retraining.aliases.POLL_S", 0.05)
    hold(client, name, "elsewhere 1 x")

    class Changing:
        def __getattr__(self, called: str) -> Any:
            if called == "get_registered_model":
                client.set_registered_model_tag(f"{name}.promoting", "holder", f"elsewhere 1 {time.monotonic()}")
            return getattr(client, called)

    with pytest.raises(Busy, match="other processes move the aliases all the time, now elsewhere 1"):
        promote(Changing(), name, "2", instead_of="1")
    assert len(locks(client, name)) == 1, "another's lock stays"


def test_who_lost_the_lock_on_the_way_is_told_and_leaves_the_other_one(model: tuple[MlflowClient, str]) -> None:
    client, name = model

    def taken_away() -> None:
        client.delete_registered_model(f"{name}.promoting")
        promote(client, name, "3", instead_of="1")
        hold(client, name, "elsewhere 1 x")

    with pytest.raises(PromotionError, match="the champion is version 3 by now; compare version 2"):
        promote(Between(client, "set_model_version_tag", taken_away), name, "2", instead_of="1")
    assert aliases(client, name) == {"champion": "3", "previous": "1"}
    assert locks(client, name) == ["elsewhere 1 x"]


def test_of_two_that_set_the_champion_at_once_the_first_is_told(model: tuple[MlflowClient, str]) -> None:
    client, name = model

    class Late:
        def __getattr__(self, called: str) -> Any:
            return getattr(client, called)

        def set_registered_model_alias(self, model: str, alias: str, version: str) -> None:
            client.set_registered_model_alias(model, alias, version)
            if alias == "champion":
                client.set_registered_model_alias(model, alias, "3")

    with pytest.raises(PromotionError, match="the champion is version 3 by now"):
        promote(Late(), name, "2", instead_of="1")


def test_a_lock_whose_creation_was_never_answered_is_ones_own(model: tuple[MlflowClient, str]) -> None:
    client, name = model

    class AskedTwice:
        def __getattr__(self, called: str) -> Any:
            return getattr(client, called)

        def create_registered_model(self, lock: str, tags: dict[str, str]) -> None:
            for _ in range(2):
                client.create_registered_model(lock, tags=tags)

    began = time.monotonic()
    promote(AskedTwice(), name, "2", instead_of="1")
    assert time.monotonic() - began < 30
    assert aliases(client, name)["champion"] == "2"
    assert not locks(client, name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures/ and the bundle of a network that knows their three colours."""
    from pipeline.config import config_from_dict
    from pipeline.training import train

    root = tmp_path_factory.mktemp("gate")
    for label in COLORS:
        for number in range(40):
            write_picture(root / "pictures" / label / f"{number:02}.jpg", picture(label, number))
    values = {
        "data": {"source": str(root / "pictures"), "image_size": 16, "workers": 0},
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
    from models.bundle import load_bundle, save_bundle

    bundle = load_bundle(trained / "runs/r/bundle")
    classifier = bundle.classifier()
    if (label := changes.pop("deaf", None)) is not None:
        from models.head import head_of

        with torch.no_grad():
            head_of(classifier.network).bias[bundle.info.labels.index(label)] -= 1000
    path = tmp_path / "altered"
    save_bundle(path, replace(bundle.info, **changes), classifier, [])
    return load_bundle(path)


def verdict(trained: Path, challenger: Any, champion: Any, **config: Any) -> dict[str, Any]:
    from pipeline.data.manifest import load_manifest
    from pipeline.retraining.gate import gate

    config = {"robustness_loss": None, "latency_ratio": None, "calibration_error": None} | config
    manifest = load_manifest(trained / "pictures")
    found = gate(GateConfig(**config), challenger, champion, manifest, "h")
    return {line.name: line for line in found.lines} | {"passed": found.passed, "text": found.text()}


def test_the_gate_lets_an_equal_pass_and_tells_its_numbers(trained: Path, tmp_path: Path) -> None:
    from models.bundle import load_bundle

    champion = load_bundle(trained / "runs/r/bundle")
    found = verdict(trained, altered(trained, tmp_path), champion, robustness_loss=0.1, latency_ratio=50.0)
    assert found["passed"], found["text"]
    assert found["margin"].value == 0
    assert found["robustness"].value == 0
    assert found["latency_ratio"].value == pytest.approx(1, abs=5)
    assert not verdict(trained, champion, champion, margin=0.01)["margin"].passed
    first = verdict(trained, champion, None)
    assert first["passed"]
    assert "no champion" in first["margin"].told


def test_a_class_that_is_never_given_fails_where_it_should(trained: Path, tmp_path: Path) -> None:
    from models.bundle import load_bundle

    champion = load_bundle(trained / "runs/r/bundle")
    worse = altered(trained, tmp_path, deaf="red")
    found = verdict(trained, worse, champion)
    failed = {name for name, line in found.items() if name not in ("passed", "text") and not line.passed}
    assert failed == {"margin", "interval", "recall red"}
    assert found["recall red"].value == 0
    assert found["margin"].value == pytest.approx(-1 / 3, abs=0.05)
    assert "FAILED  recall red" in found["text"]
    assert verdict(trained, champion, worse)["passed"], "the other way round it is a gain"
    alone = verdict(trained, worse, None, recall=0.5)
    assert not alone["recall"].passed
    assert verdict(trained, worse, None, recall_of={"blue": 0.5})["passed"]
    assert not verdict(trained, worse, None, recall_of={"red": 0.5})["recall red"].passed
    with pytest.raises(ConfigError, match="'purple' is no class"):
        verdict(trained, worse, None, recall_of={"purple": 0.5})


def test_limits_of_calibration_size_latency_and_labels(trained: Path, tmp_path: Path) -> None:
    from models.bundle import load_bundle

    champion = load_bundle(trained / "runs/r/bundle")
    vague = altered(trained, tmp_path, temperature=champion.info.temperature * 200)
    assert verdict(trained, champion, None, calibration_error=0.3)["passed"]
    assert not verdict(trained, vague, None, calibration_error=0.3)["calibration_error"].passed
    for name, limit in (
        ("size", {"size_mb": 1e-4}),
        ("latency", {"latency_ms": 1e-6}),
        ("accuracy", {"accuracy": 1.0}),
    ):
        found = verdict(trained, altered(trained, tmp_path / name, deaf="red"), None, **limit)
        assert not found[name].passed, name
    other = altered(trained, tmp_path / "labels", labels=("blue", "green", "scarlet"))
    found = verdict(trained, other, champion)
    assert not found["labels"].passed
    assert "red" in found["labels"].told
    assert found["recall red"].value == 0, "an answer that the hold-out does not know is wrong"


def test_the_commands_promote_and_roll_back(
    trained: Path, registry: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from refract import main

    client = MlflowClient(registry, registry)
    client.create_registered_model("colors")
    for _ in range(2):
        client.create_model_version("colors", source=(trained / "runs/r/bundle").as_uri())
    client.create_model_version("colors", source=(trained / "pictures").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)

    def told(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        found = capsys.readouterr()
        return found.out + found.err

    assert "--why" in told("promote", "colors", 1, "--force", code=2)
    assert "did not pass the gate" in told("promote", "colors", 1, code=2)
    assert "is version 1 now" in told("promote", "colors", 1, "--force", "--why", "the first one")
    told("promote", "colors", 2, "--force", "--why", "seen by hand")
    assert client.get_model_version("colors", "2").tags["promotion.why"] == "seen by hand"
    assert aliases(client, "colors") == {"champion": "2", "previous": "1"}
    assert "version 1 again" in told("rollback", "colors")
    assert aliases(client, "colors") == {"champion": "1", "previous": "2"}
    client.set_model_version_tag("colors", "2", "gate", "passed")
    client.set_model_version_tag("colors", "2", "gate.against", "7")
    assert "did not pass the gate against 1" in told("promote", "colors", 2, code=2), "it was another champion"
    client.set_model_version_tag("colors", "2", "gate.against", "1")
    assert "is version 2 now" in told("promote", "colors", 2)
    assert "no registered model" in told("rollback", "colours", code=2)
    assert "no version 7" in told("promote", "colors", 7, "--force", "--why", "x", code=2)
    assert "a bundle?" in told("promote", "colors", 3, "--force", "--why", "x", code=2), "it is no bundle"
    assert aliases(client, "colors")["champion"] == "2"
