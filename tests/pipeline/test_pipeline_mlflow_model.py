"""A run's bundle in MLflow is an MLflow model that predicts as `refract serve`; reviewers find a description, a card and errors there."""

import base64
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import cv2
import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils import environment, requirements_utils
from small_data import COLORS, make_image, write_image
from warm_process import shared

from refract.models.bundle.bundle import BundleError, load_bundle
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.inference.pyfunc import _load_pyfunc
from refract.pipeline.labels.decisions import Decision
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.tracking.mlflow_model import LARGEST_EXAMPLE, write_model_files
from refract.pipeline.tracking.model_card import (
    Gate,
    label_state,
    model_card,
    read_facts,
    version_description,
    version_tags,
    with_gate,
)
from refract.pipeline.training.run import train
from tests.pipeline.test_pipeline_score import expected, make_bundle

CHAMPION = "models:/colors@champion"


@dataclass(frozen=True)
class Registered:
    """A training whose bundle is version 1 of `colors`. run: its folder; uri: of its database; files: some of its images."""

    run: Path
    uri: str
    files: Sequence[Path]

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, self.uri)

    @property
    def artifacts(self) -> Path:
        (experiment,) = self.client.search_experiments(filter_string="name = 'refract'")
        (run,) = self.client.search_runs([experiment.experiment_id])
        return Path(run.info.artifact_uri.removeprefix("file://"))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path) -> Registered:
    """A training that predicts one class alone, with a label history."""
    root = tmp_path_factory.mktemp("registered")
    for label in COLORS:
        for number in range(20):
            write_image(root / "images" / label / f"{number:02}.png", make_image(label, number))
    changed = root / "images" / "red" / "00.png"
    history = LabelHistory(root / "labels.db", create=True)
    content = hashlib.sha256(changed.read_bytes()).hexdigest()
    path = history.relative(changed)
    history.append(Decision(content=content, path=path, action="relabel", labels=("blue",), reviewer="ann"))
    uri = f"sqlite:///{shutil.copy(new_tracking, root / 'mlflow.db')}"
    values = {
        "data": {"source": str(root / "images"), "image_size": 16, "labels": str(root / "labels.db")},
        "model": {"name": "lenet5"},
        "trainer": {"max_epochs": 2, "runs_dir": str(root / "runs"), "run_name": "r"},
        "evaluation": {"robustness": "none"},
        "tracking": {"model_name": "colors", "uri": uri},
    }
    with chdir(root):  # MLflow writes a new experiment's files below the working directory
        result = train(config_from_dict(values))
    assert result is not None and result.version == "1" and not result.waiting
    return Registered(result.run_dir, uri, sorted((root / "images").glob("*/0[1-4].png")))


@pytest.fixture
def registry(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> Registered:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.uri)
    mlflow.set_tracking_uri(registered.uri)
    mlflow.set_registry_uri(registered.uri)
    return registered


def table(files: Sequence[Path]) -> pd.DataFrame:
    return pd.DataFrame({"image": [file.read_bytes() for file in files]})


@pytest.fixture(scope="module")
def served(registered: Registered) -> list[dict[str, Any]]:
    """The predictions of `refract serve` for the files, from a process with a port."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": registered.uri}
    server = shared().popen(
        ["serve", CHAMPION, "--port", "0", "--backend", "eager"], cwd=registered.run, env=environment
    )
    try:
        url = server.stdout.readline().strip().rpartition(" on ")[2]
        answers = [
            httpx.post(
                f"{url}/v1/predict?top=3", content=file.read_bytes(), headers={"Content-Type": "image/png"}
            ).json()
            for file in registered.files
        ]
    finally:
        server.terminate()
        server.communicate(30)
    return [answer["predictions"][0] for answer in answers]


def assert_as_served(rows: Sequence[dict[str, Any]], served: Sequence[dict[str, Any]]) -> None:
    assert len(rows) == len(served) > 0
    for row, answer in zip(rows, served, strict=True):
        given = {item["label"]: item["confidence"] for item in answer["top"]}
        np.testing.assert_allclose(row["probabilities"], [given[label] for label in sorted(COLORS)], atol=1e-5)
        assert row["confidence"] == pytest.approx(answer["confidence"], abs=1e-5)
        assert (row["label"], row["abstain"], row["error"]) == (answer["label"], answer["abstain"], "")
        assert row["familiarity"] == pytest.approx(answer["familiarity"], abs=0.2), "a rank among six images"


@pytest.mark.slow
def test_pyfunc_predicts_as_the_server(registry: Registered, served: list[dict[str, Any]]) -> None:
    model = mlflow.pyfunc.load_model(CHAMPION, model_config={"device": "cpu"})
    images = table(registry.files).set_axis(range(7, 7 + len(registry.files)))
    predicted = model.predict(images)
    assert list(predicted.index) == list(images.index)
    assert_as_served(predicted.to_dict("records"), served)
    as_text = images.assign(image=images.image.map(lambda data: base64.b64encode(data).decode()))
    pd.testing.assert_frame_equal(model.predict(as_text), predicted)
    assert list(model.metadata.signature.outputs.input_names()) == list(predicted.columns)
    assert model.metadata.metadata["labels"] == sorted(COLORS)
    assert model.predict(model.input_example).error.tolist() == [""]


def test_a_row_without_an_image_has_an_error(registry: Registered) -> None:
    model = mlflow.pyfunc.load_model(CHAMPION)
    rows = [registry.files[0].read_bytes(), b"no image", "not base64!", None, b""]
    predicted = model.predict(pd.DataFrame({"image": rows}))
    assert predicted.error[0] == "" and predicted.label[0] in COLORS
    for row, message in enumerate(
        ("not an image", "a text that is not base64", "neither an image", "neither an image"), 1
    ):
        assert message in predicted.error[row]
        assert (predicted.label[row], predicted.abstain[row]) == ("", True)
        assert predicted.confidence[row] is None and predicted.probabilities[row] is None
    with pytest.raises(mlflow.MlflowException, match="missing inputs"):
        model.predict(pd.DataFrame({"file": [b"x"]}))


def test_the_bundle_in_mlflow_is_unchanged_and_stored_once(registered: Registered) -> None:
    uploaded = registered.artifacts / "bundle"
    bundle = load_bundle(registered.run / "bundle")
    assert load_bundle(uploaded).digest == bundle.digest, "with the files of MLflow beside its own"
    bundle_files = {
        str(file.relative_to(registered.run / "bundle"))
        for file in (registered.run / "bundle").rglob("*")
        if file.is_file()
    }
    added = {str(file.relative_to(uploaded)) for file in uploaded.rglob("*") if file.is_file()} - bundle_files
    added -= {"registered_model_meta"}  # MLflow writes it when it loads the model
    assert added == {
        "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json", "serving_input_example.json",
    }  # fmt: skip
    assert sum((uploaded / name).stat().st_size for name in added) < 4 * LARGEST_EXAMPLE
    root = registered.artifacts.parents[2]
    assert len(list(root.rglob("weights.safetensors"))) == 1, "one upload"
    assert not [file for file in root.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    needed = (uploaded / "requirements.txt").read_text().split()
    assert f"refract=={bundle.info.versions['refract']}" in needed and f"mlflow=={mlflow.__version__}" in needed
    assert Model.load(str(uploaded)).flavors["python_function"]["loader_module"] == "refract.pipeline.inference.pyfunc"


def test_a_description_reads_no_lists_of_the_files_of_installed_packages(
    registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow reads them to check the requirements, which takes most of the time in which a run is tracked."""
    calls: list[str] = []
    monkeypatch.setattr(requirements_utils, "_MODULES_TO_PACKAGES", None)
    monkeypatch.setattr(
        requirements_utils.importlib_metadata, "packages_distributions", lambda: calls.append("read") or {}
    )
    write_model_files(registered.run / "bundle", tmp_path / "model", "run")
    assert calls == [] and "torch==" in (tmp_path / "model" / "requirements.txt").read_text()
    with pytest.raises(MlflowException, match="already exists"):
        write_model_files(registered.run / "bundle", tmp_path / "model", "run")
    original = requirements_utils.warn_dependency_requirement_mismatches
    assert environment.warn_dependency_requirement_mismatches is original, "the user's own models are checked as always"


def test_an_altered_weight_is_refused(registered: Registered, tmp_path: Path) -> None:
    shutil.copytree(registered.artifacts / "bundle", tmp_path / "model")
    weights = tmp_path / "model" / "weights.safetensors"
    altered = bytearray(weights.read_bytes())
    altered[-1] ^= 1
    weights.write_bytes(altered)
    with pytest.raises(BundleError, match="was altered"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


@contextmanager
def scoring_server(model: str, uri: str) -> Iterator[str]:
    """Run `mlflow models serve` in this environment on a free port, and yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        model,
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    process = Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Uvicorn running on" in line:
                break
        else:
            raise AssertionError("".join(lines))
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.communicate(timeout=60)


@pytest.mark.slow
def test_mlflow_models_serve_predicts_as_the_server(registry: Registered, served: list[dict[str, Any]]) -> None:
    images = [[base64.b64encode(file.read_bytes()).decode()] for file in registry.files]
    with scoring_server(CHAMPION, registry.uri) as url:
        body = {"dataframe_split": {"columns": ["image"], "data": [*images, ["bm8gaW1hZ2U="]]}}
        answer = httpx.post(f"{url}/invocations", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    *rows, bad = json.loads(answer.text, parse_constant=pytest.fail)["predictions"]
    assert_as_served(rows, served)
    assert bad["confidence"] is None and "not an image" in bad["error"]


@pytest.mark.slow
def test_a_spark_udf_predicts_as_the_server(registry: Registered, served: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyspark", reason="not in the lock: 450 MB, and it needs Java")
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        rows = [(index, bytearray(file.read_bytes())) for index, file in enumerate(registry.files)]
        images = spark.createDataFrame([*rows, (len(rows), bytearray(b"no image"))], ["index", "image"])
        predict = mlflow.pyfunc.spark_udf(spark, CHAMPION, env_manager="local")
        collected = images.select("index", predict("image").alias("p")).orderBy("index").collect()
    finally:
        spark.stop()
    *predicted, bad = [row.p.asDict() for row in collected]
    assert_as_served(predicted, served)
    assert (bad["label"], bad["probabilities"], bad["abstain"]) == ("", None, True) and "not an image" in bad["error"]


def test_the_outputs_have_types_of_which_mlflow_makes_spark_types(registered: Registered) -> None:
    """MLflow converts texts, doubles, Booleans and arrays of them; Spark itself is not in the lock."""
    schema = Model.load(str(registered.artifacts / "bundle")).signature.outputs.to_dict()
    kinds = {column["name"]: column.get("items", column)["type"] for column in schema}
    assert kinds == {
        "label": "string", "confidence": "double", "probabilities": "double", "familiarity": "double", "abstain": "boolean",
        "error": "string",
    }  # fmt: skip


@pytest.mark.parametrize("reads", [("texts",), ("images", "texts")])
def test_a_model_of_texts(reads: tuple[str, ...], tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", reads=reads)
    write_model_files(folder, tmp_path / "files", "0" * 32)
    shutil.copytree(tmp_path / "files", folder, dirs_exist_ok=True)
    model = mlflow.pyfunc.load_model(str(folder))
    inputs = {column["name"]: column["required"] for column in model.metadata.signature.inputs.to_dict()}
    alone = len(reads) == 1
    assert inputs == {"text": True} if alone else inputs == {"image": False, "text": False}
    write_image(tmp_path / "a.png", make_image("red", 0))
    image = (tmp_path / "a.png").read_bytes()
    rows = pd.DataFrame({"text": ["a red one", "a red one", ""], "image": [image, None, None]})
    both, text, neither = model.predict(rows[["text"]] if alone else rows).to_dict("records")
    for row, path in ((both, None if alone else tmp_path / "a.png"), (text, None)):
        np.testing.assert_allclose(row["probabilities"], expected(folder, [(path, "a red one")])[0], atol=1e-6)
    assert text["label"] and (both["probabilities"] == text["probabilities"]) is alone
    assert neither["error"] == "the row has neither an image nor a text"
    by_text = model.predict(rows[["text"]]).to_dict("records")[1]
    np.testing.assert_allclose(by_text["probabilities"], text["probabilities"], atol=1e-6)


def test_a_multilabel_model_returns_the_labels_above_their_thresholds(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", task="multilabel", thresholds=(0.0, 1.0, 0.0), abstain_below=1.0)
    write_image(tmp_path / "a.png", make_image("red", 0))
    images = pd.DataFrame({"image": [(tmp_path / "a.png").read_bytes(), b"x"]})
    good, bad = _load_pyfunc(str(bundle)).predict(images).to_dict("records")
    np.testing.assert_allclose(good["probabilities"], expected(bundle, [(tmp_path / "a.png", "")])[0], atol=1e-6)
    blue, _, red = sorted(COLORS)
    assert {blue, red} <= set(good["labels"]) and good["abstain"] and "familiarity" not in good
    assert bad["labels"] == [] and bad["abstain"]


def test_the_registered_version_is_described(registered: Registered) -> None:
    version = registered.client.get_model_version("colors", "1")
    facts = read_facts(registered.run)
    state = facts.info.data["label_state"]
    assert version.description == version_description(facts)
    for part in (
        "`lenet5` for 3 labels",
        "42 train, 6 val, 12 test samples",
        f"label state `{state[:12]}` of 1 decisions",
    ):
        assert part in version.description, version.description
    accuracy = facts.info.metrics["accuracy"]
    assert version.tags["metric.accuracy"].startswith(f"{accuracy:.4f} (95 % interval ")
    assert version.tags["data.label_state"] == state
    assert version.tags["data.fingerprint"] == facts.info.data["fingerprint"]


def test_the_data_set_of_the_run_has_the_label_state(registered: Registered) -> None:
    run = registered.client.get_run(registered.client.get_model_version("colors", "1").run_id)
    (entry,) = run.inputs.dataset_inputs
    profile = json.loads(entry.dataset.profile)
    assert profile["label_state"] == read_facts(registered.run).info.data["label_state"]
    assert profile["label_decisions"] == "1" and "red → blue 1" in profile["label_changes"]
    (described,) = json.loads(run.data.tags["mlflow.log-model.history"])
    assert described["artifact_path"] == "bundle" and "python_function" in described["flavors"]


def test_the_model_card(registered: Registered) -> None:
    card = (registered.artifacts / "model_card.md").read_text("utf-8")
    assert card == (registered.run / "model_card.md").read_text("utf-8")
    facts = read_facts(registered.run)
    titles = [line.removeprefix("## ") for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        "Intended use", "Data", "Training", "Metrics on the test set", "Calibration", "Limits", "Promotion gate", "Versions",
        "How to load it",
    ]  # fmt: skip
    row = facts.report["per_class"][0]
    low, high = row["recall_interval"]
    assert f"| {row['recall']:.3f} ({low:.3f} – {high:.3f}) |" in card
    assert f"Label history: state `{facts.labels['label_state']}`, 1 decision: " in card
    assert "- Robustness: not measured." in card and "- Familiarity: the model compares" in card
    for command in ("refract serve models:/", "mlflow.pyfunc.load_model(", "refract.load_bundle("):
        assert command in card


def test_a_retraining_run_passes_the_label_state_of_its_snapshot(registered: Registered) -> None:
    """The snapshot holds the corrected labels, so the bundle's data have no label state; the run's tags have it."""
    tags = {"data.label_state": "abc", "data.label_decisions": "7", "data.source": "x"}
    facts = read_facts(registered.run, label_state(tags))
    assert facts.labels["label_state"] == "abc" and "source" not in facts.labels
    assert "with the label state `abc` of 7 decisions" in version_description(facts)
    assert version_tags(facts)["data.label_decisions"] == "7"


def test_the_gate_is_added_to_card_and_description(registered: Registered) -> None:
    lines = [
        {"name": "margin", "passed": False, "summary": "-0.2 | bad"},
        {"name": "size", "passed": True, "summary": "1 MB"},
    ]
    failed = Gate({"passed": False, "holdout": "h1", "samples": 1200, "lines": lines}, "3")
    passed = Gate({"passed": True, "holdout": "h1", "samples": 1200, "lines": lines[1:]}, None)
    edited = "My words."
    sentence = "The promotion gate failed against version 3, on 1,200 samples of the holdout h1, at: margin."
    once = with_gate(edited, failed)
    assert once.startswith(f"My words.\n\n{sentence}")
    again = with_gate(once, passed)
    assert again.startswith("My words.\n\nThe promotion gate passed without a champion") and "failed" not in again
    description = "The promotion gate is too strict; see the wiki.\n\nMore words."
    assert with_gate(f"{with_gate(description, failed)}\n\nAdded later.", passed) == (
        f"{description}\n\nAdded later.\n\n{passed.sentence()} `gate.txt` has its lines."
    ), "what users wrote stays, before and after"
    recalls = [{"name": f"recall class {n}", "passed": False, "summary": ""} for n in range(2000)]
    assert len(with_gate("", Gate(failed.verdict | {"lines": recalls}, "3"))) < 500
    assert with_gate("x" * 4990, failed)[:4990] == "x" * 4990 and len(with_gate("x" * 4990, failed)) == 5000, "Postgres"
    facts = read_facts(registered.run, gate=failed)
    assert sentence in version_description(facts)
    card = model_card(facts)
    assert sentence in card and r"| margin | failed | -0.2 \| bad |" in card


def test_the_gallery_of_errors(registered: Registered) -> None:
    report = json.loads((registered.run / "report.json").read_text())
    wrong = round(12 * (1 - report["metrics"]["accuracy"]))
    images = sorted((registered.artifacts / "errors").iterdir())
    assert len(images) == wrong > 0
    assert all(
        " percent, labelled " in image.name and image.name.startswith(f"{n:02} ") for n, image in enumerate(images, 1)
    )
    assert all(max(cv2.imread(str(image)).shape) == 256 for image in images)
