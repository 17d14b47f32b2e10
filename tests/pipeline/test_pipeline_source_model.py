"""A training that starts from a model: a bundle, a run, a version of the registry, or a run of MLflow."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from small_data import COLORS, interrupt_before_first_step, make_image, paint, table, write_image

from refract.models.bundle.bundle import load_bundle
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.tracking import TrackingError
from refract.pipeline.training.fit import Assembly, assemble
from refract.pipeline.training.run import train
from refract.pipeline.training.run_directory import read_record, stored_config, unfinished

pytestmark = pytest.mark.slow


class Trained(NamedTuple):
    root: Path
    uri: str
    run: Path
    run_id: str
    weights: dict[str, torch.Tensor]


def configured(trained: Trained, tmp_path: Path, weights: str, **data: object) -> Config:
    return config_from_dict(
        {
            "data": {"source": str(trained.root / "images"), "image_size": 16, "workers": 0} | data,
            "model": {"name": "lenet5", "weights": weights},
            "trainer": {"max_epochs": 1, "device": "cpu", "precision": "fp32", "runs_dir": str(tmp_path / "runs")},
            "evaluation": {"robustness": "none"},
            "tracking": {"uri": trained.uri},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    shutil.copy(new_tracking, root)
    paint(root / "images", range(12))
    uri = f"sqlite:///{root}/mlflow.db"
    config = configured(Trained(root, uri, root, "", {}), root, "none")
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir(root)
        result = train(config.changed({"tracking.model_name": "colors", "trainer.run_name": "first"}))
    assert result is not None
    run_id = json.loads((result.run_dir / "journal.delivered.json").read_text())["run_id"]
    return Trained(root, uri, result.run_dir, run_id, load_file(result.bundle / "weights.safetensors"))


def state_of(assembly: Assembly) -> dict[str, torch.Tensor]:
    return assembly.module.classifier.state_dict()


def test_every_name_of_a_model_starts_from_its_weights(trained: Trained, tmp_path: Path) -> None:
    names = {
        "models:/colors@champion": "models:/colors/1",
        "models:/colors/1": "models:/colors/1",
        f"runs:/{trained.run_id}": f"runs:/{trained.run_id}",
        str(trained.run): str(trained.run),
        str(trained.run / "bundle"): str(trained.run / "bundle"),
    }
    digest = load_bundle(trained.run / "bundle").digest
    for name, pinned in names.items():
        assembly = assemble(configured(trained, tmp_path, name))
        state = state_of(assembly)
        assert all(torch.equal(state[key], value) for key, value in trained.weights.items()), name
        assert assembly.config.model.weights == pinned
        assert assembly.config.optim.head_lr == 1 and assembly.config.model.frozen_norms is False, "the head is not new"
        assert assembly.source is not None
        assert assembly.source.record["source"] == name and assembly.source.record["digest"] == digest
    assert len(list((tmp_path / "runs/.models").iterdir())) == 1, "one download of one bundle"


def test_new_classes_extend_the_head_and_known_ones_keep_their_rows(trained: Trained, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(trained.root / "images", images)
    shutil.rmtree(images / "green")
    for number in range(12):
        write_image(images / "amber" / f"{number}.png", make_image("red", 100 + number, side=16))
        write_image(images / "pink" / f"{number}.png", make_image("blue", 100 + number, side=16))
    state = state_of(assemble(configured(trained, tmp_path, "models:/colors/1", source=str(images))))
    blue, _, red = (sorted(COLORS).index(label) for label in ("blue", "green", "red"))
    (weight, bias) = (key for key in trained.weights if trained.weights[key].shape[:1] == (3,) and "network" in key)
    for key in (weight, bias):
        stored = trained.weights[key]
        mean = stored.mean(dim=0)
        torch.testing.assert_close(state[key], torch.stack([mean, stored[blue], mean, stored[red]]))
    others = {key for key, value in trained.weights.items() if key not in (weight, bias)}
    assert all(torch.equal(state[key], trained.weights[key]) for key in others)


def test_the_run_names_its_model_and_resumes_without_it(trained: Trained, tmp_path: Path) -> None:
    copied = tmp_path / "other.db"
    shutil.copy(trained.root / "mlflow.db", copied)
    moved = trained._replace(uri=f"sqlite:///{copied}")
    config = configured(moved, tmp_path, "models:/colors@champion").changed({"trainer.run_name": "second"})

    interrupt_before_first_step(config)
    run = tmp_path / "runs/second"
    start = read_record(run)["start"]
    assert start["source"] == "models:/colors@champion" and start["weights"] == "models:/colors/1"
    assert start["name"] == "colors" and start["version"] == "1"
    assert stored_config(run).model.weights == "models:/colors/1"
    assert unfinished(config, "run") == run, "the alias is compared, not the version"

    client = MlflowClient(moved.uri, moved.uri)
    (tags,) = [r.data.tags for r in client.search_runs(["1"]) if r.info.run_name == "second"]
    assert tags["start.version"] == "1" and tags["start.digest"] == start["digest"]

    client.delete_registered_model("colors")
    result = train(stored_config(run), resume=run)
    assert result is not None and read_record(run)["finished"] and read_record(run)["start"] == start

    shutil.rmtree(tmp_path / "runs/.models")
    with pytest.raises(ConfigError, match=r"models:/colors/1: MLflow at .* has no such model, version or alias"):
        assemble(stored_config(run), source_digest=start["digest"])
    with pytest.raises(ConfigError, match="--resume: .* is not the model that the run started from"):
        assemble(configured(trained, tmp_path, str(trained.run)), source_digest="0" * 64)


def test_a_model_that_cannot_be_used_is_named(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(trained.uri, trained.uri)
    empty = client.create_run("1").info.run_id
    for weights, message in (
        ("models:/colors@best", r"models:/colors@best: MLflow at sqlite.* has no such model, version or alias"),
        ("models:/colors/7", "models:/colors/7: MLflow at .* has no such model"),
        ("models:/shapes/1", "models:/shapes/1: MLflow at .* has no such model"),
        (
            "models:/colors",
            "'models:/colors' is not a model of MLflow; expected models:/NAME@ALIAS, models:/NAME/VERSION",
        ),
        (f"runs:/{'0' * 32}", "MLflow at .* has no such run"),
        (f"runs:/{empty}", f"runs:/{empty}: the run has no bundle; its training may be unfinished"),
    ):
        with pytest.raises(ConfigError, match=message):
            assemble(configured(trained, tmp_path, weights))
    with pytest.raises(ConfigError, match=r"there is no .*missing\.db; set tracking\.uri or MLFLOW_TRACKING_URI"):
        assemble(configured(trained._replace(uri=f"sqlite:///{tmp_path}/missing.db"), tmp_path, "models:/colors/1"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"models:/colors/1: MLflow at http://127\.0\.0\.1:9 did not deliver it"):
        assemble(configured(trained._replace(uri="http://127.0.0.1:9"), tmp_path, "models:/colors/1"))
    damaged = tmp_path / "damaged"
    shutil.copytree(trained.run / "bundle", damaged)
    with (damaged / "weights.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(ConfigError, match=r"damaged is not a bundle that can be verified: .*was altered"):
        assemble(configured(trained, tmp_path, str(damaged)))
    assert not list((tmp_path / "runs/.models").glob("*")), "nothing incomplete stays"


def test_a_model_that_reads_texts_starts_with_its_text_network(trained: Trained, tmp_path: Path) -> None:
    rows = [[f"{label} {number}", label] for label in COLORS for number in range(12)]
    manifest = table(tmp_path / "texts.csv", rows, ["text", "label"])
    config = configured(trained, tmp_path, "none", source=str(manifest)).changed(
        {
            "model.name": "none",
            "text.name": "hashing",
            "text.args": {"buckets": 64, "width": 8},
            "tracking.enabled": False,
        }
    )
    result = train(config)
    assert result is not None
    again = config.changed({"model.weights": str(result.bundle)})
    stored = load_file(result.bundle / "weights.safetensors")
    state = state_of(assemble(again))
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    with pytest.raises(ConfigError, match="differs from the config's section text: max_length"):
        assemble(again.changed({"text.max_length": 8}))
    with pytest.raises(ConfigError, match="the model reads texts; set text.name: hashing"):
        assemble(configured(trained, tmp_path, str(result.bundle)))
