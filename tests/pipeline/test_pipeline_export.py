"""`refract export`: each target's own runtime opens the export and returns the bundle's predictions."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import Run
from small_export import (
    CLIENTS,
    INSTALLED,
    LABELS,
    PIXEL_TARGETS,
    TEMPERATURE,
    batch_of,
    client_torch,
    make_bundle,
    names_in,
    stored,
)
from torch import nn

from refract.models.bundle.bundle import Bundle, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier
from refract.models.conversion.deployable import Deployable
from refract.models.factory import text_record
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import make_text_encoder
from refract.models.registry import build
from refract.pipeline.export.card import model_card
from refract.pipeline.export.check import Comparison, compare
from refract.pipeline.export.export import export
from refract.pipeline.export.target import ExportError

pytestmark = pytest.mark.slow  # each conversion takes a second or more


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "lenet", "lenet5")


@pytest.fixture(scope="module")
def timm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "timm", "timm/test_resnet.r160_in1k", size=(64, 48))


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


def test_names_of_labels_are_no_markup_in_the_model_card(bundle: Bundle) -> None:
    names = {"labels": ("<b>red</b>", "two\nlines", "a `` tick"), "name": "</script>\n# colours"}
    card = model_card(replace(bundle.info, **names), bundle.digest)
    assert "\n\n# `</script> # colours`\n" in card
    assert "Labels: `<b>red</b>`, `two lines`, ``` a `` tick ```.\n" in card


def test_weights_of_the_folder_start_a_training(timm_bundle: Bundle, tmp_path: Path) -> None:
    from refract.models.registry import weights_preprocess

    export(timm_bundle, "hf", tmp_path / "out")
    name, weights = "timm/test_resnet", str(tmp_path / "out")
    network = build(name, 3, image_size=(64, 48), weights=weights)
    expected = timm_bundle.classifier().network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in network.state_dict().items())
    expected_preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "image_size": [64, 48]}
    assert weights_preprocess(name, weights) == expected_preprocess


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
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
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


def test_the_current_folder_is_not_replaced(refract: Run, bundle: Bundle) -> None:
    done = refract("export", bundle.path, "--to", "torch-export", "-o", ".", code=2)
    assert "-o .: is the current folder" in done.stderr


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="needs a mount point other than /, as Linux has")
def test_a_mount_point_is_refused_before_the_conversion(refract: Run, bundle: Bundle) -> None:
    done = refract("export", bundle.path, "--to", "torch-export", "-o", "/dev/shm", code=2)
    assert "-o /dev/shm: is a mount point, which cannot be replaced; name a new folder in it" in done.stderr


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
    images, logits = batch_of(bundle), np.zeros((6, 3), np.float32)
    options = {"samples": 6, "bound": bound, "remedy": "use another target"}
    return compare(run, images, (stored(bundle), logits), bundle.info, "onnx", **options)


def looked_up(bundle: Bundle, table: np.ndarray) -> Callable:
    """Return these probabilities for the golden samples."""
    images = batch_of(bundle)

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [table[(images == one).all(axis=(1, 2, 3)).argmax()] for one in batch]
        return np.stack(rows), np.zeros((len(batch), 3), np.float32)

    return run


def test_an_export_with_other_predictions_is_refused(bundle: Bundle) -> None:
    rows = stored(bundle)
    assert compared(bundle, looked_up(bundle, rows + np.float32(5e-4))).largest == pytest.approx(5e-4, abs=1e-6)
    with pytest.raises(ExportError, match=r"changes a probability of the golden samples by 0\.002; at most 0\.001"):
        compared(bundle, looked_up(bundle, rows + np.float32(2e-3)))
    with pytest.raises(ExportError, match="by nan"):
        compared(bundle, looked_up(bundle, np.full_like(rows, np.nan)))
    order = rows.argsort(axis=1)
    shift = 0.51 * (np.take_along_axis(rows, order[:, 2:], axis=1) - np.take_along_axis(rows, order[:, 1:2], axis=1))
    moved = rows.copy()
    np.put_along_axis(moved, order[:, 1:], np.take_along_axis(rows, order[:, 1:], axis=1) + shift * [1, -1], axis=1)
    with pytest.raises(ExportError, match=r"predicts another label for \d of 6 golden samples"):
        compared(bundle, looked_up(bundle, moved), bound=1.1 * float(shift.max()))


def test_other_labels_within_the_bound_are_counted(bundle: Bundle) -> None:
    rows = stored(bundle)
    rows[0] = (0.5, 0.45, 0.05)
    swapped, options = rows.copy(), {"samples": 6, "bound": 0.3, "remedy": ""}
    swapped[0] = (0.45, 0.5, 0.05)
    expected = (rows, np.zeros((6, 3), np.float32))
    done = compare(looked_up(bundle, swapped), batch_of(bundle), expected, bundle.info, "onnx", **options)
    assert done.other_labels == 1
    assert compared(bundle, looked_up(bundle, stored(bundle))).other_labels == 0


def test_wrong_pixels_of_a_confident_network_are_refused(bundle: Bundle) -> None:
    """All probabilities are 0 or 1, also for images with exchanged channels."""
    classifier = bundle.classifier()
    with torch.no_grad():
        [*classifier.network.parameters()][-2].mul_(30)
    network = Deployable(classifier, task="multiclass", temperature=TEMPERATURE)

    def right(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            probabilities, logits = network(torch.from_numpy(images))
        return probabilities.numpy(), logits.numpy()

    images, options = batch_of(bundle), {"samples": 6, "bound": 1e-3, "remedy": "use another target"}
    expected = right(images)
    assert compare(right, images, expected, bundle.info, "onnx", **options).largest <= 1e-6
    np.testing.assert_allclose(right(images[..., ::-1].copy())[0], expected[0], atol=1e-3)
    with pytest.raises(
        ExportError, match=r"the export changes a logit of the golden samples by \S+; at most 0\.\d+ is"
    ):
        compare(lambda batch: right(batch[..., ::-1].copy()), images, expected, bundle.info, "onnx", **options)


def test_an_export_for_one_batch_size_is_refused(bundle: Bundle) -> None:
    rows = stored(bundle)

    def only_six(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(batch) != 6:
            raise RuntimeError("expected 6 rows\nat node 7")
        return rows, rows

    with pytest.raises(ExportError, match="the export fails for 1 image: expected 6 rows; use another target"):
        compared(bundle, only_six)


def test_a_killed_export_leaves_no_folder_that_looks_complete(bundle: Bundle, tmp_path: Path) -> None:
    old, new = (tmp_path / f".[out].{str(number) * 32}.partial" for number in range(2))
    other = tmp_path / ".[out].photos.partial"
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "model.pt2").write_bytes(b"half")
    for folder in (old, other):
        os.utime(folder, (0, 0))
    export(bundle, "torch-export", tmp_path / "[out]")
    # another process may still write to the new one
    assert {path.name for path in tmp_path.iterdir()} == {new.name, other.name, "[out]"}


@pytest.mark.parametrize("target", [name for name in ("torch-export", "hf", "openvino", "triton") if name in INSTALLED])
def test_a_full_disk_is_reported_as_such(target: str, bundle: Bundle, timm_bundle: Bundle, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk."""
    path = (timm_bundle if target == "hf" else bundle).path
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))"
    code = f"{limit}; from refract.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export", path, "--to", target, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    problem = "OpenVINO cannot write model.xml (" if target == "openvino" else "File too large"
    assert done.stderr.splitlines()[-1].startswith(f"refract export: {tmp_path / 'out'}: {problem}")
    assert not [*tmp_path.iterdir()]


def test_a_bundle_that_reads_texts_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    part, tokens, network = make_text_encoder(
        "hashing", weights="none", max_length=6, pooling="auto", args={"buckets": 50}
    )
    joined = {"fusion": "gated", "width": 8}
    images = build("lenet5", 3, image_size=(32, 40))
    mean, std = (bundle.info.preprocess[name] for name in ("mean", "std"))
    classifier = Classifier(Reader(images, network, 3, **joined), mean=mean, std=std, tokens=tokens).eval()
    info = replace(bundle.info, text=text_record(part, joined))
    both = load_bundle(save_bundle(tmp_path / "both", info, classifier, bundle.golden_samples))
    with pytest.raises(ExportError, match="reads texts, which export does not support; use `refract serve`"):
        export(both, "onnx", tmp_path / "out")


def test_a_file_in_place_of_the_folder_is_a_users_mistake(refract: Run, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in ("file", "file/out"):
        done = refract("export", bundle.path, "--to", "torch-export", "-o", output, code=2 if output == "file" else 1)
        assert done.stderr.count("\n") == 1 and "file" in done.stderr


def test_the_hierarchy_and_the_limit_of_confidence_reach_the_client(bundle: Bundle, tmp_path: Path) -> None:
    parents = {"blue": "cold", "green": "cold", "red": None, "cold": None}
    info = replace(bundle.info, hierarchy={"parents": parents, "threshold": 0.8}, abstain_below=0.6)
    other = load_bundle(save_bundle(tmp_path / "tree", info, bundle.classifier(), bundle.golden_samples))
    export(other, "torch-export", tmp_path / "out")
    description = json.loads((tmp_path / "out" / "preprocess.json").read_text())
    assert description["hierarchy"] == info.hierarchy and description["abstain_below"] == 0.6
