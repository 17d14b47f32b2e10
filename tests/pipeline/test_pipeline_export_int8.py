"""`refract export --int8`: calibration, the measured accuracy, and the refusal of a loss."""

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import Run, make_image, write_image
from small_export import CLIENTS, INSTALLED, LABELS, TEMPERATURE, batch_of, encoded, make_bundle, needs_onnx, stored
from torch import nn

from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, load_bundle, save_bundle
from refract.models.classifier import Classifier, probabilities
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.export.export import export
from refract.pipeline.export.int8 import Accuracy, Int8, check_loss
from refract.pipeline.export.target import ExportError
from refract.pipeline.training.training_features import training_features_of

pytestmark = pytest.mark.slow  # each quantisation takes seconds


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network that tells the colours apart, with training features."""
    path = tmp_path_factory.mktemp("trained")
    untrained = make_bundle(path / "untrained", "lenet5", size=(32, 32))
    classifier, preprocess = untrained.classifier(), Preprocess.from_dict(untrained.info.preprocess)
    images = torch.stack([torch.from_numpy(preprocess(make_image(c, n, 40))) for n in range(20) for c in LABELS])
    images, labels = images.permute(0, 3, 1, 2), torch.arange(3).repeat(20)
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(images), labels).backward()
        optimizer.step()
    assert (classifier(images).argmax(1) == labels).all()
    return saved(path / "bundle", untrained, classifier)


def saved(path: Path, like: Bundle, classifier: Classifier) -> Bundle:
    preprocess = Preprocess.from_dict(like.info.preprocess)
    with torch.inference_mode():
        logits = classifier(torch.from_numpy(batch_of(like)).permute(0, 3, 1, 2))
        rows = probabilities(logits, task="multiclass", temperature=TEMPERATURE)
    goldens = [
        replace(g, probabilities=tuple(map(float, row))) for g, row in zip(like.golden_samples, rows, strict=True)
    ]
    samples = [
        Sample(f"{c}/{n}.png", (i,), "train", data=encoded(c, n)) for n in range(9) for i, c in enumerate(LABELS)
    ]
    manifest = Manifest("memory", tuple(samples), LABELS, "multiclass")
    features = training_features_of(classifier, preprocess, manifest, task="multiclass")
    return load_bundle(save_bundle(path, like.info, classifier, goldens, training=features))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train|test/CLASS/NN.png"""
    root = tmp_path_factory.mktemp("photos")
    for number in range(16):
        for label in LABELS:
            write_image(
                root / ("test" if number % 2 else "train") / label / f"{number}.png", make_image(label, 50 + number, 40)
            )
    return root


@pytest.mark.parametrize("target", [name for name in ("onnx", "openvino") if name in INSTALLED and "onnx" in INSTALLED])
def test_int8_keeps_the_accuracy_and_reports_it(
    target: str, refract: Run, trained: Bundle, photos: Path, tmp_path: Path
) -> None:
    done = refract(
        "export", trained.path, "--to", target, "-o", "out", "--int8", "--data", photos, "--calibrate", photos
    )
    assert (
        f"calibrated on 24 images of {photos}: accuracy on {photos} (test) 1.0000 before, 1.0000 after (24 samples)"
        in done.stdout
    )
    got, _ = CLIENTS[target](tmp_path / "out", batch_of(trained))
    np.testing.assert_allclose(got, stored(trained), atol=0.1)
    assert (got != stored(trained)).any(), "nothing was quantised"
    recorded = json.loads((tmp_path / "out" / "preprocess.json").read_text())["int8"]
    assert recorded["after"] == 1.0 and recorded["samples"] == 24
    if target == "onnx":  # OpenVINO's text describes more nodes than lenet5 has weights
        export(trained, target, tmp_path / "float32")
        sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("out", "float32")]
        assert sizes[0] < 0.5 * sizes[1]


@needs_onnx
def test_int8_without_data_uses_what_the_bundle_has(trained: Bundle, tmp_path: Path) -> None:
    done = export(trained, "onnx", tmp_path / "out", Int8(None, None, 0.5))
    assert done.calibrated_on == "golden samples and 27 training thumbnails"
    assert done.accuracy.of == "agreement on the golden samples" and done.accuracy.after == 1.0
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    rows, logits = session.run(["probabilities", "logits"], {"images": batch_of(trained)})
    expected = probabilities(torch.from_numpy(logits), task="multiclass", temperature=TEMPERATURE)
    np.testing.assert_allclose(rows, expected, atol=1e-6, err_msg="the softmax has 8 bits")


@needs_onnx
def test_int8_that_loses_accuracy_is_refused_with_remedies(trained: Bundle, photos: Path, tmp_path: Path) -> None:
    """One huge activation, which no class reads, takes the 8 bits of its layer."""
    classifier = trained.classifier()
    with torch.no_grad():
        classifier.network.neck[3].bias[0] = 1e5
        classifier.network.head.weight[:, 0] = 0
    fragile = saved(tmp_path / "fragile", trained, classifier)
    with pytest.raises(
        ExportError,
        match=r"--int8 for onnx loses \S+ points: accuracy on \S+ \(test\) 1\.0000 before.*Nothing was written; calibrate on training",
    ):
        export(fragile, "onnx", tmp_path / "out", Int8(None, str(photos), 0.5))
    assert not (tmp_path / "out").exists()


def test_the_loss_is_compared_in_points(trained: Bundle) -> None:
    measured = Accuracy(0.93, 0.925, 1000, "accuracy on photos (test)")
    check_loss(measured, Int8(None, "photos", 0.5), "onnx", trained.info)
    with pytest.raises(
        ExportError,
        match=r"loses 0\.50 points.*; fine-tune .*, or accept more by --max-loss 0\.5, or export without --int8",
    ):
        check_loss(measured, Int8("photos", "photos", 0.4), "onnx", trained.info)
    with pytest.raises(ExportError, match=r"accept more by --max-loss 0\.6, "):  # rounded up, as 0.5 is refused again
        check_loss(replace(measured, after=0.9248), Int8("photos", "photos", 0.5), "onnx", trained.info)
    adapted = replace(trained.info, config={"trainer": {"quantization_aware": True}})
    with pytest.raises(ExportError, match="Nothing was written; accept more"):
        check_loss(replace(measured, after=0.9), Int8("photos", "photos", 0.5), "onnx", adapted)
    with pytest.raises(ExportError, match=r"40 samples, of which one is 2\.50 points; at most"):
        check_loss(replace(measured, after=0.9, samples=40), Int8("photos", "photos", 0.5), "onnx", adapted)


def test_data_that_cannot_calibrate_or_measure_are_refused_before_the_conversion(
    refract: Run, trained: Bundle, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.csv").write_text("text,label\na rose,red\nthe sky,blue\n")
    (tmp_path / "unsplit").symlink_to(photos / "train")
    wrong = {
        ("--calibrate", "texts.csv"): "texts.csv: has no images; --calibrate needs training images",
        ("--data", "texts.csv"): "texts.csv: 2 rows have a text and no image; --data needs images",
        ("--data", "missing"): "missing: no such folder or file",
        (
            "--calibrate",
            "unsplit",
            "--data",
            photos / "train",
        ): "--calibrate uses 24 of these images, so they cannot measure",
    }
    (tmp_path / "only" / "test").parent.mkdir()
    (tmp_path / "only" / "test").symlink_to(photos / "test")
    wrong["--calibrate", "only"] = "only: has images of the split test, and none of the split train"
    for arguments, message in wrong.items():
        done = refract("export", trained.path, "--to", "onnx", "-o", "out", "--int8", *arguments, code=2)
        assert message in done.stderr and "converting" not in done.stderr


@needs_onnx
def test_a_refused_model_is_fine_tuned_for_8_bits(refract: Run, trained: Bundle, photos: Path, tmp_path: Path) -> None:
    """One activation is so much larger than the others that 8 bits cannot hold them. It changes no prediction in float32.

    Without the rounding, the same training leaves two of three classes right.
    """
    classifier = trained.classifier()
    with torch.no_grad():
        for parameter in (classifier.network.neck[3].weight, classifier.network.neck[3].bias):
            parameter[0] *= 1600
        classifier.network.head.weight[:, 0] /= 1600
    fragile = saved(tmp_path / "fragile", trained, classifier)
    options = Int8(str(photos), str(photos), 1.0)
    with pytest.raises(ExportError, match="fine-tune the model for 8 bits: .* --trainer.quantization_aware true"):
        export(fragile, "onnx", tmp_path / "refused", options)
    config = {
        "data": {"source": str(photos), "image_size": 32, "batch_size": 8, "workers": 0},
        "model": {"name": "lenet5", "weights": str(fragile.path)},
        "optim": {"lr": 0.005},
        "trainer": {"max_epochs": 4, "run_name": "tuned", "quantization_aware": True, "device": "cpu"},
        "evaluation": {"robustness": "none"}, "tracking": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    refract("train", "config.yaml")
    tuned = load_bundle(tmp_path / "runs" / "tuned" / "bundle")
    done = export(tuned, "onnx", tmp_path / "out", options)
    assert (done.accuracy.before, done.accuracy.after) == (1.0, 1.0)


@needs_onnx
def test_training_data_with_train_and_val_calibrates_on_what_was_trained(
    refract: Run, photos: Path, tmp_path: Path
) -> None:
    """The training drew its test set from `train`: those images measure, and do not calibrate."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "test").rename(data / "val")
    config = {
        "data": {"source": str(data), "image_size": 32, "batch_size": 8, "workers": 0},
        "model": {"name": "lenet5"}, "trainer": {"max_epochs": 1, "run_name": "run", "device": "cpu"},
        "evaluation": {"robustness": "none"}, "tracking": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    refract("train", "config.yaml")
    with (tmp_path / "runs" / "run" / "splits.csv").open() as file:
        trained = Counter(row["split"] for row in csv.DictReader(file))
    options = ("--int8", "--calibrate", data, "--data", data, "--max-loss", "100")
    done = refract("export", "runs/run/bundle", "--to", "onnx", "-o", "out", *options)
    assert f"calibrated on {trained['train']} images of {data}: accuracy on {data} (test)" in done.stdout
    assert f"({trained['test']} samples)" in done.stdout and trained["val"] == 24
