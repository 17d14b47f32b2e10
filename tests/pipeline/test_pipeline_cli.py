"""The commands as a user runs them, from a folder of images to a served classifier."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from charts import DRAWN
from mlflow import MlflowClient
from small_data import COLORS, Run, make_image, write_image
from warm_process import WarmProcess

from refract.augment import Preprocess
from refract.cli import COMMANDS, GROUPS, main
from refract.models.bundle.bundle import load_bundle
from refract.models.classifier import probabilities
from refract.pipeline.inference.scoring import SampleInput, score

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

QUICK = ["--trainer.max_epochs", "3", "--trainer.run_name", "r1", "--data.workers", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path, warm: WarmProcess) -> Path:
    """A folder with images/, images.yaml as `refract init` wrote it, runs/r1 and mlflow.db."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copy(new_tracking, root / "mlflow.db")
    for label in COLORS:
        for number in range(40):
            write_image(root / "images" / label / f"{number:02}.jpg", make_image(label, number))
    for command in (["init", "images", "-o", "images.yaml"], ["train", "images.yaml", *QUICK]):
        done = warm.run(command, cwd=root, env={**os.environ, DRAWN: "1"}, seconds=200)
        assert done.returncode == 0, done.stdout + done.stderr
        if command[0] == "init":  # `images` is a generic name, so init names the model after the temporary folder
            config = root / "images.yaml"
            assert f"model_name: {root.name} " in config.read_text()
            config.write_text(config.read_text().replace(f"model_name: {root.name} ", "model_name: images "))
    return root


@pytest.fixture
def workplace(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` that a test may change; `refract` runs in it. Its config has a smaller network and skips robustness."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    config = (tmp_path / "images.yaml").read_text()
    assert "  name: resnet20 " in config
    less = config.replace("  name: resnet20 ", "  name: cnn ") + "\nevaluation: {robustness: none}\n"
    (tmp_path / "images.yaml").write_text(less)
    return tmp_path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import contextlib, io, sys, refract.cli\n"
        "for command in ['', *refract.cli.COMMANDS]:\n"
        "    printed = io.StringIO()\n"
        "    with contextlib.redirect_stdout(printed):\n"
        "        try: exit_code = refract.cli.main([command, '--help'] if command else ['--help'])\n"
        "        except SystemExit as exit: exit_code = exit.code\n"
        "    heavy = {'torch', 'lightning', 'mlflow', 'pandas', 'sklearn', 'cv2', 'matplotlib', 'fastapi'} & set(sys.modules)\n"
        "    print(command, exit_code, 'usage' in printed.getvalue(), sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{command} 0 True []" for command in ("", *COMMANDS)]


def test_help_lists_every_command_below_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    blocks = dict(block.split(":\n", 1) for block in capsys.readouterr().out.split("\n\n") if ":\n" in block)
    assert (
        list(blocks)
        == ["Start", "Train", "Evaluate", "Predict", "Features", "Labels", "Retrain", "Augment"]
        == list(GROUPS)
    )
    for heading, commands in GROUPS.items():
        assert [line.split()[0] for line in blocks[heading].splitlines()] == list(commands)
        assert all(line[0].isupper() and not line.endswith(".") for _, line in commands.values())
    assert len(COMMANDS) == sum(map(len, GROUPS.values())), "no command stands under two headings"


def test_unknown_command_names_the_nearest(refract: Run) -> None:
    assert "did you mean 'train'?" in refract("trian", code=2).stderr


def test_a_run_contains_all_files_for_a_review(trained: Path) -> None:
    run = trained / "runs" / "r1"
    assert {"bundle", "config.yaml", "splits.csv", "preview.png", "curves.png", "confusion.png", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    stored = yaml.safe_load((run / "config.yaml").read_text())
    bundle = load_bundle(run / "bundle")
    assert bundle.info.config == stored and stored["trainer"]["max_epochs"] == 3
    assert bundle.info.labels == ("blue", "green", "red") and len(bundle.golden_samples) == 8
    assert bundle.info.metrics["accuracy"] > 0.9
    for name in ("preview.png", "curves.png", "confusion.png"):
        assert cv2.imread(str(run / name)).std() > 5


def test_mlflow_has_the_run_and_the_champion(trained: Path) -> None:
    client = MlflowClient(f"sqlite:///{trained}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.max_epochs"] == "3" and run.data.params["model.name"] == "resnet20"
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [metric.step for metric in losses] == [1, 2, 3]
    assert run.data.metrics["test_accuracy"] > 0.9
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"bundle", "preview.png", "confusion.png", "curves.png", "config.yaml", "splits.csv"} <= names
    assert client.get_model_version_by_alias("images", "champion").run_id == run.info.run_id


def test_predict_prints_a_line_per_image(refract: Run, workplace: Path) -> None:
    write_image(workplace / "new" / "a.png", make_image("red", 900))
    write_image(workplace / "new" / "deep" / "b.jpg", make_image("blue", 901))
    lines = refract("predict", "runs/r1/bundle", "new", "--json", "--top", 2).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [(answer["path"], answer["label"]) for answer in answers] == [
        ("new/a.png", "red"),
        ("new/deep/b.jpg", "blue"),
    ]
    assert all(
        len(answer["top"]) == 2 and answer["top"][0]["confidence"] >= answer["top"][1]["confidence"]
        for answer in answers
    )


def test_predict_continues_after_an_unreadable_image(refract: Run, workplace: Path) -> None:
    (workplace / "bad.jpg").write_text("text")
    write_image(workplace / "good.jpg", make_image("green", 902))
    os.mkfifo(workplace / "pipe.jpg")
    done = refract("predict", "runs/r1/bundle", "bad.jpg", "pipe.jpg", "good.jpg", "--json", code=1)
    first, pipe, second = map(json.loads, done.stdout.splitlines())
    assert "looks like text" in first["error"] and second["label"] == "green"
    assert pipe["error"] == "not a regular file"
    least = load_bundle(workplace / "runs" / "r1" / "bundle").info.abstain_below
    assert second["abstain"] == (least >= 1 or second["confidence"] < least), "as the server answers"
    assert "no such file" in refract("predict", "runs/r1/bundle", "nowhere.jpg", code=2).stderr


def test_evaluate_measures_the_test_split_of_the_run(refract: Run, workplace: Path) -> None:
    done = refract("evaluate", "runs/r1/bundle", "images", "--json", "e.json")
    report = json.loads((workplace / "e.json").read_text())
    assert "measuring its test split" in done.stdout and report["images"] == 24  # 20 % of 120
    stored = load_bundle(workplace / "runs" / "r1" / "bundle").info.metrics
    assert report["metrics"] == {name: value for name, value in stored.items() if name != "corruption_error"}
    assert np.trace(report["confusion"]) / 24 == report["metrics"]["accuracy"]


def test_commands_print_their_result_as_json(refract: Run, workplace: Path) -> None:
    def result_of(*arguments: object) -> dict:
        return json.loads(refract(*arguments, "--json").stdout)

    assert result_of("doctor", "runs/r1")["seconds"]
    assert result_of("evaluate", "runs/r1/bundle", "images")["metrics"]["accuracy"] > 0.9
    assert result_of("score", "runs/r1/bundle", "images", "-o", "scores.parquet")["rows"] == 120
    assert result_of("compare", "runs/r1", "runs/r1")["comparisons"][0]["value"] == 0
    assert result_of("promote", "images", "1", "--force", "--why", "a test")["champion"] == "1"
    short = result_of("train", "images.yaml", "--trainer.max_epochs", "1", "--trainer.run_name", "r2", "--quiet")
    assert short["run_dir"] == "runs/r2" and short["metrics"] and short["alias"] == "challenger"


def test_evaluate_recognises_the_training_images_by_content(refract: Run, workplace: Path) -> None:
    (workplace / "images").rename(workplace / "moved")
    assert "measuring its test split" in refract("evaluate", "runs/r1/bundle", workplace / "moved").stdout
    write_image(workplace / "moved" / "red" / "new.jpg", make_image("red", 999))
    assert "on 121 images" in refract("evaluate", "runs/r1/bundle", "moved").stdout, "other images, all of them"
    (workplace / "moved").rename(workplace / "images")
    for name in ("images", workplace / "images"):
        output = refract("evaluate", "runs/r1/bundle", name, code=2).stderr
        assert "has changed since the bundle was trained on it" in output and "splits.csv" in output


def test_evaluate_rejects_unknown_labels(refract: Run, workplace: Path) -> None:
    shutil.copytree(workplace / "images" / "red", workplace / "other" / "purple")
    shutil.copytree(workplace / "images" / "blue", workplace / "other" / "blue")
    assert (
        "1 labels are not labels of the bundle: purple" in refract("evaluate", "runs/r1/bundle", "other", code=2).stderr
    )


def test_a_run_is_never_overwritten(refract: Run, workplace: Path) -> None:
    before = (workplace / "runs" / "r1" / "bundle" / "manifest.json").read_bytes()
    assert "runs/r1 exists already" in refract("train", "images.yaml", *QUICK, code=2).stderr
    assert (workplace / "runs" / "r1" / "bundle" / "manifest.json").read_bytes() == before
    assert "images.yaml exists already" in refract("init", "images", code=2).stderr


def test_preview_draws_a_grid(refract: Run, workplace: Path) -> None:
    assert (
        "wrote grid.png: 3 images × 2 variants"
        in refract("preview", "images.yaml", "-o", "grid.png", "--rows", 3, "--variants", 2).stdout
    )
    first = (workplace / "grid.png").read_bytes()
    refract("preview", "images.yaml", "-o", "grid.png", "--rows", 3, "--variants", 2)
    assert (workplace / "grid.png").read_bytes() == first, "a preview shows what training draws, so it repeats"
    assert cv2.imread(str(workplace / "grid.png")).std() > 20
    refract("preview", "images", "--policy", "[broken", code=2)
    refract("preview", "images/red/00.jpg", "--policy", "imagenet", "-o", "one.png")


def test_data_errors_are_printed_without_a_traceback(refract: Run, workplace: Path) -> None:
    (workplace / "images" / "red" / "notes.jpg").write_text("text")
    assert "notes.jpg: not an image" in refract("train", "images.yaml", "--trainer.run_name", "r2", code=2).stderr
    assert not (workplace / "runs" / "r2").exists()


def test_an_altered_bundle_is_rejected(refract: Run, workplace: Path) -> None:
    weights = workplace / "runs" / "r1" / "bundle" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "weights.safetensors" in refract("predict", "runs/r1/bundle", "images", code=2).stderr


def test_http_evaluate_and_module_give_the_same_prediction(
    trained: Path, monkeypatch: pytest.MonkeyPatch, warm: WarmProcess
) -> None:
    """Compare the server, the scoring of `evaluate`, and direct calls of the network on the same bytes."""
    import httpx

    monkeypatch.chdir(trained)
    bundle = load_bundle("runs/r1/bundle")
    preprocess, classifier = Preprocess.from_dict(bundle.info.preprocess), bundle.classifier()
    files = sorted(Path("images/red").iterdir())[:6]
    scored = list(score(classifier, preprocess, [SampleInput(file.read_bytes) for file in files], task="multiclass"))
    server = warm.popen(["serve", "models:/images@champion", "--port", "0", "--backend", "eager"], cwd=trained)
    try:
        url = server.stdout.readline().strip().rpartition(" on ")[2]
        for file, expected in zip(files, scored, strict=True):
            answer = httpx.post(
                f"{url}/v1/predict?top=3", content=file.read_bytes(), headers={"Content-Type": "image/jpeg"}
            ).json()
            given = {item["label"]: item["confidence"] for item in answer["predictions"][0]["top"]}
            image = torch.from_numpy(preprocess(file.read_bytes())).permute(2, 0, 1)[None]
            with torch.inference_mode():
                by_hand = probabilities(classifier(image), task="multiclass")[0].numpy()
            np.testing.assert_allclose(expected, by_hand, atol=1e-5)
            np.testing.assert_allclose([given[label] for label in bundle.info.labels], by_hand, atol=1e-4)
    finally:
        server.terminate()
        server.communicate(30)


def test_two_runs_with_the_same_seed_end_with_the_same_weights(refract: Run, workplace: Path) -> None:
    for name in ("a", "b"):
        refract(
            "train",
            "images.yaml",
            "--trainer.run_name",
            name,
            "--tracking.enabled",
            "false",
            "--trainer.max_epochs",
            1,
            "--model.name",
            "lenet5",
        )
    digests = [json.loads((workplace / "runs" / name / "bundle" / "manifest.json").read_text()) for name in ("a", "b")]
    entry = [json.dumps(digest, sort_keys=True).partition("weights.safetensors")[2][:120] for digest in digests]
    assert entry[0] == entry[1]


def test_mixing_policy_and_frozen_backbone_train_a_challenger(refract: Run, workplace: Path) -> None:
    policy = '["HorizontalFlip", {"MixUp": {"p": 0.5}}, {"CutMix": {"p": 0.5}}]'
    output = refract("train", "images.yaml", "--trainer.run_name", "mixed", "--augment.policy", policy, "--model.mode", "feature-extract",
                   "--trainer.max_epochs", 1).stdout  # fmt: skip
    assert "registry: version 2 of images is challenger; version 1 stays champion\n" in output
    assert "refract promote images 2 --force --why REASON makes it champion\n" in output
    aliases = MlflowClient(f"sqlite:///{workplace}/mlflow.db").get_registered_model("images").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"champion": "1", "challenger": "2"}
    assert load_bundle(workplace / "runs" / "mixed" / "bundle").info.config["augment"]["policy"][1] == {
        "MixUp": {"p": 0.5}
    }


@pytest.mark.parametrize("normalize", ["data", "mean_image", "zca"])
def test_normalisation_measured_on_the_training_images_is_served(refract: Run, workplace: Path, normalize: str) -> None:
    refract("train", "images.yaml", "--trainer.run_name", "n", "--data.normalize", normalize, "--trainer.max_epochs", 1,
            "--tracking.enabled", "false", "--model.name", "mlp", "--data.image_size", 16, "--data.workers", 0)  # fmt: skip
    bundle = load_bundle(workplace / "runs" / "n" / "bundle")
    rows = csv.DictReader((workplace / "runs" / "n" / "splits.csv").open())
    preprocess = Preprocess.from_dict(bundle.info.preprocess)
    preprocessed = [preprocess(Path(row["path"]).read_bytes()) for row in rows if row["split"] == "train"]
    everything = np.stack(preprocessed) / 255
    np.testing.assert_allclose(bundle.info.preprocess["mean"], everything.mean((0, 1, 2)), atol=1e-5)
    assert bundle.info.preprocess["normalize"] == ("channel" if normalize == "data" else normalize)
    images = torch.from_numpy(np.stack(preprocessed)).permute(0, 3, 1, 2)
    normalised = bundle.classifier().normalise(images)
    assert normalised.mean().abs() < 1e-3, "zero-centred"
    assert "accuracy" in refract("evaluate", "runs/n/bundle", "images").stdout


def test_repeated_augmentation_and_consistency_train(refract: Run, workplace: Path) -> None:
    policy = '["HorizontalFlip", {"AugMix": {"severity": 3}}]'
    refract("train", "images.yaml", "--trainer.run_name", "views", "--augment.policy", policy, "--loss.consistency", 12,
            "--data.repeats", 2, "--data.batch_size", 8, "--trainer.max_epochs", 1, "--tracking.enabled", "false",
            "--data.workers", 1)  # fmt: skip
    assert load_bundle(workplace / "runs" / "views" / "bundle").info.config["loss"]["consistency"] == 12
    output = refract("train", "images.yaml", "--loss.consistency", 12, code=2).stderr
    assert "the policy needs AugMix, without MixUp and CutMix" in output


def test_multilabel_from_the_manifest_to_predictions(refract: Run, workplace: Path) -> None:
    rows = [f"images/{c}/{n:02}.jpg,{c};{'odd' if n % 2 else 'even'}" for c in COLORS for n in range(40)]
    (workplace / "m.csv").write_text("path,label\n" + "\n".join(rows))
    refract("init", "m.csv", "-o", "m.yaml")
    refract("train", "m.yaml", "--trainer.run_name", "m", "--trainer.max_epochs", 2)
    line = json.loads(refract("predict", "runs/m/bundle", "images/red/00.jpg", "--json").stdout)
    assert set(line["labels"]) <= {"blue", "even", "green", "odd", "red"}
    assert "mean_average_precision" in refract("evaluate", "runs/m/bundle", "m.csv").stdout


def test_a_run_records_its_provenance_and_is_repeated(refract: Run, workplace: Path) -> None:
    client = MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("refract").experiment_id])
    assert run.data.tags["data.train"] == "84" and len(run.data.tags["data.fingerprint"]) > 20
    assert run.data.tags["machine.device"] and run.data.tags["rerun"] == f"refract rerun {run.info.run_id}"
    assert 0 < run.data.metrics["cost_minutes"] < 10 and run.data.metrics["cost_peak_memory_mib"] > 100
    served = client.get_model_version_by_alias("images", "champion").version
    output = refract("rerun", "runs/r1").stdout
    assert client.get_model_version_by_alias("images", "champion").version == served, "a look back changes nothing"
    assert "identical weights: yes" in output and "different: " not in output
    write_image(workplace / "images" / "red" / "more.jpg", make_image("red", 99))
    shutil.rmtree(workplace / "runs" / "r1")
    output = refract("rerun", run.info.run_id).stdout
    assert "different: the data have changed" in output and "identical weights: no" in output
    assert "neither a folder nor a run of MLflow" in refract("rerun", "0" * 32, code=1).stderr


def test_training_where_only_serving_is_installed_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['lightning'] = None; import refract.cli; sys.exit(refract.cli.main(sys.argv[1:]))"
    config = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
    command = [sys.executable, "-c", code, "train", config, "--data.source", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    *slow, message = done.stderr.splitlines()
    assert all(re.search("loading libraries|in progress", line) for line in slow), done.stderr
    assert message.startswith("refract train: lightning is not installed; run pip install 'refract[train]'")
    assert done.returncode == 1


def test_an_option_of_torchrun_after_train_is_named(refract: Run) -> None:
    done = refract("torchrun", "train", "photos.yaml", "--nproc_per_node=2", code=2)
    assert "--nproc-per-node is an option of torchrun; write it before `train`: refract torchrun" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nproc-per-node", "0"], "--nproc-per-node: 0 is not a number of 1 or more"),
        (["--nproc-per-node", "two"], "--nproc-per-node: two: .*write a number of 1 or more, or gpu"),
        (["--nnodes", "0"], "--nnodes: 0 is not a number of 1 or more"),
        (["--nnodes", "x"], "--nnodes: x is neither a number of machines nor MIN:MAX"),
    ],
)
def test_numbers_of_ranks_and_machines_that_cannot_start_are_named(refract: Run, options: list[str], says: str) -> None:
    assert re.search(says, refract("torchrun", *options, "train", "photos.yaml", code=2).stderr)
