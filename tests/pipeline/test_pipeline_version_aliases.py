"""Which alias a version gets that a training registers: the first is champion, later ones are challenger."""

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from test_pipeline_aliases import Dies, Mortal

from refract.pipeline.tracking.aliases import FIRST, aliases, name_version, promote
from refract.pipeline.tracking.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> str:
    return f"sqlite:///{shutil.copy(new_tracking, tmp_path_factory.mktemp('registry'))}"


class Trainings:
    """Trainings that register versions of one model, as their journals deliver them."""

    def __init__(self, registry: str, name: str, folder: Path) -> None:
        self.store, self.name = Store(registry, folder), name
        self.client = MlflowClient(registry, registry)

    def start(self, key: str) -> dict[str, Any]:
        """What the server answers to a run's first entry. Repeating it finds the same run."""
        entry = {"do": "start", "key": key, "experiment": self.name, "run_name": key, "time": 1, "params": {}}
        return self.store.deliver({**entry, "tags": {}}, {})

    def register(self, key: str, alias: str = "champion") -> dict[str, Any]:
        return self.store.deliver({"do": "register", "model": self.name, "alias": alias}, self.start(key))

    def named(self) -> dict[str, str]:
        return aliases(self.client, self.name)


@pytest.fixture
def trainings(registry: str, request: pytest.FixtureRequest, tmp_path: Path) -> Trainings:
    return Trainings(registry, re.sub(r"[^\w-]", "_", request.node.name)[:200], tmp_path)


def test_the_first_version_is_champion_and_later_ones_are_challenger(trainings: Trainings) -> None:
    assert trainings.register("a") == {"version": "1", "alias": "champion", "champion": "1"}
    assert trainings.register("a") == {"version": "1", "alias": "champion", "champion": "1"}, "delivered twice"
    assert trainings.named() == {"champion": "1"}
    assert trainings.register("b") == {"version": "2", "alias": "challenger", "champion": "1"}
    trainings.register("c")
    assert trainings.named() == {"champion": "1", "challenger": "3"}
    trainings.register("b")
    assert trainings.named() == {"champion": "1", "challenger": "3"}, "a repeated delivery moves nothing back"
    promote(trainings.client, trainings.name, "2", instead_of="1")
    assert trainings.register("a") == {"version": "1", "champion": "2"}, "replaced, and named nothing"
    assert trainings.register("b")["alias"] == "champion"
    assert trainings.named() == {"champion": "2", "previous": "1", "challenger": "3"}


def test_a_retraining_run_names_no_champion(trainings: Trainings) -> None:
    assert trainings.register("retraining", alias="challenger") == {"version": "1", "alias": "challenger"}
    assert trainings.register("a") == {"version": "2", "alias": "challenger"}, "version 1 is the model's first"
    assert trainings.named() == {"challenger": "2"}


@pytest.mark.parametrize("tags", [{FIRST: "champion"}, {}])
def test_the_next_training_names_a_first_version_whose_process_died(trainings: Trainings, tags: dict[str, str]) -> None:
    """It was killed between its version and its alias. tags: of the version, none from before they were written."""
    run = trainings.start("a")
    trainings.client.create_registered_model(trainings.name)
    trainings.client.create_model_version(trainings.name, "file:///nowhere", run_id=run["run_id"], tags=tags)
    assert trainings.register("b") == {"version": "2", "alias": "challenger", "champion": "1"}
    assert trainings.named() == {"champion": "1", "challenger": "2"}
    assert trainings.register("a") == {"version": "1", "alias": "champion", "champion": "1"}, "resumed or synced later"
    promote(trainings.client, trainings.name, "2", instead_of="1")
    assert trainings.register("a") == {"version": "1", "champion": "2"}, "named late, it leaves the champion alone"


def test_a_first_version_that_waits_for_the_gate_is_not_named(trainings: Trainings) -> None:
    run = trainings.start("a")
    trainings.client.create_registered_model(trainings.name)
    tags = {FIRST: "challenger"}
    trainings.client.create_model_version(trainings.name, "file:///nowhere", run_id=run["run_id"], tags=tags)
    assert trainings.register("b") == {"version": "2", "alias": "challenger"}


def test_a_training_names_no_champion_after_the_champion_was_deleted(trainings: Trainings) -> None:
    trainings.register("a")
    trainings.client.delete_model_version(trainings.name, "1")
    assert trainings.register("b") == {"version": "2", "alias": "challenger"}, "a person decides"


def test_a_first_version_whose_naming_was_cut_short_is_champion(
    registry: str, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refract.pipeline.tracking.aliases.STALE_S", 0.0)  # the dead one's lock
    for at in range(1, 60, 3):  # the promotion within has its own test of every instant
        each = Trainings(registry, f"{trainings.name}-{at}", trainings.store.run_dir)
        each.client.create_registered_model(each.name)
        each.client.create_model_version(each.name, source="file:///nowhere")
        try:
            name_version(Mortal(each.client, at, after=True), each.name, "1", first="champion")
        except Dies:
            assert name_version(each.client, each.name, "1", first="champion")["alias"] == "champion", at
            assert each.named() == {"champion": "1"}
        else:
            assert at > 5
            return
    pytest.fail("it never came to its end")


def test_of_concurrent_first_trainings_one_names_the_champion(registry: str, trainings: Trainings) -> None:
    each = [Trainings(registry, trainings.name, trainings.store.run_dir) for _ in range(4)]
    trainings.start("their experiment")
    answers: list[dict[str, Any]] = []

    def register(number: int) -> None:
        answers.append(each[number].register(f"run{number}"))

    threads = [threading.Thread(target=register, args=(number,)) for number in range(len(each))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alias_by_version = {answer["version"]: answer.get("alias") for answer in answers}
    assert alias_by_version.pop("1") == "champion"
    assert set(alias_by_version) == {"2", "3", "4"} and "champion" not in alias_by_version.values()
    assert trainings.named()["champion"] == "1" and trainings.named()["challenger"] in alias_by_version
