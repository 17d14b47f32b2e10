"""`refract export`: each target's own runtime opens the export and returns the bundle's predictions."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import COLORS, Run, make_image, write_image
from torch import nn

from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier, probabilities
from refract.models.registry import build
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.export.check import Comparison, compare
from refract.pipeline.export.export import export
from refract.pipeline.export.int8 import Accuracy, Int8, check_loss
from refract.pipeline.export.target import ExportError
from refract.pipeline.export.targets import TARGETS
from refract.pipeline.training.training_features import training_features_of

pytestmark = pytest.mark.slow  # each conversion takes a second or more

EXTRAS = {"onnx": "onnxruntime", "openvino": "openvino"}
INSTALLED = [name for name in TARGETS if importlib.util.find_spec(EXTRAS.get(name, "torch"))]
needs_onnx = pytest.mark.skipif("onnx" not in INSTALLED, reason="ONNX Runtime, the extra onnx, quantises")
TEMPERATURE = 0.3
LABELS = tuple(COLORS)


def encoded(label: str, number: int) -> bytes:
    import cv2

    return cv2.imencode(".png", make_image(label, number, 40)[:, :, ::-1])[1].tobytes()


def make_bundle(path: Path, network: str, *, size=(32, 40), task="multiclass", normalize="channel", **more) -> Bundle:
    """Save a bundle whose logits differ between the images, as those of a trained network: a head of larger weights."""
    torch.manual_seed(0)
    labels = LABELS[:2] if task == "binary" else LABELS
    net = build(network, len(labels), image_size=size, **more.get("args", {}))
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:]:
            parameter.mul_(10)
    preprocess = Preprocess(*size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), normalize=normalize)
    arrays = {"image_size": size, "mean_image": torch.rand(3, *size)} if normalize == "mean_image" else {}
    classifier = Classifier(net, mean=preprocess.mean, std=preprocess.std, normalize=normalize, **arrays).eval()
    goldens = []
    for number, label in enumerate([*COLORS, *COLORS]):
        data = encoded(label, number)
        images = torch.from_numpy(preprocess(data)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            row = probabilities(classifier(images), task=task, temperature=TEMPERATURE)[0]
        goldens.append(GoldenSample(f"{number:02}.png", data, tuple(map(float, row))))
    info = BundleInfo(
        name="colours",
        task=task,
        labels=labels,
        network={"name": network, "image_size": list(size), "args": more.get("args", {})},
        preprocess=preprocess.to_dict(),
        temperature=TEMPERATURE,
        thresholds=(0.4, 0.5, 0.6) if task == "multilabel" else (),
        metrics={"accuracy": 0.9},
        created="2026-01-01T00:00:00+00:00",
    )
    return load_bundle(save_bundle(path, info, classifier, goldens[: more.get("goldens", 6)]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "lenet", "lenet5")


@pytest.fixture(scope="module")
def timm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "timm", "timm/test_resnet.r160_in1k", size=(64, 48))


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def batch_of(bundle: Bundle) -> np.ndarray:
    preprocess = Preprocess.from_dict(bundle.info.preprocess)
    return np.stack([preprocess(golden.data) for golden in bundle.golden_samples])


def stored(bundle: Bundle) -> np.ndarray:
    return np.array([golden.probabilities for golden in bundle.golden_samples], np.float32)


def client_onnx(folder: Path, images: np.ndarray) -> tuple[np.ndarray, Mapping[str, str]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(item.name, item.type, item.shape[1:]) for item in session.get_inputs()] == [
        ("images", "tensor(uint8)", [*images.shape[1:]])
    ]
    return session.run(["probabilities"], {"images": images})[0], session.get_modelmeta().custom_metadata_map


def client_openvino(folder: Path, images: np.ndarray) -> tuple[np.ndarray, Mapping[str, str]]:
    import openvino

    model = openvino.Core().read_model(folder / "model.xml")
    assert model.input("images").element_type == openvino.Type.u8 and model.input("images").partial_shape[0].is_dynamic
    given = {name: model.get_rt_info(["refract", name]).astype(str) for name in ("labels", "temperature", "task")}
    return openvino.compile_model(model, "CPU")({"images": images})["probabilities"], given


def client_torch(folder: Path, images: np.ndarray) -> tuple[np.ndarray, Mapping[str, str]]:
    extra = {"metadata.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra)
    return program.module()(torch.from_numpy(images))[0].detach().numpy(), json.loads(extra["metadata.json"])


CLIENTS: Mapping[str, Callable] = {"onnx": client_onnx, "openvino": client_openvino, "torch-export": client_torch}
PIXEL_TARGETS = [name for name in CLIENTS if name in INSTALLED]


@pytest.mark.parametrize("target", PIXEL_TARGETS)
def test_an_independent_client_gets_the_bundles_predictions(target: str, bundle: Bundle, tmp_path: Path) -> None:
    done = export(bundle, target, tmp_path / "out")
    images = batch_of(bundle)
    assert stored(bundle).max(axis=1).min() > 0.5, "the test needs predictions that differ from a uniform guess"
    for count in (1, 5):
        got, metadata = CLIENTS[target](tmp_path / "out", images[:count])
        np.testing.assert_allclose(got, stored(bundle)[:count], atol=1e-5)
    assert json.loads(metadata["labels"]) == [*LABELS]
    assert float(metadata["temperature"]) == TEMPERATURE and metadata["task"] == "multiclass"
    assert done.comparison.largest <= done.comparison.bound == 1e-3
    description = json.loads((tmp_path / "out" / "preprocess.json").read_text())
    assert description["preprocess"] == bundle.info.preprocess and description["bundle"] == bundle.digest
    assert description["input"]["shape"] == [None, 32, 40, 3]
    assert sorted(done.sizes) == names_in(tmp_path / "out")
    assert {"preprocess.py", "preprocess.js", "preprocess.json"} < set(done.sizes)


@pytest.mark.parametrize(
    ("task", "network", "normalize"),
    [("multilabel", "cnn", "channel"), ("binary", "resnet20", "channel"), ("multiclass", "lenet5", "mean_image")],
)
@pytest.mark.parametrize("target", PIXEL_TARGETS)
def test_every_task_and_normalisation(target: str, task: str, network: str, normalize: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", network, size=(32, 32), task=task, normalize=normalize)
    export(bundle, target, tmp_path / "out")
    got, _ = CLIENTS[target](tmp_path / "out", batch_of(bundle))
    np.testing.assert_allclose(got, stored(bundle), atol=1e-5)
    assert json.loads((tmp_path / "out" / "preprocess.json").read_text())["thresholds"] == [*bundle.info.thresholds]


def test_a_bundle_with_one_golden_sample_is_checked_at_other_batch_sizes(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "lenet5", goldens=1)
    done = export(bundle, "torch-export", tmp_path / "out")
    assert done.comparison.samples == 1
    got, _ = client_torch(tmp_path / "out", np.repeat(batch_of(bundle), 7, axis=0))
    np.testing.assert_allclose(got, np.repeat(stored(bundle), 7, axis=0), atol=1e-5)


def test_timm_loads_the_folder_with_equal_logits(timm_bundle: Bundle, tmp_path: Path) -> None:
    import timm

    export(timm_bundle, "hf", tmp_path / "out")
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network)
    assert [*config["input_size"]] == [3, 64, 48] and config["crop_pct"] == 0.875
    assert network.num_classes == 3 and network.pretrained_cfg["label_names"] == [*LABELS]
    images = torch.from_numpy(batch_of(timm_bundle)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        expected = timm_bundle.classifier()(images)
        torch.testing.assert_close(network((images / 255 - mean) / std), expected, atol=1e-4, rtol=1e-4)


def test_the_code_of_the_model_card_returns_the_bundles_prediction(timm_bundle: Bundle, tmp_path: Path) -> None:
    export(timm_bundle, "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "| accuracy | 0.9 |" in card and "`blue`" in card
    golden = timm_bundle.golden_samples[0]
    (tmp_path / "out" / "photo.jpg").write_bytes(golden.data)
    code = card.split("```python\n")[1].split("```")[0] + "print(json.dumps(probabilities[0].tolist()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        json.loads(done.stdout), golden.probabilities, atol=2e-2
    )  # a pixel may differ by a level


def test_weights_of_the_folder_start_a_training(timm_bundle: Bundle, tmp_path: Path) -> None:
    from refract.models.registry import weights_preprocess

    export(timm_bundle, "hf", tmp_path / "out")
    name, weights = "timm/test_resnet", str(tmp_path / "out")
    network = build(name, 3, image_size=(64, 48), weights=weights)
    expected = timm_bundle.classifier().network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in network.state_dict().items())
    assert weights_preprocess(name, weights) == {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


def test_other_networks_than_timms_name_the_targets_for_them(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--to hf: the network lenet5 is not one of timm's; use --to onnx"):
        export(bundle, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    odd = make_bundle(tmp_path / "mlp", "timm/test_resnet", size=(64, 64), args={"head": "mlp"})
    with pytest.raises(ExportError, match="timm builds no head mlp"):
        export(odd, "hf", tmp_path / "out")


class Unsupported(nn.Module):
    """Has an operator without a conversion to ONNX and OpenVINO."""

    def __init__(self, num_classes: int, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.special.bessel_j0(images.mean(dim=(2, 3))))


@pytest.mark.parametrize("target", [name for name in ("onnx", "openvino") if name in INSTALLED])
def test_an_unsupported_operator_is_named(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refract.models import registry

    monkeypatch.setitem(registry._networks, "unsupported", Unsupported)
    bundle = make_bundle(tmp_path / "bundle", "unsupported")
    with pytest.raises(
        ExportError, match=rf"{target} has no conversion of the operator (aten|prims)\S*bessel_j0.*torch-export"
    ):
        export(bundle, target, tmp_path / "out")
    assert names_in(tmp_path) == ["bundle"]
    export(bundle, "torch-export", tmp_path / "out")


def test_a_folder_with_files_is_refused_and_an_empty_one_is_filled(
    refract: Run, bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    shown = refract("export", bundle.path, "--to", "torch-export", "-o", "out").stdout
    assert "6 golden samples: the same labels" in shown and "model.pt2" in shown
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    refused = refract("export", bundle.path, "--to", "torch-export", "-o", "out", code=2)
    assert refused.stderr.endswith(
        "-o out: has files already, and export overwrites none; remove it or name a new folder\n"
    )
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_options_of_int8_without_it_are_refused(refract: Run, bundle: Bundle) -> None:
    done = refract("export", bundle.path, "--to", "onnx", "-o", "out", "--data", "photos", code=2)
    assert "--data belongs to --int8" in done.stderr
    done = refract("export", bundle.path, "--to", "torch-export", "-o", "out", "--int8", code=2)
    assert "--int8: torch-export has no 8-bit integers; use --to onnx or openvino" in done.stderr


def test_a_bundle_that_does_not_reproduce_its_golden_samples_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    wrong = [GoldenSample(g.name, g.data, tuple(reversed(g.probabilities))) for g in bundle.golden_samples]
    other = load_bundle(save_bundle(tmp_path / "wrong", bundle.info, bundle.classifier(), wrong))
    with pytest.raises(ExportError, match="changes a stored probability of the golden samples by"):
        export(other, "torch-export", tmp_path / "out")


def compared(bundle: Bundle, run: Callable, bound: float = 1e-3) -> Comparison:
    return compare(run, batch_of(bundle), stored(bundle), bundle.info, "onnx", bound=bound, remedy="use another target")


def test_an_export_with_other_predictions_is_refused(bundle: Bundle) -> None:
    images, rows = batch_of(bundle), stored(bundle)

    def looked_up(table: np.ndarray) -> Callable:
        return lambda batch: (np.stack([table[(images == one).all(axis=(1, 2, 3)).argmax()] for one in batch]), None)

    assert compared(bundle, looked_up(rows + np.float32(5e-4))).largest == pytest.approx(5e-4, abs=1e-6)
    with pytest.raises(ExportError, match=r"changes a probability of the golden samples by 0\.002; at most 0\.001"):
        compared(bundle, looked_up(rows + np.float32(2e-3)))
    with pytest.raises(ExportError, match="by nan"):
        compared(bundle, looked_up(np.full_like(rows, np.nan)))
    order = rows.argsort(axis=1)
    shift = 0.51 * (np.take_along_axis(rows, order[:, 2:], axis=1) - np.take_along_axis(rows, order[:, 1:2], axis=1))
    moved = rows.copy()
    np.put_along_axis(moved, order[:, 1:], np.take_along_axis(rows, order[:, 1:], axis=1) + shift * [1, -1], axis=1)
    with pytest.raises(ExportError, match=r"predicts another label for \d of 6 golden samples"):
        compared(bundle, looked_up(moved), bound=1.1 * float(shift.max()))


def test_an_export_for_one_batch_size_is_refused(bundle: Bundle) -> None:
    rows = stored(bundle)

    def only_six(batch: np.ndarray) -> tuple[np.ndarray, None]:
        if len(batch) != 6:
            raise RuntimeError("expected 6 rows\nat node 7")
        return rows, None

    with pytest.raises(ExportError, match="the export fails for 1 image: expected 6 rows; use another target"):
        compared(bundle, only_six)


def test_a_killed_export_leaves_no_folder_that_looks_complete(bundle: Bundle, tmp_path: Path) -> None:
    old, new = (tmp_path / f".out.{number}.partial" for number in range(2))
    for folder in (old, new):
        folder.mkdir()
        (folder / "model.pt2").write_bytes(b"half")
    os.utime(old, (0, 0))
    export(bundle, "torch-export", tmp_path / "out")
    assert names_in(tmp_path) == [new.name, "out"]  # another process may still write to the new one


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


def test_the_loss_is_compared_in_points() -> None:
    measured = Accuracy(0.93, 0.925, 1000, "accuracy on photos (test)")
    check_loss(measured, Int8(None, "photos", 0.5), "onnx")
    with pytest.raises(
        ExportError, match=r"loses 0\.50 points.*; accept more by --max-loss 0\.5, or export without --int8"
    ):
        check_loss(measured, Int8("photos", "photos", 0.4), "onnx")
