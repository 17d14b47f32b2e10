"""Aliases always name a valid champion, on a real registry: kills at every request, concurrent processes, and the retraining step."""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.retraining.run import begin
from refract.pipeline.retraining.steps import STEPS, Outcome, RetrainingError
from refract.pipeline.retraining.verdict_tags import _key
from refract.pipeline.retraining.workspace import read_run, workspace_of, write_run
from refract.pipeline.tracking.aliases import Busy, PromotionError, RolledBack, aliases, promote, rollback

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> str:
    return f"sqlite:///{shutil.copy(new_tracking, tmp_path_factory.mktemp('registry'))}"


@pytest.fixture
def model(registry: str, request: pytest.FixtureRequest) -> tuple[MlflowClient, str]:
    """A registered model with the versions 1 to 3, of which 1 is champion."""
    client, name = MlflowClient(registry, registry), re.sub(r"[^\w-]", "_", request.node.name)[:200]
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
            result = value(*args, **options)
            if self._left < 0:
                raise Dies
            return result

        return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_champion_is_named_at_every_instant_of_a_promotion(
    model: tuple[MlflowClient, str], after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = model
    monkeypatch.setattr("refract.pipeline.tracking.aliases.STALE_S", 0.0)  # the dead one's lock
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
            promote(client, name, "2", instead_of="1")  # the resumed run
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
    monkeypatch.setattr("refract.pipeline.tracking.aliases.STALE_S", 0.0)
    with pytest.raises(PromotionError, match="no version to roll back to"):
        rollback(client, name)
    promote(client, name, "2", instead_of="1")
    assert rollback(client, name) == ("1", "2")
    assert aliases(client, name) == {"champion": "1", "previous": "2"}
    assert "rolled_back" in client.get_model_version(name, "2").tags
    with pytest.raises(PromotionError, match="the champion is now version 1, the previous one version 2"):
        rollback(client, name, expected=("2", "1"))
    assert rollback(client, name, expected=("1", "2")) == ("2", "1")
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
    with pytest.raises(PromotionError, match="the champion is now version 2"):
        promote(client, name, "3", instead_of="1")
    assert aliases(client, name) == {"champion": "2", "previous": "1"}
    with pytest.raises(PromotionError, match="no version 9"):
        promote(client, name, "9", instead_of="2")
    with pytest.raises(PromotionError, match="no registered model"):
        aliases(client, "unheard-of")


def test_of_concurrent_promoters_one_wins(model: tuple[MlflowClient, str], registry: str) -> None:
    client, name = model
    outcomes: dict[str, str] = {}
    start = threading.Barrier(2)

    def move(version: str) -> None:
        thread_client = MlflowClient(registry, registry)
        start.wait()
        try:
            promote(thread_client, name, version, instead_of="1")
            outcomes[version] = "won"
        except PromotionError as error:
            outcomes[version] = str(error)

    threads = [threading.Thread(target=move, args=(version,)) for version in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [version for version, words in outcomes.items() if words == "won"]
    assert len(winners) == 1
    assert aliases(client, name) == {"champion": winners[0], "previous": "1"}
    assert "champion is now" in next(words for words in outcomes.values() if words != "won"), "it waited for its turn"


def hold(client: MlflowClient, name: str, holder: str) -> None:
    client.create_registered_model(f"{name}.promoting", tags={"holder": holder})


def locks(client: MlflowClient, name: str) -> list[str]:
    return [model.tags["holder"] for model in client.search_registered_models() if model.name == f"{name}.promoting"]


def test_a_lock_is_kept_by_the_living_alone(model: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch) -> None:
    client, name = model
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    hold(client, name, f"{platform.node()} {dead.pid} x")
    monkeypatch.setattr("refract.pipeline.tracking.aliases.SETTLE_S", 0.0)
    began = time.monotonic()
    promote(client, name, "2", instead_of="1")
    assert time.monotonic() - began < 30, "the dead are not waited for"

    monkeypatch.setattr("refract.pipeline.tracking.aliases.STALE_S", 0.3)
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
    monkeypatch.setattr("refract.pipeline.tracking.aliases.STALE_S", 0.1)
    monkeypatch.setattr("refract.pipeline.tracking.aliases.PATIENCE_S", 0.3)
    hold(client, name, "elsewhere 1 x")

    class Changing:
        def __getattr__(self, called: str) -> Any:
            if called == "get_registered_model":
                client.set_registered_model_tag(f"{name}.promoting", "holder", f"elsewhere 1 {time.monotonic()}")
            return getattr(client, called)

    with pytest.raises(Busy, match="other processes keep moving the aliases, now elsewhere 1"):
        promote(Changing(), name, "2", instead_of="1")
    assert len(locks(client, name)) == 1, "another's lock stays"


def test_losing_the_lock_is_reported_and_the_other_process_keeps_it(model: tuple[MlflowClient, str]) -> None:
    client, name = model

    def taken_away() -> None:
        client.delete_registered_model(f"{name}.promoting")
        promote(client, name, "3", instead_of="1")
        hold(client, name, "elsewhere 1 x")

    with pytest.raises(PromotionError, match="the champion is now version 3; compare version 2"):
        promote(Between(client, "set_model_version_tag", taken_away), name, "2", instead_of="1")
    assert aliases(client, name) == {"champion": "3", "previous": "1"}
    assert locks(client, name) == ["elsewhere 1 x"]


def test_either_sign_of_another_process_is_enough(model: tuple[MlflowClient, str]) -> None:
    client, name = model

    def lock_taken_away() -> None:
        client.set_registered_model_tag(f"{name}.promoting", "holder", "elsewhere 1 x")

    with pytest.raises(PromotionError, match="another process moved the aliases"):
        promote(Between(client, "set_model_version_tag", lock_taken_away), name, "2", instead_of="1")
    client.delete_registered_model(f"{name}.promoting")

    def moved_without_asking() -> None:
        client.set_registered_model_alias(name, "champion", "3")

    with pytest.raises(PromotionError, match="the champion is now version 3"):
        promote(Between(client, "set_model_version_tag", moved_without_asking), name, "2", instead_of="1")
    assert aliases(client, name)["champion"] == "3"


def test_of_two_that_set_the_champion_at_once_the_first_gets_an_error(model: tuple[MlflowClient, str]) -> None:
    client, name = model

    class Late:
        def __getattr__(self, called: str) -> Any:
            return getattr(client, called)

        def set_registered_model_alias(self, model: str, alias: str, version: str) -> None:
            client.set_registered_model_alias(model, alias, version)
            if alias == "champion":
                client.set_registered_model_alias(model, alias, "3")

    with pytest.raises(PromotionError, match="the champion is now version 3"):
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


def test_a_lock_that_is_released_while_mlflow_reports_it_is_taken(model: tuple[MlflowClient, str]) -> None:
    client, name = model
    calls = []

    class ReleasedInBetween:
        def __getattr__(self, called: str) -> Any:
            return getattr(client, called)

        def create_registered_model(self, lock: str, tags: dict[str, str]) -> None:
            calls.append(lock)
            if len(calls) == 1:
                client.get_registered_model("no such model")  # as MLflow's store does for its message
            client.create_registered_model(lock, tags=tags)

    promote(ReleasedInBetween(), name, "2", instead_of="1")
    assert aliases(client, name)["champion"] == "2" and len(calls) == 2


def test_who_went_back_is_not_overruled_but_by_a_person(model: tuple[MlflowClient, str]) -> None:
    client, name = model
    promote(client, name, "2", instead_of="1")
    rollback(client, name)
    with pytest.raises(RolledBack, match="version 2 was rolled back at .*`refract promote .* 2`"):
        promote(client, name, "2", instead_of="1")
    assert aliases(client, name) == {"champion": "1", "previous": "2"}
    promote(client, name, "2", instead_of="1", by_hand=True)
    assert aliases(client, name) == {"champion": "2", "previous": "1"}


def test_a_champion_that_was_deleted_is_not_followed_unseen(model: tuple[MlflowClient, str]) -> None:
    client, name = model
    client.delete_registered_model_alias(name, "champion")
    promote(client, name, "1", instead_of=None)
    client.delete_model_version(name, "1")
    assert aliases(client, name) == {}
    with pytest.raises(PromotionError, match="version 1 was promoted before, but no version is champion now"):
        promote(client, name, "2", instead_of=None)
    promote(client, name, "2", instead_of=None, by_hand=True)
    assert aliases(client, name) == {"champion": "2"}


@pytest.fixture
def retraining_run(model: tuple[MlflowClient, str], registry: str, tmp_path: Path) -> tuple[Config, Path]:
    """A retraining run whose version 2 passed the gate against version 1, before its promotion."""
    tracking = {"uri": registry, "model_name": model[1]}
    config = config_from_dict({"tracking": tracking, "retrain": {"folder": str(tmp_path)}})
    folder = begin(config, force=False)
    known = {"version": "2", "champion": "1", "mlflow": registry, "gate": {"passed": True, "lines": []}}
    seen = {"snapshot": {}, "snapshot_folder": "", "inputs": "x"}
    write_run(folder, read_run(folder) | known | seen)
    return config, folder


def ended(retraining_run: tuple[Config, Path]) -> tuple[dict[str, Any], bool]:
    """Finish the run. Returns (its record, whether it is recorded as the last run)."""
    config, folder = retraining_run
    STEPS[-2](folder)
    STEPS[-1](folder)
    return read_run(folder), workspace_of(config).last() is not None


def test_a_run_promotes_and_is_recorded(retraining_run: tuple[Config, Path]) -> None:
    record, remembered = ended(retraining_run)
    assert record["outcome"] == Outcome.PROMOTED
    assert remembered


def test_a_run_that_finds_another_champion_is_not_recorded(
    model: tuple[MlflowClient, str], retraining_run: tuple[Config, Path]
) -> None:
    promote(*model, "3", instead_of="1")
    record, remembered = ended(retraining_run)
    assert record["outcome"] == Outcome.NOT_PROMOTED
    assert "the champion is now version 3" in record["why"]
    assert "the next run trains again" in record["why"]
    assert not remembered, "what passed the gate would be lost"


def test_a_resumed_run_keeps_a_rollback(model: tuple[MlflowClient, str], retraining_run: tuple[Config, Path]) -> None:
    promote(*model, "2", instead_of="1")  # killed before its record was written
    rollback(*model)
    record, remembered = ended(retraining_run)
    assert record["outcome"] == Outcome.NOT_PROMOTED
    assert "was rolled back" in record["why"]
    assert remembered
    assert aliases(*model)["champion"] == "1"


def test_a_run_that_cannot_get_the_lock_resumes_later(
    model: tuple[MlflowClient, str], retraining_run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = model
    _, folder = retraining_run
    hold(client, name, "elsewhere 1 x")
    with monkeypatch.context() as impatient:
        impatient.setattr("refract.pipeline.tracking.aliases.PATIENCE_S", -1.0)
        with pytest.raises(RetrainingError, match="other processes keep moving the aliases"):
            STEPS[-2](folder)
    assert "ends" not in read_run(folder)
    client.delete_registered_model(f"{name}.promoting")
    assert ended(retraining_run)[0]["outcome"] == Outcome.PROMOTED


@pytest.mark.parametrize("label", ["and/", "yes//no", "../up", "a/./b", "/", "c++ & ü²", "x" * 300])
def test_every_label_makes_a_tag(model: tuple[MlflowClient, str], label: str) -> None:
    client, name = model
    key = f"gate.{_key(f'recall {label}')}"
    client.set_model_version_tag(name, "1", key, "written")
    assert client.get_model_version(name, "1").tags[key] == "written"
