"""The proposals of `refract init` for each kind of folder, with images drawn by the tests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file
from small_data import Run, write_image

from refract.augment import ImageError, load_policy
from refract.models.registry import build
from refract.pipeline.cli import init
from refract.pipeline.config.config import ConfigError, load_config
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.suggest import Proposal, Start, Survey, check_start, config_text, propose, take_survey
from refract.pipeline.suggest import survey as survey_module
from refract.pipeline.suggest.backbones import RESNET18
from refract.pipeline.suggest.content import content_of, is_glyph, is_grey, thumbnail
from refract.pipeline.suggest.label_names import are_signs, exchanged_by_flip

Draw = Callable[[np.random.Generator, str], np.ndarray]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide this machine's pretrained weights; tests of pretrained weights set `backbones`."""
    monkeypatch.setattr(survey_module, "backbones_present", tuple)


def folder_of(root: Path, labels: str, draw: Draw, count: int = 12, suffix: str = "png") -> Path:
    random = np.random.default_rng(0)
    for label in labels.split():
        for number in range(count):
            write_image(root / label / f"{number:02}.{suffix}", draw(random, label))
    return root


def photo(random: np.random.Generator, label: str, side: int = 160) -> np.ndarray:
    """Coloured blobs."""
    coarse = random.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return cv2.resize(coarse, (side + 20, side), interpolation=cv2.INTER_CUBIC)


def scan(random: np.random.Generator, label: str, side: int = 160) -> np.ndarray:
    """Grey blobs, stored as RGB."""
    return np.repeat(photo(random, label, side)[:, :, :1], 3, axis=2)


def glyph(random: np.random.Generator, label: str) -> np.ndarray:
    """A white character on black."""
    image = np.zeros((28, 28, 3), np.uint8)
    place = (int(random.integers(5, 10)), int(random.integers(20, 25)))
    cv2.putText(image, label, place, cv2.FONT_HERSHEY_SIMPLEX, 0.7, (255, 255, 255), 2)
    return image


def arrow(random: np.random.Generator, label: str) -> np.ndarray:
    """A coloured wedge that points to one side."""
    image = np.full((24, 24, 3), random.integers(0, 120, 3), np.uint8)
    image[:, : 8 + int(random.integers(0, 3))] = random.integers(160, 256, 3)
    return image if label == "one" else np.ascontiguousarray(image[:, ::-1])


def proposed(root: Path) -> tuple[Survey, Proposal]:
    survey = take_survey(load_manifest(root))
    return survey, propose(survey)


def reason(proposal: Proposal, key: str) -> str:
    return next(choice.reason for choice in proposal.choices if choice.key == key)


def test_photos_in_folders_named_by_letters_are_photos(tmp_path: Path) -> None:
    survey, proposal = proposed(folder_of(tmp_path / "photos", "a b", photo, suffix="jpg"))
    assert are_signs(survey.labels) and not survey.content.grey
    assert proposal.value("augment.policy") == "fine-tune" and proposal.value("data.resize") == "crop"
    assert "pip install 'refract[pretrained]'" in proposal.notes[0] and "--model.weights FILE" in proposal.notes[1]


def test_no_proposed_policy_for_photos_changes_the_hue(tmp_path: Path) -> None:
    (jitter,) = (op for op in load_policy("fine-tune").ops if op.name == "ColorJitter")
    assert not np.any(vars(jitter)["hue"]), "bees stay yellow"


def test_large_grey_images_get_no_colour_flips_or_crops(tmp_path: Path) -> None:
    survey, proposal = proposed(folder_of(tmp_path / "scans", "healthy lesion", scan, suffix="jpg"))
    assert survey.content.grey, "JPEG of equal channels"
    assert proposal.value("augment.policy") == "medical-safe" and proposal.value("data.resize") == "squash"


def test_signs_are_small_glyphs_with_names_of_signs(tmp_path: Path) -> None:
    survey, proposal = proposed(folder_of(tmp_path / "signs", "3 4 E R", glyph))
    assert survey.content.glyphs and proposal.value("augment.policy") == "digits"
    assert proposal.value("model.name") == "resnet20" and proposal.value("data.image_size") == 32
    _, things = proposed(folder_of(tmp_path / "things", "3 4", lambda r, c: photo(r, c, 32)))
    assert things.value("augment.policy") == "cifar", "small colour images named by digits are no digits"
    _, clothes = proposed(folder_of(tmp_path / "clothes", "coat boot", lambda r, c: glyph(r, c[0])))
    assert clothes.value("augment.policy") == "cifar", "their names are not of signs"


def test_classes_that_a_flip_exchanges_get_no_flip(tmp_path: Path) -> None:
    survey, proposal = proposed(folder_of(tmp_path / "arrows", "one other", arrow))
    assert survey.content.swapped == ("one", "other")
    ops = [next(iter(op)) for op in proposal.value("augment.policy")]
    assert ops == ["PadAndCrop", "Cutout"] and "look like" in reason(proposal, "augment.policy")
    _, named = proposed(folder_of(tmp_path / "eyes", "left-eye right-eye", photo))
    assert "HorizontalFlip" not in str(named.value("augment.policy"))
    assert "left-eye and right-eye" in reason(named, "augment.policy")


def test_names_that_differ_by_a_side() -> None:
    assert exchanged_by_flip(["turn left", "turn right", "ahead"]) == ("turn left", "turn right")
    assert exchanged_by_flip(["EyeLeft", "EyeRight"]) == ("EyeLeft", "EyeRight")
    assert exchanged_by_flip(["hand_l", "hand_r"]) == ("hand_l", "hand_r")
    assert exchanged_by_flip(["left", "up"]) is None and exchanged_by_flip(["bright", "cleft"]) is None


def test_content_is_judged_within_jpeg_noise() -> None:
    random = np.random.default_rng(0)
    grey = scan(random, "")
    assert is_grey(grey) and is_grey(cv2.imdecode(cv2.imencode(".jpg", grey)[1], cv2.IMREAD_COLOR))
    assert not is_grey(photo(random, "")) and not is_glyph(photo(random, "").mean(axis=2))
    black_on_white = thumbnail(255 - glyph(random, "R"))
    assert is_glyph(black_on_white.mean(axis=2)) and not is_glyph(np.full((32, 32), 128.0))
    same = [thumbnail(photo(random, "")) for _ in range(40)]
    assert content_of(same, ["a", "b"] * 20).swapped is None, "classes that nothing tells apart"
    assert content_of([], []).decoded == 0


def test_pretrained_weights_change_the_choices(tmp_path: Path) -> None:
    survey = replace(
        take_survey(load_manifest(folder_of(tmp_path / "photos", "bee wasp", photo))), backbones=(RESNET18,)
    )
    few = propose(survey)
    assert few.value("model.weights") == "default" and few.value("data.image_size") == 224
    assert few.value("model.mode") == "probe"
    grey = propose(replace(survey, content=replace(survey.content, grey=True)))
    assert grey.value("model.mode") == "linear-then-fine-tune"
    assert few.value("optim.lr") is None, "the default of the mode"
    many = propose(replace(survey, samples=4000, training=2800, counts={"bee": 2000, "wasp": 2000}))
    assert many.value("model.mode") == "fine-tune" and many.value("data.batch_size") == 32
    assert many.value("trainer.max_epochs") < few.value("trainer.max_epochs")
    text = config_text(few, survey)
    assert "\n  # lr has its default: " in text and "\n  lr:" not in text
    assert "max_epochs: 40                # not for probe; for fine-tune: " in text
    assert "not for probe" not in config_text(many, survey)


def test_the_learning_rate_stays_null_so_that_it_follows_later_weights(tmp_path: Path) -> None:
    _, proposal = proposed(folder_of(tmp_path / "photos", "cat dog", photo, suffix="jpg"))
    assert proposal.value("model.weights") == "none" and proposal.value("optim.lr") is None


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", "a b", photo, suffix="jpg")
    whole = (root / "a" / "03.jpg").read_bytes()
    (root / "a" / "03.jpg").write_bytes(whole[: len(whole) // 2])
    survey, _ = proposed(root)
    assert "1 of the 24 examined images are unreadable, such as " in survey.notes[0] and "a/03.jpg" in survey.notes[0]
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(ImageError, match="all 24 examined images are unreadable"):
        take_survey(load_manifest(root))


@pytest.mark.parametrize(
    ("folders", "refused", "notes"),
    [
        ("cat dog", False, []),
        ("train/cat train/dog val/cat val/dog test/cat test/dog", False, []),
        ("train/cat train/dog valid/cat valid/dog", False, ["no split test: training draws about 5 of the training"]),
        ("train/cat train/dog test/cat test/dog", False, ["no split val: training draws about 2 of the training samples"]),
        ("train/cat train/dog", False, ["no split test: ", "no split val: "]),
        (
            "train/cat train/dog val/cat val/dog test/images", True,
            ["1 classes have no training sample, such as that of ", "test/images/00.png; training rejects them; add"],
        ),
    ],
)  # fmt: skip
def test_notes_name_drawn_splits_and_rejected_data(
    tmp_path: Path, folders: str, refused: bool, notes: list[str]
) -> None:
    survey, _ = proposed(folder_of(tmp_path / "photos", folders, photo))
    assert survey.refused == refused
    joined = "\n".join(survey.notes)
    assert all(note in joined for note in notes) and ("no split" in joined) == ("no split" in "".join(notes))


@pytest.mark.parametrize(
    ("damaged", "folders", "step"),
    [
        ("", "a b", "next: refract train photos.yaml"),
        ("a/03.png", "a b", "next: fix the unreadable images, or skip them: refract train photos.yaml --data.on_bad_file skip"),
        ("", "train/a train/b test/c", "next: fix the data as noted above, then refract train photos.yaml"),
    ],
)  # fmt: skip
def test_the_printed_next_command_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, damaged: str, folders: str, step: str
) -> None:
    root = folder_of(tmp_path / "photos", folders, photo)
    if damaged:
        (root / damaged).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert init.main(["photos"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == step


def test_init_prints_its_reasons_writes_them_and_draws_a_preview(refract: Run, tmp_path: Path) -> None:
    folder_of(tmp_path / "arrows", "left right", arrow)
    (tmp_path / "arrows" / "left" / "00.png").write_bytes(b"")
    output = refract("init", "arrows", "-o", "mine.yaml").stdout
    text = (tmp_path / "mine.yaml").read_text()
    lines = [line for line in output.splitlines() if line.startswith("  augment.policy ")]
    assert len(lines) == 1 and "PadAndCrop, Cutout" in lines[0] and "left and right" in lines[0]
    starts = {line.index("resnet20") for line in output.splitlines() if "resnet20" in line}
    assert starts == {lines[0].index("PadAndCrop")}, "the columns are aligned"
    assert "differ by left and right" in text and "1 of the 24 examined images" in output
    config = load_config(tmp_path / "mine.yaml")
    assert config.model.name == "resnet20" and config.augment.policy[1] == {"Cutout": {"length": 0.25, "p": 0.5}}
    assert "wrote mine.preview.png" in output
    grid = cv2.imread(str(tmp_path / "mine.preview.png"))
    assert grid is not None and grid.std() > 10


def test_a_named_network_with_weights_is_trained_at_their_size(refract: Run, tmp_path: Path, lite0: Path) -> None:
    folder_of(tmp_path / "insects", "ant bee", photo, suffix="jpg")
    options = ("--model.name", "timm/tf_efficientnet_lite0", "--model.weights", str(lite0))
    output = refract("init", "insects", *options, "-o", "mine.yaml").stdout
    config = load_config(tmp_path / "mine.yaml")
    assert (config.model.name, config.model.weights) == ("timm/tf_efficientnet_lite0", str(lite0))
    assert config.data.image_size == 224 and config.model.mode == "probe"
    assert config.augment.policy == "fine-tune" and "the size that the weights were trained at" in output
    assert "12 samples in each class" in output and "from scratch" not in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model.weights", "lost.pth"), "--model.weights lost.pth: there is no such file or folder; check the path"),
        (("--model.weights", "insects"), "the network of the weights is missing; add --model.name"),
        (("--model.name", "resnet20", "--model.weights", "lost.pth"), "lost.pth"),
        (("--model.weights", "https://huggingface.co/timm/resnet18.a1_in1k"), "write hf://timm/resnet18.a1_in1k"),
        (("--model.name", "resnet0"), "network 'resnet0' is unknown"),
        (("--model.name", "resnet20", "--model.weights", "default"), "resnet20 has no pretrained weights"),
    ],
)
def test_an_untrainable_start_is_rejected_before_writing(
    refract: Run, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    folder_of(tmp_path / "insects", "ant bee", photo, suffix="jpg")
    done = refract("init", "insects", *options, code=2)
    assert expected in done.stderr.splitlines()[0]
    assert not (tmp_path / "insects.yaml").exists()


def test_a_bundle_implies_its_network(tmp_path: Path) -> None:
    network = {"name": "lenet5", "image_size": [40, 40], "args": {"head": "cosine"}}
    (tmp_path / "bundle").mkdir()
    trained = build("lenet5", 2, image_size=(40, 40), head="cosine")
    save_file(trained.state_dict(), tmp_path / "bundle" / "weights.safetensors")
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps({"network": network}))
    start = check_start(None, str(tmp_path / "bundle"), 2)
    assert start == Start("lenet5", str(tmp_path / "bundle"), 40, True, {}, "cosine", is_in_weights=True)
    survey = take_survey(load_manifest(folder_of(tmp_path / "photos", "a b", photo)))
    proposal = propose(survey, start)
    assert proposal.value("data.image_size") == 40 and proposal.value("model.head") == "cosine"
    network["image_size"] = [40, 50]
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps({"network": network}))
    with pytest.raises(ConfigError, match="40×50 pixels"):
        check_start(None, str(tmp_path / "bundle"), 2)
    for damage in ({"image_size": 32}, {"args": [1]}, {"image_size": None}):
        (tmp_path / "bundle" / "bundle.json").write_text(json.dumps({"network": network | damage}))
        with pytest.raises(ConfigError, match=r"its bundle\.json does not describe an image network"):
            check_start(None, str(tmp_path / "bundle"), 2)


def test_small_images_without_weights_get_a_note_on_them(tmp_path: Path) -> None:
    survey, proposal = proposed(folder_of(tmp_path / "things", "car cat", lambda r, c: photo(r, c, 32)))
    assert proposal.value("model.name") == "resnet20"
    assert "--model.name resnet18 --model.weights FILE" in proposal.notes[1]
    start = Start("resnet18", "resnet18.pth", 224)
    assert propose(survey, start).value("data.image_size") == 128
    assert propose(survey, replace(start, fixed=True)).value("data.image_size") == 224


def test_a_file_with_a_generic_name_gives_the_model_the_name_of_its_folder(tmp_path: Path) -> None:
    survey, _ = proposed(folder_of(tmp_path / "insects" / "train", "a b", photo))
    assert propose(survey).value("tracking.model_name") == "insects"
