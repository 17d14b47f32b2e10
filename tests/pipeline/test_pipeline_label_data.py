"""`data.labels`: a label history corrects labels, adds and excludes images before the data is split."""

import hashlib
import logging
from collections import Counter
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from small_data import make_image, paint, write_image

from refract.models.bundle.info import BundleInfo
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.data.manifest import DataError, Manifest, load_manifest
from refract.pipeline.data.prepare import prepare_data, prepare_folds, split_as_trained
from refract.pipeline.labels.address import pinned, split_address
from refract.pipeline.labels.apply import path_of
from refract.pipeline.labels.decisions import Action, Decision
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.retraining.data_checks import problems
from refract.pipeline.retraining.label_checks import label_changes
from refract.pipeline.retraining.snapshot import Snapshot, accept, inputs_digest, read_snapshot, take
from refract.pipeline.retraining.workspace import workspace_of
from refract.pipeline.training.fit import with_decisions_of_rank_0
from refract.pipeline.training.ranks import PUBLISHED

IMAGES = frozenset({"images"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    paint(tmp_path / "images", range(12))
    return tmp_path


@pytest.fixture
def history(root: Path) -> LabelHistory:
    return LabelHistory(root / "labels.db", create=True)


def config_at(root: Path, source: str = "images", **data: Any) -> Config:
    values = {
        "data": {"source": str(root / source), "image_size": 16, "labels": str(root / "labels.db"), **data},
        "model": {"name": "lenet5"},
        "tracking": {"model_name": "colors", "uri": f"sqlite:///{root}/mlflow.db"},
        "retrain": {"folder": str(root / "retrain")},
    }
    return config_from_dict(values)


def files(root: Path, label: str) -> list[Path]:
    return sorted((root / "images" / label).iterdir())


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def decide(history: LabelHistory, file: Path, action: Action, *labels: str, reviewer: str = "ann") -> int:
    path = history.relative(file)
    return history.append(Decision(content=digest(file), path=path, action=action, labels=labels, reviewer=reviewer))


def short(path: str | Path) -> str:
    """The class folder and the file name."""
    return "/".join(Path(path).parts[-2:])


def labels_of(manifest: Manifest) -> dict[str, str]:
    return {short(s.path): ";".join(manifest.labels[i] for i in s.labels) for s in manifest.samples}


def splits_of(manifest: Manifest) -> dict[str, str]:
    return {short(sample.path): sample.split for sample in manifest.samples}


def test_without_decisions_the_data_and_its_fingerprint_are_those_of_the_source(
    root: Path, history: LabelHistory
) -> None:
    plain, identity = prepare_data(config_at(root, labels=None))
    manifest, with_history = prepare_data(config_at(root))
    assert manifest == plain
    assert {key: with_history[key] for key in identity} == identity
    assert (with_history["label_decisions"], with_history["label_changes"]) == ("0", "0 decisions")


def test_decisions_correct_exclude_confirm_and_add_images(root: Path, history: LabelHistory) -> None:
    first, second, third, fourth = files(root, "red")[:4]
    decide(history, first, "relabel", "blue")
    decide(history, second, "exclude")
    decide(history, third, "confirm", "red")
    decide(history, fourth, "skip")
    write_image(root / "new" / "extra.png", make_image("green", 99, side=16))
    decide(history, root / "new" / "extra.png", "add", "green")
    manifest, identity = prepare_data(config_at(root))
    labels = labels_of(manifest)
    assert (labels[short(first)], labels[short(third)], labels[short(fourth)]) == ("blue", "red", "red")
    assert short(second) not in labels and labels["new/extra.png"] == "green"
    assert identity["label_decisions"] == "4"
    assert identity["label_changes"] == "4 decisions: 1 corrected (red → blue 1), 1 added, 1 excluded, 1 confirmed"
    assert identity["fingerprint"] != prepare_data(config_at(root, labels=None))[1]["fingerprint"]


def test_the_digest_is_that_of_the_decisions_and_not_of_who_made_them(root: Path, history: LabelHistory) -> None:
    decide(history, files(root, "red")[0], "relabel", "blue")
    before = prepare_data(config_at(root))[1]
    decide(history, files(root, "red")[0], "confirm", "blue", reviewer="bob")
    assert prepare_data(config_at(root))[1] == before
    decide(history, files(root, "red")[0], "confirm", "green", reviewer="bob")
    after = prepare_data(config_at(root))[1]
    assert all(after[key] != before[key] for key in ("fingerprint", "content", "label_state"))


def test_samples_keep_their_split_and_added_ones_keep_theirs(root: Path, history: LabelHistory) -> None:
    before = splits_of(prepare_data(config_at(root, labels=None))[0])
    for file in files(root, "red")[:3]:
        decide(history, file, "relabel", "blue")
    decide(history, files(root, "blue")[0], "exclude")
    for number in range(4):
        write_image(root / "new" / f"n{number}.png", make_image("green", 100 + number, side=16))
        decide(history, root / "new" / f"n{number}.png", "add", "green")
    now = splits_of(prepare_data(config_at(root))[0])
    assert {name: split for name, split in now.items() if not name.startswith("new/")} == {
        name: split for name, split in before.items() if name != short(files(root, "blue")[0])
    }
    for number in range(4, 30):
        write_image(root / "new" / f"n{number}.png", make_image("green", 100 + number, side=16))
        decide(history, root / "new" / f"n{number}.png", "add", "green")
    later = splits_of(prepare_data(config_at(root))[0])
    assert {name: later[name] for name in now} == now
    assert len({split for name, split in later.items() if name.startswith("new/")}) > 1


def test_new_classes_extend_the_sorted_classes_and_get_a_training_image(root: Path, history: LabelHistory) -> None:
    manifest = prepare_data(config_at(root, labels=None))[0]
    tested = [Path(sample.path) for sample in manifest.of("test")][:2]
    for file in tested:
        decide(history, file, "relabel", "orange")
    corrected = prepare_data(config_at(root))[0]
    assert corrected.labels == ("blue", "green", "orange", "red") and corrected.task == "multiclass"
    assert Counter(sample.split for sample in corrected.samples if sample.labels == (2,)) == {"train": 1, "test": 1}


def test_an_empty_class_folder_can_get_its_images_by_decisions(root: Path, history: LabelHistory) -> None:
    (root / "images" / "orange").mkdir()
    with pytest.raises(DataError, match="class folders contain no images"):
        prepare_data(config_at(root))
    for file in files(root, "red")[:4]:
        decide(history, file, "relabel", "orange")
    assert prepare_data(config_at(root))[0].counts()["orange"] == 4


def test_classes_can_be_merged_and_binary_data_can_gain_a_class(root: Path, history: LabelHistory) -> None:
    for file in files(root, "red"):
        decide(history, file, "relabel", "green")
    merged = prepare_data(config_at(root))[0]
    assert merged.labels == ("blue", "green") and merged.task == "binary"
    for file in files(root, "blue")[:6]:
        decide(history, file, "relabel", "sky")
    assert prepare_data(config_at(root))[0].task == "multiclass"
    for file in [*files(root, "blue"), *files(root, "green"), *files(root, "red")]:
        decide(history, file, "relabel", "green")
    with pytest.raises(DataError, match="only one class"):
        prepare_data(config_at(root))


def test_a_third_class_does_not_fit_a_binary_task(root: Path, history: LabelHistory) -> None:
    rmtree(root / "images" / "red")
    for file in files(root, "blue")[:6]:
        decide(history, file, "relabel", "sky")
    with pytest.raises(ConfigError, match=r"the data has 3 classes: blue, green, sky; set data.task: multiclass"):
        prepare_data(config_at(root, task="binary"))


def test_decisions_resolve_copies_with_other_labels(root: Path, history: LabelHistory) -> None:
    file = files(root, "red")[0]
    copy = root / "images" / "blue" / "copy.png"
    copy.write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="copies with other labels"):
        prepare_data(config_at(root))
    decide(history, file, "relabel", "red")
    labels = labels_of(prepare_data(config_at(root))[0])
    assert labels["blue/copy.png"] == labels[short(file)] == "red"


def test_images_that_changed_are_reported_and_not_corrected(
    root: Path, history: LabelHistory, caplog: pytest.LogCaptureFixture
) -> None:
    file, gone = files(root, "red")[:2]
    decide(history, file, "relabel", "blue")
    write_image(file, make_image("red", 77, side=16))
    decide(history, gone, "exclude")
    gone.unlink()  # excluded and then removed: nothing to report
    write_image(root / "new.png", make_image("green", 99, side=16))
    decide(history, root / "new.png", "add", "green")
    write_image(root / "new.png", make_image("green", 98, side=16))
    decide(history, files(root, "green")[0], "relabel", "red")
    files(root, "green")[0].unlink()
    with caplog.at_level(logging.WARNING):
        manifest, identity = prepare_data(config_at(root))
    assert labels_of(manifest)[short(file)] == "red" and short(root / "new.png") not in labels_of(manifest)
    assert identity["label_decisions"] == "0"
    assert f"not applied: 3, such as decision 3: the bytes of {root}/new.png have changed" in caplog.text


def test_conflicts_are_reported_and_the_last_decision_applies(
    root: Path, history: LabelHistory, caplog: pytest.LogCaptureFixture
) -> None:
    decide(history, files(root, "red")[0], "relabel", "blue")
    decide(history, files(root, "red")[0], "relabel", "green", reviewer="bob")
    with caplog.at_level(logging.WARNING):
        assert labels_of(prepare_data(config_at(root))[0])[short(files(root, "red")[0])] == "green"
    assert f"conflicting decisions, of which the last applies: 1; `refract labels log {root}/labels.db" in caplog.text


def test_tables_keep_their_splits_and_multilabel_takes_several_labels(root: Path, history: LabelHistory) -> None:
    rows = [f"{file},{file.parent.name},{split}" for label in ("red", "green", "blue")
            for file, split in zip(files(root, label), ["train"] * 8 + ["val"] * 2 + ["test"] * 2, strict=True)]  # fmt: skip
    (root / "m.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    decide(history, files(root, "red")[11], "relabel", "blue", "green")
    with pytest.raises(
        ConfigError, match=r"decision 1: images/red/.* has the labels 'blue;green', but the task is multiclass"
    ):
        prepare_data(config_at(root, "m.csv"))
    write_image(root / "new.png", make_image("green", 99, side=16))
    decide(history, root / "new.png", "add", "green")
    manifest = prepare_data(config_at(root, "m.csv", task="multilabel"))[0]
    assert labels_of(manifest)[short(files(root, "red")[11])] == "blue;green"
    splits = splits_of(manifest)
    assert (splits[short(files(root, "red")[11])], splits[short(root / "new.png")]) == ("test", "train")
    assert Counter(splits.values()) == {"train": 25, "val": 6, "test": 6}


def test_embedded_images_are_corrected(root: Path, history: LabelHistory) -> None:
    digits = load_manifest("digits")
    sample = digits.samples[3]
    content = hashlib.sha256(sample.read()).hexdigest()
    path = path_of(history, sample)
    history.append(Decision(content=content, path=path, action="relabel", labels=("8",), reviewer="ann"))
    manifest, identity = prepare_data(config_at(root).changed({"data.source": "digits"}))
    assert path == "digits/0003.png" and labels_of(manifest)["digits/0003.png"] == "8"
    assert identity["label_changes"] == "1 decision: 1 corrected (3 → 8 1)"


def pinned_at(root: Path) -> Config:
    return config_at(root, labels=pinned(config_at(root).data.labels))


def test_a_pinned_history_ignores_later_decisions(root: Path, history: LabelHistory) -> None:
    decide(history, files(root, "red")[0], "relabel", "blue")
    config = pinned_at(root)
    assert config.data.labels == f"{root}/labels.db@1" and pinned(config.data.labels) == config.data.labels
    before = prepare_data(config)
    folds = prepare_folds(config.changed({"trainer.folds": 3}))
    decide(history, files(root, "red")[1], "exclude")
    assert prepare_data(config) == before and prepare_data(config_at(root)) != before
    assert folds.of(1)[1]["label_state"] == before[1]["label_state"]
    assert split_address("postgresql://ann@host/db@7") == ("postgresql://ann@host/db", 7)
    assert split_address("postgresql://ann@host/db") == ("postgresql://ann@host/db", None)


def test_the_ranks_that_rank_0_starts_use_its_decisions(
    root: Path, history: LabelHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PUBLISHED, '{"labels": "of an earlier training"}')
    config = with_decisions_of_rank_0(config_at(root))
    decide(history, files(root, "red")[0], "relabel", "blue")  # while rank 0 prepares the data
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert with_decisions_of_rank_0(config_at(root)) == config != pinned_at(root)


def test_the_training_images_of_a_bundle_are_recognised_with_its_decisions(root: Path, history: LabelHistory) -> None:
    decide(history, files(root, "red")[0], "relabel", "blue")
    config = pinned_at(root)
    manifest, identity = prepare_data(config)
    info = BundleInfo(
        name="colors",
        task="multiclass",
        labels=manifest.labels,
        network={"name": "lenet5", "image_size": [16, 16], "args": {}},
        preprocess={"height": 16, "width": 16, "resize": "squash", "mean": [0.5] * 3, "std": [0.25] * 3},
        created="2026-11-05T03:00:00+00:00",
        config=config.to_dict(),
        data={**identity, "source": config.data.source},
    )
    decide(history, files(root, "red")[1], "exclude")
    assert split_as_trained(info, load_manifest(config.data.source)) == manifest


def test_a_database_that_cannot_be_used_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.labels: .*labels.db: no such label database"):
        prepare_data(config_at(root))
    with pytest.raises(
        ConfigError, match=r"data.labels: 'postgresql://\*\*\*@host/db' is not an address without a password"
    ):
        config_at(root, labels="postgresql://ann:secret@host/db")
    with pytest.raises(ConfigError, match=r"db\?password=\*\*\*' is not an address without a password"):
        config_at(root, labels="postgresql://ann@host/db?password=secret")


def test_a_database_that_lacks_the_last_decision_of_a_run_is_refused(root: Path, history: LabelHistory) -> None:
    decide(history, files(root, "red")[0], "relabel", "blue")
    for number in (2, 10**30):  # an older copy, or a typing error
        with pytest.raises(ConfigError, match=f"ends with decision 1, before decision {number}; restore the database"):
            prepare_data(config_at(root, labels=f"{root}/labels.db@{number}"))


def taken(config: Config) -> Snapshot:
    snapshot = take(config, workspace_of(config))
    accept(workspace_of(config), snapshot)
    return snapshot


def test_corrections_are_no_loss_of_data_but_lost_files_are(root: Path, history: LabelHistory) -> None:
    config = config_at(root)
    first = taken(config)
    held = {digest(Path(sample.path)) for sample in load_manifest(first.manifest).of("test")}
    red, blue = ([one for one in files(root, label) if digest(one) not in held] for label in ("red", "blue"))
    numbers = [decide(history, one, "relabel", "blue") for one in red[:4]]
    numbers += [decide(history, one, "exclude") for one in blue[:4]]
    second = taken(config)
    assert problems(second, first, 0.2, IMAGES) == []
    for number in numbers:
        history.undo(number, reviewer="ann")
    assert problems(taken(config), second, 0.2, IMAGES) == [], "nor are undone ones"
    for one in red[:4]:
        decide(history, one, "relabel", "blue")
    for file in red[3:7]:
        file.unlink()
    assert problems(taken(config), first, 0.2, IMAGES) == [
        f"red: {len(red) - 4} samples outside the holdout, {len(red)} in the last accepted run (40% fewer, at most 20% is accepted), "
        "with 3 that decisions have moved"
    ]


def test_a_retraining_snapshot_records_the_decisions_and_counts_them_apart(
    root: Path, history: LabelHistory, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_at(root)
    first = taken(config)
    held = {digest(Path(sample.path)): sample for sample in load_manifest(first.manifest).of("test")}
    frozen, others = ([file for file in files(root, label) if digest(file) in held] for label in ("red", "blue"))
    trained = [file for file in files(root, "red") if digest(file) not in held]
    decide(history, trained[0], "relabel", "blue")
    decide(history, frozen[0], "relabel", "blue")
    decide(history, others[0], "exclude")
    with caplog.at_level(logging.INFO):
        second = taken(config)
    assert "holdout: decisions correct 2 images: 1 relabelled (red → blue 1), 1 excluded" in caplog.text
    manifest = load_manifest(second.manifest)
    labels = {digest(Path(sample.path)): manifest.labels[sample.labels[0]] for sample in manifest.samples}
    assert [labels.get(digest(file)) for file in (trained[0], frozen[0], others[0])] == ["blue", "blue", None]
    assert second.digest != first.digest and second.labels["label_decisions"] == "3"
    assert read_snapshot(second.folder, second.record()) == second
    trained[1].rename(root / "images" / "blue" / "moved.png")  # not by a decision
    changes = label_changes(taken(config), first, IMAGES)
    assert (
        changes.text() == f"1 of {changes.known} known samples changed label: red → blue 1; decisions corrected 1 more"
    )
    elsewhere = config.changed({"data.labels": f"{root}/labels.db@2"})
    assert inputs_digest(config, second, {}, "") == inputs_digest(elsewhere, second, {}, "")
