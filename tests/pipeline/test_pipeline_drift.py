"""`refract drift` as a user has it: a bundle, new images, a verdict."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from small_data import COLORS, Run, make_image, write_image
from warm_process import WarmProcess

from refract import cli
from refract.augment import Preprocess
from refract.models.bundle.bundle import Bundle, load_bundle
from refract.models.classifier import Classifier
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import BagOfNgrams
from refract.models.multimodal.tokens import HashedNgrams
from refract.models.registry import build
from refract.pipeline.cli.drift import main
from refract.pipeline.data.manifest import DataError, Sample
from refract.pipeline.data.new_data import read_data
from refract.pipeline.drift.compare import compare
from refract.pipeline.drift.measure import Measured, measure_drift
from refract.pipeline.drift.outputs import stored_outputs_suffice
from refract.pipeline.drift.profile import Profile, profile
from refract.pipeline.features.embed import Stored
from refract.pipeline.features.model import bundle_model, embedding_model
from refract.pipeline.features.store import FeatureStore

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

SIDE = 24
Change = Callable[[np.ndarray], np.ndarray]


def scene(label: str, number: int) -> np.ndarray:
    """Draw an image in the label's colour, with coarse structure and a random brightness."""
    rng = np.random.default_rng([number, *label.encode()])
    coarse = cv2.resize(rng.normal(0, 30, (8, 8, 3)), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    return np.clip((np.array(COLORS[label]) + coarse) * rng.uniform(0.75, 0.95), 0, 255).astype(np.uint8)


def write_scenes(
    root: Path, first: int, change: Change = lambda pixels: pixels, count: int = 40, **labels: int
) -> Path:
    """CLASS/NNNN.png; labels: of some labels another count."""
    for label in COLORS:
        for number in range(first, first + labels.get(label, count)):
            write_image(root / label / f"{number:04}.png", change(scene(label, number)))
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from refract.pipeline.config.config import config_from_dict
    from refract.pipeline.training.run import train

    root = tmp_path_factory.mktemp("drift")
    values = {
        "data": {"source": str(write_scenes(root / "images", 0, count=130)), "image_size": SIDE, "workers": 0, "val_fraction": 0.3,
                 "test_fraction": 0.3},
        "model": {"name": "lenet5"}, "optim": {"lr": 0.003}, "tracking": {"enabled": False},
        "trainer": {"max_epochs": 4, "run_name": "r", "runs_dir": str(root / "runs"), "device": "cpu"},
        "evaluation": {"robustness": "none"},
    }  # fmt: skip
    result = train(config_from_dict(values))
    return load_bundle(result.bundle)


def levels(measurement: Measured) -> dict[str, str]:
    return {check.name: check.level for check in measurement.drift.checks if check.level != "none"}


def without_reference(bundle: Bundle, where: Path) -> Path:
    """As an older version wrote it."""
    shutil.copytree(bundle.path, where)
    manifest = json.loads((where / "manifest.json").read_text())
    del manifest["files"]["reference.safetensors"]
    (where / "manifest.json").write_text(json.dumps(manifest))
    (where / "reference.safetensors").unlink()
    return where


def test_training_leaves_a_profile_of_what_was_not_trained_on(bundle: Bundle) -> None:
    stored = Profile.from_bytes(bundle.reference(), bundle.info.labels, multilabel=False)
    counts = bundle.info.data["counts"]
    assert stored.classes == {label: counts["val"][label] + counts["test"][label] for label in COLORS}
    assert stored.count == sum(stored.classes.values()) == stored.answered.sum() == len(stored.confidence)
    assert set(stored.statistics) == {"brightness", "contrast", "sharpness", "width", "height", "aspect"}
    assert stored.features.shape[1] == 84 and (stored.statistics["width"] == SIDE).all()


def test_images_of_the_same_kind_do_not_drift(bundle: Bundle, tmp_path: Path) -> None:
    measurement = measure_drift(bundle, str(write_scenes(tmp_path / "new", 1000)))
    assert measurement.drift.level == "none" and measurement.drift.count == 120 and not measurement.bad, levels(
        measurement
    )
    assert [c.name for c in measurement.drift.checks] == [
        "features", "answers", "confidence", "brightness", "contrast", "sharpness", "width", "height", "aspect", "classes",
        "new classes", "vanished classes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda pixels: np.clip(pixels * 1.3, 0, 255).astype(np.uint8), "brightness"),
        (lambda pixels: cv2.GaussianBlur(pixels, (0, 0), 1.2), "sharpness"),
        (lambda pixels: np.hstack([pixels, pixels[:, :8]]), "aspect"),
        (lambda pixels: 255 - pixels, "features"),
    ],
    ids=["brighter", "blurred", "wider", "inverted"],
)
def test_images_of_another_kind_drift(bundle: Bundle, tmp_path: Path, change: Change, expected: str) -> None:
    assert expected in levels(measure_drift(bundle, str(write_scenes(tmp_path / "new", 1000, change))))


def test_another_mix_of_classes_drifts_with_labels_and_without(bundle: Bundle, tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "new", 1000, blue=100, red=10)
    check_levels = levels(measure_drift(bundle, str(root)))
    assert check_levels["classes"] == check_levels["answers"] == "stop"
    blind = measure_drift(bundle, str(root), unlabelled=True)
    assert levels(blind)["answers"] == "stop" and "classes" not in {check.name for check in blind.drift.checks}


def test_classes_that_are_new_or_gone(bundle: Bundle, tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "new", 1000, red=0)
    for number in range(15):
        write_image(root / "purple <b>" / f"{number}.png", (scene("blue", 5000 + number) // 2 + 60).astype(np.uint8))
    (root / "red").mkdir(exist_ok=True)
    measurement = measure_drift(bundle, str(root))
    assert measurement.drift.new_classes == {"purple <b>": 15} and set(measurement.drift.vanished) == {"red"}
    assert measurement.drift.level == "stop" and levels(measurement)["new classes"] == "stop"
    measurement.report.write(tmp_path / "rep")
    html = (tmp_path / "rep" / "report.html").read_text()
    assert "purple &lt;b&gt; (15)" in html and "<b>" not in html.replace("purple &lt;b&gt;", "")


def test_the_furthest_images_are_shown(bundle: Bundle, tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "new", 1000)
    for number in range(4):
        write_image(root / "green" / f"odd{number}.png", 255 - scene("green", number))
    (root / "green" / "bad.png").write_text("no image")
    measurement = measure_drift(bundle, str(root))
    first = {Path(row["path"]).name for row in measurement.numbers["furthest"][:4]}
    assert first == {f"odd{number}.png" for number in range(4)}
    assert list(measurement.bad) == [str(root / "green" / "bad.png")]
    gallery = measurement.report.galleries["The images that drifted most"]
    assert len(gallery) == 24 and all(row["src"].startswith("data:image/jpeg") for row in gallery)


def test_a_bundle_without_a_profile_asks_for_a_reference(bundle: Bundle, tmp_path: Path) -> None:
    old = load_bundle(without_reference(bundle, tmp_path / "old"))
    root = str(write_scenes(tmp_path / "new", 1000))
    with pytest.raises(DataError, match="has no reference.*--reference DATA"):
        measure_drift(old, root)
    known = measure_drift(old, root, reference=bundle.info.data["source"])
    expected = measure_drift(bundle, root)
    assert known.drift.reference_count == expected.drift.reference_count, "of the training data only what was held out"
    assert known.drift.checks[0].value == pytest.approx(expected.drift.checks[0].value, abs=1e-3)


def test_data_come_with_labels_or_without(bundle: Bundle, tmp_path: Path) -> None:
    labels = bundle.info.labels

    def read(source: Path, **more: bool):
        return read_data(str(source), labels, multilabel=False, **more)

    assert read(write_scenes(tmp_path / "classes", 0, count=1)).names == [("blue",), ("green",), ("red",)]
    assert read(write_scenes(tmp_path / "split" / "train", 0, count=1).parent).names == [
        ("blue",),
        ("green",),
        ("red",),
    ]
    assert read(tmp_path / "classes", unlabelled=True).names is None
    write_scenes(tmp_path / "days", 0, count=1)
    for label, day in zip(COLORS, ("2026-01", "2026-02", "2026-03"), strict=True):
        (tmp_path / "days" / label).rename(tmp_path / "days" / day)
    assert read(tmp_path / "days").names is None, "no folder is named as a class"
    write_image(tmp_path / "classes" / "loose.png", scene("red", 9))
    assert read(tmp_path / "classes").names is None and len(read(tmp_path / "classes").samples) == 4
    table = pd.DataFrame({"path": ["classes/red/0000.png", "classes/blue/0000.png"], "label": ["red", "odd;one"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    assert read(tmp_path / "t.csv").names == [("red",), ("odd;one",)]
    assert read_data(str(tmp_path / "t.csv"), labels, multilabel=True).names == [("red",), ("odd", "one")]
    table[["path"]].to_csv(tmp_path / "p.csv", index=False)
    assert read(tmp_path / "p.csv").names is None and Path(read(tmp_path / "p.csv").samples[0].path).is_file()
    table[["label"]].to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(DataError, match="no column 'path' or 'text'"):
        read(tmp_path / "l.csv")
    (tmp_path / "nothing").mkdir()
    for wrong in ("nothing", "nowhere"):
        with pytest.raises(DataError, match=wrong):
            read(tmp_path / wrong)
    assert len(read(tmp_path / "days").drawn(2).samples) == 2 and len(read(tmp_path / "days").drawn(0).samples) == 3


def test_the_exit_code_stops_a_flow(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, other = (
        write_scenes(tmp_path / "same", 1000),
        write_scenes(tmp_path / "other", 1000, lambda pixels: 255 - pixels),
    )
    path = str(bundle.path)
    assert main([path, str(same), "--json", str(tmp_path / "d.json")]) == 0
    numbers = json.loads((tmp_path / "d.json").read_text())
    assert numbers["level"] == "none" and numbers["unreadable"] == {} and len(numbers["checks"]) == 12
    assert len(numbers["furthest"]) == 24
    assert main([path, str(other), "--test", "classifier", "--report", str(tmp_path / "rep")]) == 20
    printed = capsys.readouterr().out
    assert "drift: stop" in printed and (tmp_path / "rep" / "report.json").is_file()
    html = (tmp_path / "rep" / "report.html").read_text()
    assert (
        "Drift reached a stop threshold" in html
        and "http" not in html.replace("data:image", "")
        and "<script" not in html
    )
    (tmp_path / "t.yaml").write_text("{features: {stop: null}, answers: {stop: null}, confidence: {stop: null}}")
    never = [f"--stop={name}=never" for name in ("brightness", "contrast", "sharpness", "classifier")]
    assert main([path, str(other), "--thresholds", str(tmp_path / "t.yaml"), *never]) == 0, "it only warns"
    assert "drift: warning" in capsys.readouterr().out


def test_mistakes_are_reported(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, few = str(bundle.path), str(write_scenes(tmp_path / "few", 0, count=3))
    assert main([path, few]) == 2
    assert "9 new samples and 234 of the reference; 20 of each are needed" in capsys.readouterr().err
    for wrong, said in (
        (["--stop", "featurs=1"], "did you mean 'features'"),
        (["--warn", "features"], "CHECK=EFFECT"),
        (["--warn", "width=wide"], "could not convert"),
        (["--thresholds", str(tmp_path / "few" / "red" / "0000.png")], "0000.png"),
    ):
        assert main([path, few, *wrong]) == 2, wrong
        assert said in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1]")
    assert main([path, few, "--thresholds", str(tmp_path / "list.yaml")]) == 2


def test_the_command_runs(refract: Run, bundle: Bundle, tmp_path: Path) -> None:
    make_image("red", 0)
    printed = refract("drift", bundle.path, write_scenes(tmp_path / "new", 1000)).stdout
    assert printed.rstrip().endswith("no drift") and "features" in printed


def test_texts_alone_and_beside_images_have_features_and_lengths(tmp_path: Path) -> None:
    tokens, values = HashedNgrams(buckets=500), {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.manual_seed(0)
    texts = Classifier(Reader(None, BagOfNgrams(500, width=16), 3), tokens=tokens, **values).eval()
    both = Classifier(
        Reader(build("lenet5", 3, image_size=(32, 32)), BagOfNgrams(500, width=16), 3, width=24),
        tokens=tokens,
        **values,
    ).eval()
    write_image(tmp_path / "a.png", scene("red", 0))
    samples = [Sample("t", (), text=f"words {i}", has_image=False) for i in range(30)]
    samples += [Sample(str(tmp_path / "a.png"), (), text="a caption") for _ in range(5)]
    kinds = {"task": "multiclass", "labels": tuple(COLORS)}
    one = profile(texts, Preprocess(32, 32), samples, **kinds).profile
    assert one.features.shape == (35, 16) and set(one.statistics) == {"characters"}
    two = profile(both, Preprocess(32, 32), samples, **kinds).profile
    assert two.features.shape == (35, 24) and np.isnan(two.statistics["brightness"][:30]).all()
    assert (two.statistics["width"][30:] == SIDE).all() and two.statistics["characters"][30:].tolist() == [9] * 5
    long = profile(
        texts, Preprocess(32, 32), [replace(s, text="many more words " * 9) for s in samples], **kinds
    ).profile
    check_levels = {check.name: check.level for check in compare(one, long).checks}
    assert check_levels["characters"] == "warn" and check_levels["features"] == "stop"


def log_of(folder: Path, digest: str, count: int = 60, *, light: float = 0.55, label: str | None = None) -> Path:
    """As a server writes it."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"time": "2026-11-01T00:00:00+00:00", "model": digest[:16], "answered": [label or tuple(COLORS)[i % 3]], "confidence": 0.99,
         "statistics": {"brightness": light + float(rng.normal(0, 0.02)), "width": SIDE, "height": SIDE}, "image": None}
        for i in range(count)
    ]  # fmt: skip
    (folder / "inputs-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("key", "logged", "on_disk"),
    [
        ("image", "images/a.png", "images"),
        ("picture", "pictures/a.png", "pictures"),
        ("picture", "pictures/a.png", "images"),
    ],
    ids=["now", "before", "renamed since"],
)
def test_what_a_server_sampled_is_read(bundle: Bundle, tmp_path: Path, key: str, logged: str, on_disk: str) -> None:
    folder = log_of(tmp_path / "log", bundle.digest, light=0.9, label="red")
    (folder / on_disk).mkdir()
    write_image(folder / on_disk / "a.png", scene("red", 7000))
    write_image(tmp_path / "outside.png", scene("red", 7001))
    lines = (folder / "inputs-000000.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:3]]
    del rows[0]["image"]
    rows[0][key], rows[1]["image"], rows[2]["model"] = logged, "../outside.png", "0" * 16
    more = [json.dumps(row) for row in rows] + ['{"time": "cut', "[1]", '{"model": 3}', ""]
    (folder / "inputs-000001.jsonl").write_text("\n".join(more))
    measurement = measure_drift(bundle, str(folder))
    assert measurement.drift.count == 62, "60, and two of the three that are whole and this model's"
    assert {"answers": "stop", "brightness": "stop"}.items() <= levels(measurement).items()
    assert "features" not in {check.name for check in measurement.drift.checks}, "what was unsure is no fair sample"
    (gallery,) = measurement.report.galleries.values()
    assert [Path(row["path"]).name for row in gallery] == ["a.png"]
    with pytest.raises(DataError, match="has no inputs of this bundle"):
        measure_drift(bundle, str(log_of(tmp_path / "other", "f" * 64)))


def shards(features: Path) -> dict[Path, bytes]:
    """Each computed embedding is in a shard, so that equal shards mean that none was computed."""
    return {file: file.read_bytes() for file in features.rglob("vectors-*.parquet")}


def rows_of(files: Iterable[Path]) -> int:
    return sum(len(pd.read_parquet(file, columns=["sha256"])) for file in files)


def test_a_second_measurement_computes_no_embedding_and_finds_the_same(bundle: Bundle, tmp_path: Path) -> None:
    root, features = str(write_scenes(tmp_path / "new", 1000, lambda pixels: 255 - pixels)), tmp_path / "features"
    (tmp_path / "new" / "green" / "bad.png").write_text("no image")
    alone = measure_drift(bundle, root)
    first = measure_drift(bundle, root, features=features)
    computed = shards(features)
    assert rows_of(computed) == 120
    again = measure_drift(bundle, root, features=features)
    assert shards(features) == computed and again.numbers == first.numbers and list(again.bad) == list(alone.bad)
    assert levels(first) == levels(alone) and first.drift.count == alone.drift.count
    for stored, direct in zip(first.drift.checks, alone.drift.checks, strict=True):
        assert stored.value == pytest.approx(direct.value, abs=2e-3), stored.name
    np.testing.assert_allclose(first.shown.probabilities, alone.shown.probabilities, atol=2e-3)


def test_embeddings_of_other_commands_serve_and_a_changed_image_gets_a_new_one(bundle: Bundle, tmp_path: Path) -> None:
    root, features = write_scenes(tmp_path / "new", 1000), tmp_path / "features"
    assert cli.main(["embed", str(root), "--model", str(bundle.path), "-o", str(features)]) == 0
    embedded, lists = shards(features), list(features.rglob("samples-*"))
    drift = ["drift", str(bundle.path), str(root), "--features", str(features), "--images", "100"]
    assert cli.main(drift) == 0
    assert shards(features) == embedded and list(features.rglob("samples-*")) == lists
    write_image(root / "green" / "1000.png", 255 - scene("green", 1000))
    measurement = measure_drift(bundle, str(root), features=features)
    assert rows_of(shards(features).keys() - embedded.keys()) == 1
    assert measurement.numbers["furthest"][0]["path"] == str(root / "green" / "1000.png")


def test_other_weights_take_no_embedding_from_the_store(bundle: Bundle, tmp_path: Path) -> None:
    root, features = str(write_scenes(tmp_path / "new", 1000)), tmp_path / "features"
    measure_drift(bundle, root, features=features)
    other = bundle_model(bundle)
    with torch.no_grad():
        next(other.classifier.network.parameters()).mul_(0.5)
    changed = embedding_model(other.classifier, other.preprocess, bundle.info.network, bundle.info.text, {})
    kinds = {"task": bundle.info.task, "labels": bundle.info.labels}
    samples = read_data(root, bundle.info.labels, multilabel=False).samples
    stored = Stored(changed, FeatureStore(features, changed.key, changed.record))
    stored_profile = profile(changed.classifier, changed.preprocess, samples, stored=stored, **kinds).profile
    direct = profile(changed.classifier, changed.preprocess, samples, **kinds).profile
    np.testing.assert_allclose(stored_profile.features, direct.features, rtol=2e-3, atol=2e-3)
    assert len({file.parent for file in shards(features)}) == 2


def test_a_network_that_computes_more_after_its_head_is_measured_without_the_store(bundle: Bundle) -> None:
    model = bundle_model(bundle)
    assert stored_outputs_suffice(model)
    hook = model.classifier.network.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not stored_outputs_suffice(model)
    hook.remove()


def test_a_store_that_cannot_be_created_is_left_alone(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    measured = measure_drift(bundle, str(write_scenes(tmp_path / "new", 1000)), features=file / "features")
    assert measured.drift.count == 120 and "Not a directory" in caplog.text and file.read_bytes() == b""


@pytest.mark.skipif(
    os.geteuid() == 0, reason="root writes into read-only folders, too; the test above has an error that root gets"
)
def test_a_read_only_store_is_left_alone(bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, features = bundle_model(bundle), tmp_path / "features"
    store = FeatureStore(features, model.key, model.record)
    store.folder.chmod(0o500)
    measured = measure_drift(bundle, str(write_scenes(tmp_path / "new", 1000)), features=features)
    store.folder.chmod(0o700)
    assert measured.drift.count == 120 and not shards(features) and "read-only" in caplog.text


def test_a_killed_measurement_repeats_at_most_one_shard(bundle: Bundle, tmp_path: Path, warm: WarmProcess) -> None:
    command = ["drift", str(bundle.path), "digits"]
    process = warm.start(command, cwd=tmp_path, env=dict(os.environ))
    with process.output:
        until = time.monotonic() + 120
        while not shards(tmp_path / "features"):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    process.wait(30)
    written = shards(tmp_path / "features")
    measurement = measure_drift(bundle, "digits", features=tmp_path / "features")
    now = shards(tmp_path / "features")
    assert measurement.drift.count == 1797 and now.items() >= written.items()
    assert rows_of(now) == len({sample.key for sample in read_data("digits", (), multilabel=False).samples})


def test_a_store_that_cannot_be_written_is_named_and_the_drift_is_measured(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "features").write_text("a file")
    measurement = measure_drift(bundle, str(write_scenes(tmp_path / "new", 1000)), features=tmp_path / "features")
    assert measurement.drift.count == 120 and "features: cannot be written" in caplog.text
