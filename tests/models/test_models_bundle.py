"""The bundle: it loads bit by bit as saved, and the error for an altered file names it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from refract.models.bundle.bundle import Bundle, BundleError, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier
from refract.models.registry import NETWORKS, build

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
INFO = BundleInfo(
    name="insects",
    task="multiclass",
    labels=("ant", "bee", "Käfer"),
    network={"name": "resnet20", "image_size": [32, 32], "args": {}},
    preprocess={"height": 32, "width": 32, "resize": "crop", "mean": list(MEAN), "std": list(STD)},
    temperature=1.25,
    metrics={"accuracy": 0.5},
    data={"fingerprint": "abc", "counts": {"train": 3}},
    config={"trainer": {"epochs": 2}},
    versions={"torch": "2.15.0"},
    created="2026-11-05T03:00:00+00:00",
)
GOLDENS = (GoldenSample("00.jpg", b"first image", (0.1, 0.2, 0.7)), GoldenSample("01.png", b"second", (1.0, 0.0, 0.0)))
FILES = ["bundle.json", "weights.safetensors", "golden/00.jpg", "golden/01.png"]


def make_classifier(name: str = "resnet20", *, seed: int = 0, **args: Any) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(build(name, 3, image_size=(32, 32), **args), mean=MEAN, std=STD).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bundle(tmp_path / "bundle", INFO, make_classifier(), GOLDENS)


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json and update its hash, as an attacker would."""
    record = json.loads((folder / "bundle.json").read_text())
    change(record)
    (folder / "bundle.json").write_text(json.dumps(record))
    rehash(folder, "bundle.json")


def rehash(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    change_manifest(folder, {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}})


def change_manifest(folder: Path, files: dict[str, Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {**manifest["files"], **files}}))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *((name, {}) for name in NETWORKS),
        ("resnet18", {}),
        ("timm/resnet10t", {"drop_rate": 0.1}),
        ("resnet20", {"head": "cosine"}),
        ("resnet18", {"head": "mlp"}),
        ("mlp", {"hidden": [8, 8], "activation": "maxout", "activation_args": {"pieces": 3}}),
        (
            "cnn",
            {
                "conv": "shuffled",
                "norm": "weight_standardisation",
                "pool": "stochastic",
                "global_pool": "generalised_mean",
            },
        ),
        ("linear", {"features": "visual_words", "words": 16}),
        ("linear", {"features": "colour_histogram"}),
    ],
)
def test_logits_are_restored_bit_by_bit(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    classifier = make_classifier(name, **args)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    classifier.train()(images)  # moves batch norm's statistics away from their start
    classifier.eval()
    info = replace(INFO, network={"name": name, "image_size": [32, 32], "args": args})
    again = load_bundle(save_bundle(tmp_path / "b", info, classifier, GOLDENS)).classifier()
    assert torch.equal(again(images), classifier(images))
    assert not again.training
    assert {tensor.dtype for tensor in again.parameters()} == {torch.float32}


def test_the_metadata_and_golden_samples_are_restored(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert isinstance(bundle, Bundle)
    assert (bundle.path, bundle.info, bundle.golden_samples) == (folder, INFO, GOLDENS)
    assert bundle.digest == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert BundleInfo.from_json(INFO.to_json()) == INFO
    written = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert written == sorted([*FILES, "manifest.json"])


def test_weights_are_stored_as_plain_float32(tmp_path: Path) -> None:
    """bf16, channels_last, compiled, a tied layer: the file holds plain float32 under the network's own names."""
    classifier = make_classifier().to(memory_format=torch.channels_last)
    classifier.network.stages[1].conv1.weight = classifier.network.stages[0].conv1.weight
    classifier.network.stages[2].to(torch.bfloat16)
    classifier.network = torch.compile(classifier.network)  # type: ignore[assignment]
    folder = save_bundle(tmp_path / "b", INFO, classifier, ())
    tensors = safetensors.torch.load_file(folder / "weights.safetensors")
    assert set(tensors) == set(make_classifier().state_dict())
    assert {t.dtype for key, t in tensors.items() if "num_batches" not in key} == {torch.float32}
    loaded = load_bundle(folder).classifier().network
    assert torch.equal(loaded.stages[1].conv1.weight, loaded.stages[0].conv1.weight)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["one bit", "cut", "longer", "gone", "a folder"])
def test_every_file_is_guarded(folder: Path, name: str, how: str) -> None:
    file = folder / name
    data = file.read_bytes()
    if how == "one bit":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "cut":
        file.write_bytes(data[:-1])
    elif how == "longer":
        file.write_bytes(data + b" ")
    else:
        file.unlink()
        if how == "a folder":
            file.mkdir()
    expected = "missing" if how in ("gone", "a folder") else "altered"
    with pytest.raises(BundleError, match=rf"{name} .*{expected}.*copy or download the bundle again"):
        load_bundle(folder)


def test_weights_changed_after_loading_are_refused(folder: Path) -> None:
    bundle = load_bundle(folder)
    safetensors.torch.save_file(make_classifier(seed=1).state_dict(), folder / "weights.safetensors")
    with pytest.raises(BundleError, match=r"weights.safetensors was altered"):
        bundle.classifier()


@pytest.mark.parametrize("name", FILES)
def test_a_needed_file_must_be_listed(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{name} is needed but manifest.json does not list it"):
        load_bundle(folder)


def test_an_unused_listed_file_is_verified_too(folder: Path) -> None:
    (folder / "NOTES.md").write_text("measured on a late shift..")
    rehash(folder, "NOTES.md")
    load_bundle(folder)
    (folder / "NOTES.md").write_text("measured on an early shift")
    with pytest.raises(BundleError, match=r"NOTES.md was altered"):
        load_bundle(folder)


def test_files_that_are_not_listed_are_never_read(folder: Path) -> None:
    (folder / "code.pkl").write_bytes(b"a pickle")
    os.mkfifo(folder / "pipe")  # reading it would wait for ever
    (folder / "golden" / "dangling").symlink_to("/nowhere")
    load_bundle(folder).classifier()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "golden/../../secret", "golden\\..\\secret", "C:secret", ""]
)
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(b"x")
    change_manifest(folder, {name: {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}})
    with pytest.raises(BundleError, match="could point outside the bundle"):
        load_bundle(folder)


def test_links_that_leave_the_folder_are_refused_and_links_within_are_not(folder: Path) -> None:
    shutil.move(folder / "golden" / "00.jpg", folder / "elsewhere.jpg")
    (folder / "golden" / "00.jpg").symlink_to("../elsewhere.jpg")
    load_bundle(folder)
    shutil.move(folder / "elsewhere.jpg", folder.parent / "outside.jpg")
    (folder / "golden" / "00.jpg").unlink()
    (folder / "golden" / "00.jpg").symlink_to("../../outside.jpg")
    with pytest.raises(BundleError, match=r"golden/00.jpg is a link to a file outside the bundle"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema_version": 2, "files": {}}',
        '{"schema_version": 1, "files": {"a": 3}}',
        "[" * 99999,
    ],
)
def test_a_broken_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest.json"):
        load_bundle(folder)


def test_a_path_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"nowhere: no such folder; expected a bundle folder, such as runs/NAME/bundle"
    ):
        load_bundle(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"file: a file; expected a bundle folder"):
        load_bundle(tmp_path / "file")


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest.json cannot be read: .*is .* a bundle\?"):
        load_bundle(tmp_path)


def test_an_existing_path_is_refused_and_unchanged(folder: Path, tmp_path: Path) -> None:
    before = load_bundle(folder).digest
    with pytest.raises(BundleError, match=f"{folder} exists already"):
        save_bundle(folder, INFO, make_classifier(seed=1), GOLDENS)
    assert load_bundle(folder).digest == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "link"):
        with pytest.raises(BundleError, match="exists already"):
            save_bundle(tmp_path / name, INFO, make_classifier(), GOLDENS)


class Interrupting(Classifier):
    """A classifier whose save is interrupted from the keyboard."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_bundle(tmp_path / "b", INFO, Interrupting(nn.Linear(1, 1), mean=MEAN, std=STD), GOLDENS)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    # The file's name is longer than a file system takes: the record and the weights are written before it fails.
    with pytest.raises(OSError, match="too long"):
        save_bundle(tmp_path / "b", INFO, make_classifier(), [*GOLDENS, GoldenSample("x" * 300, b"x", (1.0, 0.0, 0.0))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (
            replace(INFO, network={"name": "lenet5", "image_size": [32, 32], "args": {}}),
            "does not fit the network 'lenet5'",
        ),
        (replace(INFO, network={"name": "resnet21", "image_size": [32, 32], "args": {}}), "'resnet21' is unknown"),
        (replace(INFO, labels=("a", "b")), "has 3 probabilities: expected 2"),
        (
            replace(INFO, preprocess={"mean": [0, 0, 0], "std": list(STD)}),
            "preprocess.'mean'.*expected the classifier's value",
        ),
    ],
)
def test_a_record_of_another_classifier_is_refused_and_leaves_nothing(
    info: BundleInfo, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=reason):
        save_bundle(tmp_path / "b", info, make_classifier(), GOLDENS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [{"weights": "/tmp/w.pth"}, {"pretrained": True}, {"checkpoint_path": "/tmp/w.pth"}, {"x": 1}]
)
def test_untrusted_network_arguments_load_no_file(folder: Path, args: dict[str, Any]) -> None:
    for name in ("timm/resnet10t", "resnet20"):
        reseal(folder, lambda record, name=name: record["network"].update(name=name, args=args))  # type: ignore[misc]
        with pytest.raises(BundleError, match=r"bundle.json: the network cannot be built: .*" + next(iter(args))):
            load_bundle(folder).classifier()


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    weights = make_classifier().state_dict()
    weights["network.head.weight"] = torch.zeros(4, 64)
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    rehash(folder, "weights.safetensors")
    with pytest.raises(
        BundleError, match=r"weights.safetensors does not fit the network 'resnet20'.*network.head.weight"
    ):
        load_bundle(folder).classifier()


@pytest.mark.parametrize("change", ["missing", "strange"])
def test_weights_with_other_keys_are_refused(folder: Path, change: str) -> None:
    weights = make_classifier().state_dict()
    head = weights.pop("network.head.weight")
    if change == "strange":
        weights |= {"network.head.weight": head, "network.tail.weight": head.clone()}
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    rehash(folder, "weights.safetensors")
    with pytest.raises(BundleError, match=r"does not fit .*network.(head|tail).weight"):
        load_bundle(folder).classifier()


def test_a_normalisation_that_disagrees_with_the_record_is_refused(folder: Path) -> None:
    reseal(folder, lambda record: record["preprocess"].update(mean=[0, 0, 0]))
    with pytest.raises(BundleError, match=r"preprocess.'mean'.*expected the classifier's value"):
        load_bundle(folder).classifier()


def test_weights_that_are_not_safetensors_are_refused(folder: Path) -> None:
    torch.save(make_classifier().state_dict(), folder / "weights.safetensors")
    rehash(folder, "weights.safetensors")
    with pytest.raises(BundleError, match="is not a safetensors file"):
        load_bundle(folder).classifier()


@pytest.mark.parametrize(
    "answers", [None, 3, [3], [{"name": "00.jpg"}], [{"name": "00.jpg", "probabilities": ["a"] * 3}]]
)
def test_broken_goldens_are_refused(folder: Path, answers: Any) -> None:
    reseal(folder, lambda record: record.update(goldens=answers))
    with pytest.raises(BundleError, match="golden"):
        load_bundle(folder)


def test_a_golden_sample_of_an_earlier_version_is_read(folder: Path) -> None:
    def as_before(record: dict[str, Any]) -> None:
        record["goldens"][0]["pictured"] = False

    reseal(folder, as_before)
    assert [golden.has_image for golden in load_bundle(folder).golden_samples][:2] == [False, True]


@pytest.mark.parametrize("name", ["../00.jpg", "a/b.jpg", "", ".hidden", "a b.jpg"])
def test_golden_names_are_plain(name: str) -> None:
    with pytest.raises(BundleError, match="of a golden sample: expected letters"):
        GoldenSample(name, b"x", (1.0,))


def test_golden_names_are_unique(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'00.jpg' occurs twice"):
        save_bundle(tmp_path / "b", INFO, make_classifier(), [GOLDENS[0], GOLDENS[0]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 2}, "'schema_version' is 2: expected 1"),
        ({"schema_version": True}, "'schema_version' is True"),
        ({"name": " "}, "'name'"),
        ({"task": "multi-label"}, "binary, multiclass, multilabel; did you mean 'multilabel'"),
        ({"labels": ["a", "b", "a"]}, "'a' occurs twice"),
        ({"labels": ["a", 3]}, "'labels'"),
        ({"labels": ["a"]}, "at least 2 labels for the task multiclass"),
        ({"task": "binary"}, "two labels for the task binary"),
        ({"network": {"name": "resnet20"}}, "exactly the keys name, image_size, args"),
        ({"network": {"name": "hf-hub:a/b", "image_size": [8, 8], "args": {}}}, "'network.name' is 'hf-hub:a/b'"),
        ({"network": {"name": "timm/../x", "image_size": [8, 8], "args": {}}}, "'network.name'"),
        ({"network": {"name": "lenet5", "image_size": [8], "args": {}}}, "'network.image_size' is .8."),
        ({"network": {"name": "lenet5", "image_size": [8, 8], "args": []}}, "'network.args'"),
        ({"preprocess": {"mean": [0, 0, 0], "std": [1, 1]}}, "'preprocess.std'"),
        ({"preprocess": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "'preprocess.std'.*above 0"),
        ({"preprocess": []}, "'preprocess'"),
        ({"temperature": 0}, "'temperature' is 0"),
        ({"temperature": "1"}, "'temperature' is '1'"),
        ({"thresholds": [0.5]}, "'thresholds' is .*expected 0 numbers"),
        ({"task": "multilabel", "thresholds": [0.5]}, "expected 3 numbers in 0…1"),
        ({"task": "multilabel", "thresholds": [0.5, 0.5, 1.5]}, "expected 3 numbers in 0…1"),
        ({"metrics": {"a": "high"}}, "'metrics'"),
        ({"data": 3}, "'data'"),
        ({"config": None}, "'config'"),
        ({"versions": {"torch": 2}}, "'versions'"),
        ({"created": "yesterday"}, "'created' is 'yesterday'"),
        ({"created": "2026-11-05T03:00:00"}, "'created'.*a time in UTC"),
        ({"lables": []}, "unknown field 'lables'; nearest is 'labels'"),
    ],
)
def test_every_field_is_checked(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        BundleInfo.from_dict({**INFO.to_dict(), **change})


def test_a_bundle_from_before_abstaining_is_read() -> None:
    values = INFO.to_dict()
    del values["abstain_below"]
    assert BundleInfo.from_dict(values).abstain_below is None
    with pytest.raises(BundleError, match="abstain_below"):
        BundleInfo.from_dict({**values, "abstain_below": 1.5})


@pytest.mark.parametrize("name", [name for name in INFO.to_dict() if name not in ("abstain_below", "text")])
def test_every_field_is_required(name: str) -> None:
    values = INFO.to_dict()
    del values[name]
    with pytest.raises(BundleError, match=name):
        BundleInfo.from_dict(values)


def test_nan_and_infinity_are_refused() -> None:
    with pytest.raises(BundleError, match="'metrics'"):
        replace(INFO, metrics={"loss": float("nan")})
    with pytest.raises(BundleError, match="NaN is not a JSON number"):
        BundleInfo.from_json(INFO.to_json().replace("1.25", "NaN"))
    with pytest.raises(BundleError, match="'config' is not plain JSON"):
        replace(INFO, config={"path": Path("x")})


def test_multilabel_keeps_its_thresholds() -> None:
    info = replace(INFO, task="multilabel", thresholds=(0.5, 0.25, 1.0))
    assert BundleInfo.from_json(info.to_json()) == info


def test_an_export_in_place_of_a_bundle_is_named(tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text("{}")
    with pytest.raises(BundleError, match="is an export, which its own runtime opens; name the bundle"):
        load_bundle(tmp_path)
