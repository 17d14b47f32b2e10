"""`refract shrink`: the trained candidates, the measured table, the choice, resuming, and what is refused."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import Run, until
from small_export import make_bundle
from warm_process import WarmProcess

from refract.models.bundle.bundle import Bundle, load_bundle, save_bundle
from refract.models.registry import NETWORKS
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.shrink.candidates import ShrinkError, config_of, default_candidates, named_candidates
from refract.pipeline.shrink.plan import config_of_bundle, prepare
from refract.pipeline.shrink.table import Row, accurate_enough, choose, dominates, no_fit, pareto, sorted_rows, table
from refract.pipeline.training.run import train
from refract.pipeline.training.run_directory import stored_config

CONFIG = {
    "data": {"source": "digits", "image_size": 16, "resize": "squash", "batch_size": 256},
    "model": {"name": "cnn", "args": {"widths": [8, 16]}},
    "optim": {"lr": 0.01},
    "trainer": {"max_epochs": 4, "checkpoint_seconds": 0, "run_name": "large", "device": "cpu"},
    "tracking": {"enabled": False},
    "evaluation": {"robustness": "none", "images": False},
}
NETWORKS_ASKED = ("lenet5", "cnn:8")
TARGETS = [
    name
    for name, package in {"onnx": "onnxruntime", "openvino": "openvino"}.items()
    if importlib.util.find_spec(package)
]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that is shrunk."""
    config = config_from_dict(CONFIG).changed({"trainer.runs_dir": str(tmp_path_factory.mktemp("runs"))})
    done = train(config)
    assert done is not None
    return done.bundle


@pytest.fixture(scope="module")
def resumed(large: Path, tmp_path_factory: pytest.TempPathFactory, warm: WarmProcess) -> tuple[Path, str]:
    """(The folder of a shrink that was killed while its second candidate was trained, and resumed; the output of the resumed one.)"""
    work = tmp_path_factory.mktemp("shrink")
    arguments = [
        "shrink",
        str(large),
        "--budget-ms",
        "1000",
        "--networks",
        *NETWORKS_ASKED,
        "--max-loss",
        "100",
        "-o",
        "small",
    ]
    with (process := warm.start(arguments, cwd=work, env=os.environ)).output:
        until(process, "candidate 2 of 2: cnn-8")
        until(process, "epoch 2/4")
        process.kill()
    process.wait(60)
    first = work / "small" / "runs" / "lenet5-16"
    before = (first / "run.json").stat().st_mtime_ns
    assert json.loads((first / "run.json").read_text())["finished"]
    assert not (work / "small" / "shrink.json").exists() and not (work / "small" / "bundle").exists()
    done = warm.run(arguments, cwd=work, env=os.environ, seconds=240)
    assert done.returncode == 0, done.stderr
    assert (first / "run.json").stat().st_mtime_ns == before, "a finished candidate was trained again"
    assert "resuming from small/runs/cnn-8/checkpoints/" in done.stderr, done.stderr
    return work / "small", done.stdout


@pytest.mark.slow
def test_a_killed_shrink_resumes_and_measures_all_candidates(resumed: tuple[Path, str], large: Path) -> None:
    folder, printed = resumed
    numbers = json.loads((folder / "shrink.json").read_text())
    rows = {(row["name"], row["runtime"]): row for row in numbers["rows"]}
    runtimes = ["pytorch", *(TARGETS if "onnx" in TARGETS else [])]
    assert set(rows) == {(name, runtime) for name in ("bundle", "lenet5-16", "cnn-8") for runtime in runtimes}
    assert numbers["failed"] == [] and numbers["samples"] == 359 and numbers["machine"]["threads"]
    original = load_bundle(large)
    assert rows["bundle", "pytorch"]["accuracy"] == pytest.approx(original.info.metrics["accuracy"])
    assert (rows["bundle", "pytorch"]["agreement"], rows["bundle", "pytorch"]["difference"]) == (1.0, 0.0)
    for name in ("lenet5-16", "cnn-8"):
        row, bundle = rows[name, "pytorch"], load_bundle(folder / "runs" / name / "bundle")
        assert row["accuracy"] == pytest.approx(bundle.info.metrics["accuracy"])
        assert row["difference"] == pytest.approx(row["accuracy"] - original.info.metrics["accuracy"])
        assert row["low"] <= row["difference"] <= row["high"] and 0.2 < row["agreement"] < 1
        assert row["megabytes"] == (bundle.path / "weights.safetensors").stat().st_size / 1e6
        config = stored_config(folder / "runs" / name)
        assert config.loss.teacher == str(large) and config.trainer.seed == 0
    assert load_bundle(folder / "runs" / "cnn-8" / "bundle").info.network["image_size"] == [8, 8]
    if "onnx" in TARGETS:  # the description of cnn-8 is larger than its weights
        assert rows["lenet5-16", "onnx"]["megabytes"] < rows["lenet5-16", "pytorch"]["megabytes"]
    latencies = [row["shortest_ms"] for row in numbers["rows"]]
    assert latencies == sorted(latencies) and all(row["shortest_ms"] <= row["median_ms"] for row in numbers["rows"])
    chosen = next(row for row in numbers["rows"] if row["chosen"])
    assert chosen["accuracy"] == max(row["accuracy"] for row in numbers["rows"]) and chosen["pareto_optimal"]
    assert f"chosen:   {numbers['chosen']}" in printed and "→*" in printed


@pytest.mark.slow
def test_another_budget_chooses_again_without_training(resumed: tuple[Path, str], large: Path, refract: Run) -> None:
    folder, _ = resumed
    command = ("shrink", large, "--networks", *NETWORKS_ASKED, "-o", folder)
    done = refract(*command, "--budget-ms", 1e-6, "--max-loss", 0, code=10)
    assert "epoch 1" not in done.stderr and "converting" not in done.stderr
    assert "no candidate takes at most 1e-06 ms and loses at most 0 points; the nearest is " in done.stderr
    assert json.loads((folder / "shrink.json").read_text())["chosen"] is None and not (folder / "bundle").exists()
    shown = json.loads(refract(*command, "--budget-ms", 1000, "--max-loss", 100, "--json").stdout)
    assert shown == json.loads((folder / "shrink.json").read_text())
    chosen = next(row for row in shown["rows"] if row["chosen"])
    if chosen["precision"] == "float32":
        assert load_bundle(folder / "bundle").digest == load_bundle(folder / chosen["folder"]).digest
    else:
        assert sorted(p.name for p in (folder / "bundle").iterdir()) == sorted(
            p.name for p in (folder / chosen["folder"]).iterdir()
        )
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".bundle")]


@pytest.mark.slow
def test_the_folder_of_another_shrink_is_refused(
    resumed: tuple[Path, str], large: Path, refract: Run, tmp_path: Path
) -> None:
    folder, _ = resumed
    done = refract("shrink", large, "--budget-ms", 5, "--networks", "lenet5", "-o", folder, code=2)
    assert f"-o {folder}: has another shrink, which differs in --networks" in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("a note")
    done = refract("shrink", large, "--budget-ms", 5, "-o", "full", code=2)
    assert "-o full: has other files already; name a new or an empty folder" in done.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_options_and_bundles_that_cannot_be_used_are_refused(large: Path, refract: Run, tmp_path: Path) -> None:
    for options, message in (
        (["--budget-ms", 0], "--budget-ms: 0 is not a number of milliseconds above 0"),
        (["--budget-ms", "nan"], "--budget-ms: nan is not a number of milliseconds above 0"),
        (["--budget-ms", 5, "--max-loss", -1], "--max-loss: -1 is not in 0…100"),
        (
            ["--budget-ms", 5, "--networks", "lenet6"],
            "--networks lenet6: network 'lenet6' is unknown: expected one of lenet5,",
        ),
        (
            ["--budget-ms", 5, "--networks", "lenet5:8"],
            "--networks lenet5:8: image_size=(8, 8): lenet5 expected at least 16",
        ),
        (
            ["--budget-ms", 5, "--networks", "cnn:20"],
            "--networks cnn:20: 20 is not a number of pixels in 8…16, the bundle's",
        ),
        (
            ["--budget-ms", 5, "--networks", "cnn"],
            "--networks cnn: is the bundle's network itself; add a smaller size, as in cnn:PIX",
        ),
        (["--budget-ms", 5, "--data", "moved"], "its training data cannot be used: moved: no such "),
    ):
        done = refract("shrink", large, *options, "-o", "out", code=2)
        assert message in done.stderr
    bare = make_bundle(tmp_path / "bare", "lenet5")
    done = refract("shrink", bare.path, "--budget-ms", 5, "-o", "out", code=2)
    assert (
        "bare: has no config, so its data and recipe are unknown; train a network with loss.teacher set to this"
        in done.stderr
    )


@pytest.mark.slow
def test_moved_data_are_accepted_and_other_data_refused(folder: Path, tmp_path: Path) -> None:
    changes = {
        "data.source": str(folder),
        "data.batch_size": 16,
        "trainer.max_epochs": 1,
        "trainer.runs_dir": str(tmp_path / "runs"),
    }
    done = train(config_from_dict(CONFIG).changed(changes))
    assert done is not None
    bundle = load_bundle(done.bundle)
    splits = {}
    for source in (str(folder), str(done.run_dir / "splits.csv")):
        splits[source] = prepare(bundle, config_of_bundle(bundle, source))[1]["fingerprint"]
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        ShrinkError, match=r"its training data cannot be used: .*images: .*; name their present place by --data"
    ):
        prepare(bundle, config_of_bundle(bundle, None))
    moved = prepare(bundle, config_of_bundle(bundle, str(tmp_path / "moved")))
    assert {moved[1]["fingerprint"], *splits.values()} == {bundle.info.data["fingerprint"]}
    next((tmp_path / "moved" / "red").iterdir()).unlink()
    with pytest.raises(ShrinkError, match="is not the data that .* was trained on, or has changed since"):
        prepare(bundle, config_of_bundle(bundle, str(tmp_path / "moved")))


def with_config(path: Path, network: str, size: tuple[int, int], config: dict, **more: object) -> Bundle:
    bundle = make_bundle(path / "without", network, size=size, **more)
    info = replace(
        bundle.info,
        config=config_from_dict({"data": {"image_size": list(size)}, "model": {"name": network}} | config).to_dict(),
    )
    return load_bundle(save_bundle(path / "bundle", info, bundle.classifier(), bundle.golden_samples))


def test_default_candidates_are_smaller_and_start_from_the_bundle_where_its_weights_fit(tmp_path: Path) -> None:
    bundle = with_config(tmp_path / "resnet", "resnet20", (32, 40), {})
    config = config_of_bundle(bundle, None)
    candidates = {candidate.name: candidate for candidate in default_candidates(bundle, config.model)}
    assert [*candidates] == ["resnet20-24", "resnet20-16", "cnn-32", "lenet5-32"]
    assert candidates["resnet20-24"].size == (24, 30) and candidates["cnn-32"].size == (32, 40)
    assert candidates["resnet20-24"].weights == str(bundle.path) and candidates["cnn-32"].weights == "none"
    fixed = with_config(tmp_path / "lenet", "lenet5", (32, 32), {})  # its weights depend on the size
    candidates = {
        candidate.name: candidate for candidate in default_candidates(fixed, config_of_bundle(fixed, None).model)
    }
    assert [*candidates] == ["lenet5-24", "lenet5-16"] and {candidate.weights for candidate in candidates.values()} == {
        "none"
    }
    assert "resnet20" in NETWORKS and "resnet20-32" not in candidates, "which has more parameters than lenet5"


def test_a_candidates_config_keeps_the_recipe_and_chooses_the_learning_rate_anew(tmp_path: Path) -> None:
    recipe = {
        "optim": {"lr": 0.07, "head_lr": 2.0},
        "augment": {"policy": "cifar"},
        "tracking": {"model_name": "photos"},
    }
    bundle = with_config(tmp_path, "resnet20", (32, 32), recipe)
    config = config_of_bundle(bundle, "digits", ["plugin.py"])
    same_network, other = named_candidates(bundle, config.model, ["resnet20:16", "lenet5"])
    student = config_of(same_network, bundle, config, "small/runs")
    assert (student.optim.lr, student.optim.head_lr, student.loss.teacher) == (None, None, str(bundle.path))
    assert (student.data.sides(), student.data.source, student.trainer.runs_dir) == ((16, 16), "digits", "small/runs")
    assert (
        student.tracking.model_name is None and student.augment == config.augment and student.plugins == ("plugin.py",)
    )
    scratch = config_of(other, bundle, config, "small/runs")
    assert (scratch.model.name, scratch.optim.lr) == ("lenet5", 0.07), "both start from random weights"


def test_a_bundle_that_reads_texts_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "images", "lenet5")
    text = {
        "name": "hashing",
        "max_length": 8,
        "pooling": "mean",
        "args": {},
        "config": None,
        "fusion": "concat",
        "width": 8,
    }
    reading = replace(bundle, info=replace(bundle.info, text=text))
    with pytest.raises(ShrinkError, match="reads texts, and shrink has smaller networks for images only"):
        config_of_bundle(reading, None)


def row(name: str, accuracy: float, megabytes: float, latency: float) -> Row:
    return Row(
        name=name, network=name, image_size=(32, 32), precision="float32", runtime="pytorch", folder=name, accuracy=accuracy,
        difference=accuracy - 0.9, low=0.0, high=0.0, p_value=1.0, agreement=1.0, megabytes=megabytes, shortest_ms=latency,
        median_ms=latency,
    )  # fmt: skip


few = st.sampled_from([0.5, 0.85, 0.9, 0.95])
lists = st.lists(st.tuples(few, few, few), min_size=1, max_size=8).map(
    lambda values: [row(str(i), *numbers) for i, numbers in enumerate(values)]
)


@given(lists, few, st.sampled_from([0.0, 5.0, 100.0]))
def test_the_choice_is_the_best_of_those_that_fit_and_is_not_dominated_by_them(
    rows: list[Row], budget: float, max_loss: float
) -> None:
    optimal = pareto(rows)
    assert any(optimal)
    for each, is_optimal in zip(rows, optimal, strict=True):
        better = [other for other in rows if dominates(other, each)]
        assert is_optimal == (not better)
        assert is_optimal or any(
            other_optimal for other, other_optimal in zip(rows, optimal, strict=True) if other in better
        )
    fitting = [each for each in rows if each.shortest_ms <= budget and accurate_enough(each, max_loss)]
    choice = choose(rows, budget, max_loss)
    assert (choice.chosen is None) == (not fitting)
    if choice.chosen is not None:
        assert choice.chosen in fitting and choice.chosen.accuracy == max(each.accuracy for each in fitting)
        assert not any(dominates(each, choice.chosen) for each in fitting)
    elif choice.nearest is not None:
        assert choice.nearest.shortest_ms > budget
    printed = table(sorted_rows(rows), choice.chosen, max_loss).splitlines()
    assert len(printed) == len(rows) + 1 and sum("→" in line for line in printed) == (choice.chosen is not None)


def test_without_a_fit_the_nearest_and_the_too_inaccurate_are_named() -> None:
    rows = [row("large", 0.9, 5.0, 8.0), row("middle", 0.895, 2.0, 6.0), row("small", 0.7, 1.0, 2.0)]
    choice = choose(rows, 5.0, 1.0)
    assert choice.chosen is None and choice.nearest is rows[1]
    assert no_fit(rows, choice, 5.0, 1.0) == (
        "no candidate takes at most 5 ms and loses at most 1 points; the nearest is middle float32 (pytorch): 6 ms, 0.50 points; "
        "the most accurate within the budget is small float32 (pytorch), and loses 20.00 points; "
        "raise --budget-ms or --max-loss, or name smaller networks by --networks"
    )
