"""`refract ops`, `explain` and `augment`: the augmentation engine from the command line."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_data import Run

from refract.augment import Augmenter
from refract.augment.registry import OPS

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_augment_writes_copies_and_replays_them_byte_for_byte(folder: Path, refract: Run, tmp_path: Path) -> None:
    refract("augment", "fine-tune", folder, "out", "--copies", 2, "--size", 32, "--jobs", 2)
    written = files(tmp_path / "out")
    assert len(written) == 121 and "blue/00_jpg_0.jpg" in written and "plans.jsonl" in written
    assert cv2.imread(str(tmp_path / "out" / "red" / "03_jpg_1.jpg")).shape == (32, 32, 3)
    assert written["blue/00_jpg_0.jpg"] != written["blue/00_jpg_1.jpg"]
    refract("augment", "--replay", "out/plans.jsonl", folder, "again")
    assert files(tmp_path / "again") == written
    refract("augment", "fine-tune", folder, "other", "--copies", 2, "--size", 32, "--seed", 1)
    assert files(tmp_path / "other")["blue/00_jpg_0.jpg"] != written["blue/00_jpg_0.jpg"]


def test_png_copies_are_the_pixels_of_the_library(folder: Path, refract: Run, tmp_path: Path) -> None:
    refract("augment", "cifar", folder, "out", "--format", "png", "--seed", 3)
    line = json.loads((tmp_path / "out" / "plans.jsonl").read_text().splitlines()[7])
    source = (folder / line["source"]).read_bytes()
    expected = Augmenter("cifar", seed=3)(source, epoch=0, index=7)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out" / line["output"]))[..., ::-1], expected)


def test_augment_overwrites_nothing_and_reports_errors(folder: Path, refract: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    assert "not an empty folder" in refract("augment", "cifar", folder, "mine", code=2).stderr
    assert files(tmp_path / "mine") == {"notes.txt": b"keep me"}
    assert "MixUp and CutMix" in refract("augment", "imagenet-a1", folder, "out", code=2).stderr
    (folder / "red" / "broken.jpg").write_bytes(b"no image")
    assert "red/broken.jpg: not an image" in refract("augment", "cifar", folder, "out", code=2).stderr
    assert not (tmp_path / "out").exists()
    assert "IN_DIR OUT_DIR" in refract("augment", folder, "out", code=2).stderr


def test_replay_rejects_changed_images_and_invalid_plan_files(folder: Path, refract: Run, tmp_path: Path) -> None:
    refract("augment", "cifar", folder, "out")
    changed = folder / "green" / "05.jpg"
    changed.write_bytes((folder / "green" / "06.jpg").read_bytes())
    (folder / "green" / "07.jpg").unlink()
    output = refract("augment", "--replay", "out/plans.jsonl", folder, "again", code=2).stderr
    assert (
        "2 images could not be written" in output
        and "05.jpg: is not the image" in output
        and "07.jpg: No such file" in output
    )
    assert len(files(tmp_path / "again")) == 59, "the others are there"
    plans = (tmp_path / "out" / "plans.jsonl").read_text()
    for wrong in ("{}", "hello", plans.splitlines()[0].replace("blue/00_jpg_0.jpg", "../../escaped.jpg")):
        (tmp_path / "wrong.jsonl").write_text(wrong + "\n")
        assert (
            "wrong.jsonl, line 1: not an entry"
            in refract("augment", "--replay", "wrong.jsonl", folder, "more", code=2).stderr
        )
    assert not (tmp_path.parent / "escaped.jpg").exists()


def test_ops_lists_every_op_and_shows_one(refract: Run) -> None:
    listed = refract("ops").stdout
    rows = [json.loads(line) for line in refract("ops", "--json").stdout.splitlines()]
    assert [row["name"] for row in rows] == list(OPS)
    assert all(f"  {name} " in listed for name in OPS)
    one = refract("ops", "RandomErasing").stdout
    assert "value" in one and "Zhong et al. 2020" in one and "- RandomErasing: {p: 0.5}" in one
    assert "did you mean Rotate?" in refract("ops", "Rotaet", code=2).stderr


def test_explain_shows_the_fused_passes(folder: Path, refract: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "- RandomCrop: {size: 16}\n- Rotate: {degrees: [5, 9]}\n- Brightness\n- Contrast\n- MixUp\n"
    )
    output = refract("explain", "mine.yaml", folder / "red" / "00.jpg", "--repeats", 2).stdout
    assert "resampling: RandomCrop + Rotate, to 16×16" in output and "colour matrix: Brightness + Contrast" in output
    assert "without fusion (exact: true)" in output and "MixUp and CutMix act on a batch" in output
    assert "it looks like text" in refract("explain", "digits", "mine.yaml", code=2).stderr


def test_odd_file_names_and_a_single_file_are_replayed(folder: Path, refract: Run, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    image = (folder / "red" / "00.jpg").read_bytes()
    for name in ("a\u2028b.jpg", "ä ö.jpg", os.fsdecode(b"b\xff.jpg")):
        (odd / name).write_bytes(image)
    refract("augment", "cifar", odd, "out")
    refract("augment", "--replay", "out/plans.jsonl", odd, "again")
    written = files(tmp_path / "out")
    assert len(written) == 4 and files(tmp_path / "again") == written
    refract("augment", "cifar", folder / "red" / "00.jpg", "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["00_jpg_0.jpg", "plans.jsonl"]
