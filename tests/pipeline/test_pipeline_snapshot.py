"""Snapshots of a run's data: the holdout, the recognition of known content, and what counts as a change."""

import csv
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from small_data import COLORS, make_image, paint, write_image

from refract.augment import Preprocess
from refract.augment.decoding.decode import decode
from refract.models.bundle.bundle import Bundle, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data.manifest import DataError, Manifest, load_manifest
from refract.pipeline.data.splits import write_splits
from refract.pipeline.drift.measure import reference_of
from refract.pipeline.drift.thresholds import THRESHOLDS, Threshold
from refract.pipeline.retraining.data_checks import compared_with_champion, drift_of_new, new_samples
from refract.pipeline.retraining.overlap import trained_on
from refract.pipeline.retraining.run import begin
from refract.pipeline.retraining.snapshot import Snapshot, accept, changed, inputs_digest, read_snapshot, take
from refract.pipeline.retraining.steps import STEPS, Outcome
from refract.pipeline.retraining.workspace import read_run, workspace_of, write

snapshot, validate = STEPS[:2]

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two


def config_at(root: Path, source: str = "images", **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"source": str(root / source), "image_size": 16, "workers": 0},
        "model": {"name": "lenet5"},
        "tracking": {"model_name": "colors"},
        "retrain": {"folder": str(root / "retrain")},
    }
    return config_from_dict({name: values.get(name, {}) | sections.get(name, {}) for name in {**values, **sections}})


def taken(config: Config) -> Snapshot:
    """Take and accept a snapshot."""
    workspace = workspace_of(config)
    snapshot = take(config, workspace)
    accept(workspace, snapshot)
    return snapshot


def test_images_that_moved_are_found_where_they_are(tmp_path: Path) -> None:
    paint(tmp_path / "images", range(10))
    before = taken(config_at(tmp_path))
    shutil.move(tmp_path / "images", tmp_path / "photos")
    after = taken(config_at(tmp_path, "photos"))
    assert after == before, "the content is the same"
    assert changed(after) == []
    assert all(Path(sample.path).exists() for sample in load_manifest(after.manifest).samples)
    assert sorted(file.name for file in after.folder.iterdir()) == [
        "contents.json",
        "files.json",
        "manifest.csv",
        "snapshot.json",
    ]


@pytest.mark.parametrize("key", ["augment.policy", "model.weights", "loss.teacher"])
def test_a_file_that_the_config_names_is_an_input(tmp_path: Path, key: str) -> None:
    paint(tmp_path / "images", range(10))
    section, name = key.split(".")
    file = tmp_path / "named.yaml"
    sections: dict[str, Any] = {section: {name: str(file)}}
    config = config_at(tmp_path, **sections)
    snapshot = taken(config)

    def digest(content: str) -> str:
        file.write_text(content)
        return inputs_digest(config, snapshot, {}, "")

    first = digest("- HorizontalFlip: {p: 0.5}\n")
    assert digest("- HorizontalFlip: {p: 0.9}\n") != first
    assert digest("- HorizontalFlip: {p: 0.5}\n") == first


def test_a_file_that_the_policy_names_is_an_input(tmp_path: Path) -> None:
    table(tmp_path, [("", "ab"[i % 2], f"text number {i}") for i in range(40)])
    synonyms = tmp_path / "synonyms.txt"
    synonyms.write_text("text, words\n")
    policy = [{"WordSubstitute": {"table": str(synonyms)}}]
    config = config_at(
        tmp_path, "m.csv", model={"name": "none"}, text={"name": "hashing"}, augment={"policy": policy}
    )  # fmt: skip
    snapshot = taken(config)
    first = inputs_digest(config, snapshot, {}, "")
    assert inputs_digest(config, snapshot, {}, "") == first
    synonyms.write_text("text, lines\n")
    assert inputs_digest(config, snapshot, {}, "") != first


@pytest.mark.parametrize("key", ["retrain.notify", "trainer.run_name"])
def test_a_key_without_influence_on_the_outcome_is_not_an_input(tmp_path: Path, key: str) -> None:
    paint(tmp_path / "images", range(10))
    snapshot = taken(config_at(tmp_path))
    section, name = key.split(".")
    folder = {"retrain": {"folder": str(tmp_path / "retrain")}}
    sections: dict[str, Any] = {**folder, section: {**folder.get(section, {}), name: "other"}}
    first, second = (
        inputs_digest(config, snapshot, {}, "") for config in (config_at(tmp_path), config_at(tmp_path, **sections))
    )
    assert first == second


def noisy(path: Path, number: int) -> None:
    write_image(path, np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def table(root: Path, rows: list[tuple[str, str, str]]) -> None:
    """path, label, text; images that are not there yet are made."""
    for number, (path, _, _) in enumerate(rows):
        if path and not (root / path).exists():
            noisy(root / path, number)
    with (root / "m.csv").open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("path", "label", "text"), *rows])


def images_of(snapshot: Snapshot, *splits: str) -> set[bytes]:
    manifest = load_manifest(snapshot.manifest, snapshot.task)
    return {sample.read() for split in splits for sample in manifest.of(split)}


def held(snapshot: Snapshot) -> Manifest:
    manifest = load_manifest(snapshot.manifest, snapshot.task)
    return manifest.with_samples(manifest.of("test"))


@pytest.mark.parametrize("label", ["c", "a;c"])
def test_a_label_that_comes_later_is_held_out_of_what_is_new(tmp_path: Path, label: str) -> None:
    rows = [(f"p/{i}.png", ["a", "b", "a;b", ""][i % 4], "") for i in range(60)]
    table(tmp_path, rows)
    config = config_at(tmp_path, "m.csv", data={"source": str(tmp_path / "m.csv"), "task": "multilabel"})
    first = taken(config)
    table(tmp_path, [*rows, *((f"p/{i}.png", label, "") for i in range(60, 90))])
    second = taken(config)
    assert second.counts["test"]["c"] == 6
    assert not images_of(first, "train", "val") & images_of(second, "test"), "no image that a run has trained on"
    assert taken(config) == second


def test_a_class_without_new_samples_for_the_holdout_is_named(tmp_path: Path, caplog: Any) -> None:
    rows = [(f"p/{i}.png", "ab"[i % 2], "") for i in range(40)]
    table(tmp_path, [*rows, ("p/40.png", "c", ""), ("p/41.png", "c", "")])
    config = config_at(tmp_path, "m.csv")
    first = taken(config)
    with caplog.at_level(logging.WARNING):
        second = taken(config)
    assert second == first
    assert "the holdout has no image of c" in caplog.text
    table(tmp_path, [*rows, *((f"p/{i}.png", "cd"[i > 41], "") for i in range(40, 44))])
    with pytest.raises(DataError, match="too few images of d for a holdout"):
        taken(config)


@pytest.mark.parametrize("class_stays", [False, True])
def test_a_class_of_a_refused_run_is_held_out_if_it_stays(tmp_path: Path, class_stays: bool) -> None:
    paint(tmp_path / "images", range(10))
    config = config_at(tmp_path, retrain={"folder": str(tmp_path / "retrain"), "drift": "none"})
    workspace, first = workspace_of(config), taken(config)
    accepted = {"run": "first", "inputs": "", "snapshot": first.record(), "snapshot_folder": str(first.folder)}
    write(workspace.root / "last.json", accepted)
    for number in range(10):
        noisy(tmp_path / "images/rubbish" / f"{number}.png", number)
    shutil.move(tmp_path / "images/red", tmp_path / "red")
    for number in range(3):
        write_image(tmp_path / f"images/red/{number}.png", make_image("red", number, side=16))
    folder = begin(config, force=False)
    snapshot(folder)
    validate(folder)
    assert read_run(folder)["ends"] == Outcome.REFUSED
    shutil.rmtree(tmp_path / "images/red")
    shutil.move(tmp_path / "red", tmp_path / "images/red")
    if class_stays:
        folder = begin(config, force=False)
        snapshot(folder)
        validate(folder)
        assert "ends" not in read_run(folder)
        held = load_manifest(workspace.holdout / "holdout.csv")
        assert held.counts()["rubbish"] == 2, "no run trained on it, so it is held out as any new class"
    else:
        shutil.rmtree(tmp_path / "images/rubbish")
        assert taken(config) == first


def test_a_holdout_prepared_by_one_run_is_never_accepted_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two files that `freeze` writes, while the second one of an earlier run still exists."""
    paint(tmp_path / "images", range(10))
    config = config_at(tmp_path)
    workspace, first = workspace_of(config), taken(config)
    before = (workspace.holdout / "holdout.csv").read_bytes()
    write(workspace.holdout / "next.json", {"digest": first.holdout, "source": None})
    for number in range(10):
        noisy(tmp_path / "images/rubbish" / f"{number}.png", number)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("refract.pipeline.retraining.holdout.write", dies)
        with pytest.raises(KeyboardInterrupt):
            take(config, workspace)
    assert (workspace.holdout / "next.csv").exists()
    accept(workspace, first)
    assert (workspace.holdout / "holdout.csv").read_bytes() == before


def test_an_image_in_train_and_in_val_is_refused(tmp_path: Path) -> None:
    for split, numbers in (("train", range(10)), ("val", range(10, 15)), ("test", range(15, 20))):
        paint(tmp_path / "images" / split, numbers)
    shutil.copy(tmp_path / "images/train/red/000.png", tmp_path / "images/val/red/copy.png")
    with pytest.raises(DataError, match="1 images are in more than one split"):
        taken(config_at(tmp_path))
    assert not workspace_of(config_at(tmp_path)).holdout.exists(), "nothing was frozen"
    config = config_at(tmp_path).changed({"data.on_bad_file": "skip"})
    assert taken(config).counts["train"]["red"] == 9


def test_classes_that_the_own_test_split_lacks_are_drawn(tmp_path: Path) -> None:
    for split, labels in (("train", COLORS), ("val", COLORS), ("test", ["red"])):
        paint(
            tmp_path / "images" / split,
            {"train": range(10), "val": range(10, 15), "test": range(15, 20)}[split],
            labels,
        )
    config = config_at(tmp_path)
    first = taken(config)
    assert first.counts["test"] == {"blue": 3, "green": 3, "red": 5}
    assert not images_of(first, "train", "val") & images_of(first, "test")
    assert taken(config) == first


def test_data_that_are_refused_freeze_nothing(tmp_path: Path) -> None:
    paint(tmp_path / "images", range(10))
    (tmp_path / "images" / "empty").mkdir()
    config = config_at(tmp_path)
    with pytest.raises(DataError, match="contain no images"):
        taken(config)
    assert not workspace_of(config).holdout.exists()


def test_texts_are_held_out_as_they_are(tmp_path: Path) -> None:
    table(tmp_path, [("", "ab"[i % 2], f"number {i}\rsecond line, {i}") for i in range(40)])
    config = config_at(tmp_path, "m.csv", model={"name": "none"}, text={"name": "hashing"})
    first = taken(config)
    assert sum(first.counts["test"].values()) == 8
    assert all("\r" in sample.text for sample in held(first).samples)
    assert taken(config) == first


@pytest.mark.parametrize("source", ["digits", "m.csv"])
def test_samples_without_files_are_known_again(tmp_path: Path, source: str) -> None:
    table(tmp_path, [("", "ab"[i % 2], f"number {i}") for i in range(40)])
    texts = {"model": {"name": "none"}, "text": {"name": "hashing"}}
    config = config_at(tmp_path, source, **(texts if source == "m.csv" else {"data": {"source": "digits"}}))
    workspace, first = workspace_of(config), taken(config)
    assert trained_on(workspace, first.digest, held(first).samples) == frozenset()
    whole = load_manifest(first.manifest)
    trained = whole.with_samples([sample for sample in whole.samples if sample.split != "test"])
    assert trained_on(workspace, first.digest, trained.samples) == {sample.key for sample in trained.samples}
    assert trained_on(workspace, "0" * 64, trained.samples) is None


def test_a_held_out_image_saved_again_is_not_trained_on(tmp_path: Path, caplog: Any) -> None:
    paint(tmp_path / "images", range(20))
    config = config_at(tmp_path)
    first = taken(config)
    for number, sample in enumerate(held(first).samples):
        target = tmp_path / "images" / sorted(COLORS)[sample.labels[0]] / f"again{number}.png"
        target.write_bytes(
            cv2.imencode(".png", decode(sample.read())[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
        )
    with caplog.at_level(logging.WARNING):
        assert taken(config) == first
    assert "excluded 12 images that the holdout has in another file" in caplog.text


@pytest.mark.parametrize("first", ["texts", "images"])
def test_the_holdout_is_excluded_whatever_the_network_reads(tmp_path: Path, first: str) -> None:
    table(tmp_path, [(f"p/{i}.png", "ab"[i % 2], f"number {i}") for i in range(40)])
    texts = config_at(tmp_path, "m.csv", model={"name": "none"}, text={"name": "hashing"})
    images = config_at(tmp_path, "m.csv")
    for config in (texts, images) if first == "texts" else (images, texts):
        snapshot = taken(config)
        assert sum(snapshot.counts["test"].values()) == 8
        assert not images_of(snapshot, "train", "val") & images_of(snapshot, "test")


def test_a_gate_holdout_that_is_set_later_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "images", range(20))
    paint(tmp_path / "own", range(100, 104))
    taken(config_at(tmp_path))
    config = config_at(tmp_path, gate={"holdout": str(tmp_path / "own")})
    with pytest.raises(DataError, match="is not the source of the frozen .*move the folder away"):
        taken(config)
    shutil.rmtree(workspace_of(config).holdout)
    first = taken(config)
    assert first.counts["test"] == dict.fromkeys(COLORS, 4)

    for number in range(10):
        noisy(tmp_path / "images/yellow" / f"{number}.png", number)
    assert taken(config).counts["test"] == {**dict.fromkeys(COLORS, 4), "yellow": 2}, "a class that comes later"
    paint(tmp_path / "own", range(104, 105))
    with pytest.raises(DataError, match=r"gate\.holdout: .*own is not the source"):
        taken(config)
    shutil.rmtree(tmp_path / "own")
    assert sum(taken(config).counts["test"].values()) == 14, "it was copied"


def champion(root: Path, snapshot: Snapshot) -> Bundle:
    """Build an untrained bundle with the snapshot's holdout and validation data as its reference."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}
    info = BundleInfo(
        name="colors",
        task="multiclass",
        labels=tuple(COLORS),
        network={"name": "lenet5", "image_size": [16, 16], "args": {}},
        preprocess={"height": 16, "width": 16, "resize": "squash", **values},
        created="2026-11-05T03:00:00+00:00",
    )
    classifier = Classifier(build("lenet5", 3, image_size=(16, 16)), **values).eval()
    manifest = load_manifest(snapshot.manifest)
    kinds: dict[str, Any] = {"task": "multiclass", "temperature": 1.0, "thresholds": ()}
    seen = reference_of(classifier, Preprocess(16, 16, resize="squash"), manifest, **kinds)
    golden_samples = [GoldenSample("00.png", manifest.samples[0].read(), (0.2, 0.3, 0.5))]
    return load_bundle(save_bundle(root / "bundle", info, classifier, golden_samples, reference=seen.to_bytes()))


def test_new_classes_are_reported_and_do_not_stop_a_run(tmp_path: Path) -> None:
    paint(tmp_path / "images", range(40))
    first = taken(config_at(tmp_path))
    bundle = champion(tmp_path, first)
    paint(tmp_path / "images", range(40, 50))
    for number in range(40):
        noisy(tmp_path / "images/yellow" / f"{number}.png", number)
    new = new_samples(taken(config_at(tmp_path)), first.folder)
    thresholds = {**THRESHOLDS, "new classes": Threshold(0.0, None), "vanished classes": Threshold(None, None)}
    drift = drift_of_new(bundle, new, thresholds, tmp_path).drift
    assert drift["checks"]["features"]["level"] == "none", "the noise is excluded"
    assert drift["checks"]["new classes"] == {"effect": pytest.approx(32 / 62), "level": "warn"}
    assert drift["level"] == "warn"
    assert drift["summary"].startswith("new classes 0.516 (warn), of 62 new images, without those of yellow")
    stopped = drift_of_new(bundle, new, {**thresholds, "new classes": Threshold(0.0, 0.5)}, tmp_path).drift
    assert stopped["level"] == "stop" and "new classes 0.516 (stop)" in stopped["summary"], "who asks for it"
    mild = drift_of_new(bundle, new, {**thresholds, "new classes": Threshold(0.0, 0.5)}, tmp_path, stops=False).drift
    assert mild["summary"].startswith("new classes 0.516 (large, reported only), of 62 new images"), "nothing stops"

    new = replace(new, of_images=[one for one in new.of_images if one[1] == ["yellow"]])
    alone = drift_of_new(bundle, new, thresholds, tmp_path).drift
    assert alone["level"] == "warn"
    assert "not compared: 0 new images are of classes that the champion knows, too few" in alone["summary"]


def test_a_champion_with_a_small_reference_does_not_fail_a_run(tmp_path: Path) -> None:
    paint(tmp_path / "images", range(12))
    first = taken(config_at(tmp_path))
    paint(tmp_path / "images", range(12, 30))
    new = new_samples(taken(config_at(tmp_path)), first.folder)
    drift = drift_of_new(champion(tmp_path, first), new, THRESHOLDS, tmp_path).drift
    assert drift["level"] == "none"
    assert "not compared: " in drift["summary"] and "of the reference; 20 of each are needed" in drift["summary"]


def test_drift_says_that_it_does_not_look_at_texts(tmp_path: Path) -> None:
    rows = [("", "ab"[i % 2], f"number {i}") for i in range(60)]
    table(tmp_path, rows[:40])
    config = config_at(tmp_path, "m.csv", model={"name": "none"}, text={"name": "hashing"})
    first = taken(config)
    assert new_samples(first, first.folder).text() == "0 new images"
    table(tmp_path, rows)
    text = new_samples(taken(config), first.folder).text()
    assert text == "0 new images, and 20 texts without an image, which are not compared"


def test_the_first_holdout_respects_what_the_champion_was_trained_on(tmp_path: Path, new_tracking: Path) -> None:
    """`splits.csv` as `refract train` leaves it in MLflow, with other splits than a run would draw."""
    from mlflow import MlflowClient

    from refract.pipeline.retraining.champion_data import data_of_first_champion
    from refract.pipeline.retraining.overlap import holdout_line
    from refract.pipeline.tracking.aliases import CHAMPION

    shutil.copy(new_tracking, tmp_path / "mlflow.db")
    paint(tmp_path / "images", range(40))
    config = config_at(tmp_path, tracking={"model_name": "colors", "uri": f"sqlite:///{tmp_path}/mlflow.db"})
    workspace, client = workspace_of(config), MlflowClient(config.tracking.uri, config.tracking.uri)
    whole = load_manifest(tmp_path / "images")
    splits = ["test", "val", "train", "train"]
    samples = [replace(sample, split=splits[i % 4]) for i, sample in enumerate(whole.samples)]
    write_splits(whole.with_samples(samples), tmp_path / "splits.csv")
    run = client.create_run(client.create_experiment("e", artifact_location=f"file://{tmp_path}/mlruns")).info.run_id
    client.create_registered_model("colors")
    version = client.create_model_version("colors", source="file:///nowhere", run_id=run).version
    client.set_registered_model_alias("colors", CHAMPION, version)
    assert data_of_first_champion(config, workspace) is None, "no splits.csv yet"
    drawn = take(config, workspace)
    line = holdout_line(config, workspace, drawn.digest, load_manifest(drawn.manifest).of("test"), client, version)
    assert line.passed is None and "unknown" in line.summary and "gate.holdout" in line.summary

    client.log_artifact(run, str(tmp_path / "splits.csv"))
    folder = begin(config, force=False)
    snapshot(folder)
    record = read_run(folder)
    first = read_snapshot(Path(record["snapshot_folder"]), record["snapshot"])
    checked, labels = compared_with_champion(config, first, workspace, folder)
    assert "0 new images, too few" in checked["summary"] and "0 new images, too few" in labels["summary"]
    assert new_samples(first, None).text().startswith("90 new images (the champion's training data are ")
    held = load_manifest(first.manifest).of("test")
    tested = [sample for sample in samples if sample.split == "test"]
    assert {sample.read() for sample in held} == {sample.read() for sample in tested}
    assert holdout_line(config, workspace, first.digest, held, client, version).passed
    learned = [sample for sample in load_manifest(first.manifest).samples if sample.split != "test"]
    line = holdout_line(config, workspace, first.digest, learned, client, version)
    assert line.summary == "90 of its images were trained on", "by both models, each image counted once"
    (tmp_path / "images/red/001.png").unlink()
    assert holdout_line(config, workspace, first.digest, held, client, version).passed, "its own test split, still"
    assert holdout_line(config, workspace, first.digest, whole.samples[8:9], client, version).passed
    noisy(tmp_path / "strange.png", 0)
    strange = replace(held[0], path=str(tmp_path / "strange.png"))
    assert holdout_line(config, workspace, first.digest, [strange], client, version).passed is None, "001.png, perhaps"
    line = holdout_line(config, workspace, drawn.digest, load_manifest(drawn.manifest).of("test"), client, version)
    assert line.passed is False and "of its images were trained on; if" in line.summary

    for sample in tested:
        Path(sample.path).unlink()
    again = take(config, workspace, data_of_first_champion(config, workspace))
    assert sum(again.counts["test"].values()) == 18, "a fifth of each class, as all else was trained on"
    accept(workspace, again)
    assert data_of_first_champion(config, workspace) is None, "the holdout is frozen"
