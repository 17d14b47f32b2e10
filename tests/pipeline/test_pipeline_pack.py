"""`refract pack`: the same samples in the same order, smaller images, interruptions, and damaged packs."""

import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from small_data import Run, make_image, paint, table
from test_pipeline_archives import config
from warm_process import WarmProcess

from refract.augment import decode
from refract.pipeline.data.archives.archive import index_of_archive
from refract.pipeline.data.manifest import DataError, Manifest, load_manifest
from refract.pipeline.data.pack import StoredImages, pack
from refract.pipeline.files import locked
from refract.pipeline.stopping import Stop
from refract.pipeline.training.run import train

NEVER = Stop("never")
AS_IS = StoredImages()


def packed(source: Path | Manifest, folder: Path, images: StoredImages = AS_IS, size: int = 7) -> Manifest:
    manifest = load_manifest(source, to_train=False) if isinstance(source, Path) else source
    pack(manifest, images, folder, NEVER, shard_size=size)
    return load_manifest(folder, manifest.task, to_train=False)


def facts(manifest: Manifest) -> list[tuple[object, ...]]:
    return [(s.read(), [manifest.labels[i] for i in s.labels], s.split, s.text) for s in manifest.samples]


@pytest.mark.slow
def test_training_on_a_pack_gives_the_weights_of_the_folder(archives: Path, tmp_path: Path) -> None:
    manifest = packed(archives / "images", tmp_path / "pack")
    assert facts(manifest) == facts(load_manifest(archives / "images"))
    assert len([*(tmp_path / "pack").glob("*.tar")]) == 5
    train(config(archives / "images", "folder", workers=0))
    train(config(tmp_path / "pack", "pack", workers=2))
    weights = [load_file(Path("runs") / run / "bundle" / "weights.safetensors") for run in ("folder", "pack")]
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_config_is_packed_as_training_reads_it(folder: Path, refract: Run, tmp_path: Path) -> None:
    """Without the image that cannot be decoded, and with the splits that training draws."""
    (folder / "red" / "05.jpg").write_bytes(b"not an image")
    settings = f"data: {{source: {folder}, on_bad_file: skip}}\ntrainer: {{seed: 3}}\n"
    (tmp_path / "c.yaml").write_text(settings)
    done = json.loads(refract("pack", "c.yaml", "pack", "--json").stdout)
    manifest = load_manifest("pack")
    assert done["samples"] == len(manifest.samples) == 59 and manifest.splits() == ["train", "val", "test"]
    (tmp_path / "packed.yaml").write_text(settings.replace(str(folder), "pack"))
    again = json.loads(refract("pack", "packed.yaml", "pack2", "--json").stdout)
    assert again["fingerprint"] == done["fingerprint"] == json.loads(Path("pack2/pack.json").read_text())["fingerprint"]


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=5).filter(lambda t: t.strip() == t)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from(["0.png", "1.png", ""]), NAMES, NAMES, NAMES), min_size=2, max_size=6))
def test_labels_texts_and_metadata_of_a_table_are_kept(
    rows: list[tuple[str, str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    for number in range(2):
        cv2.imwrite(str(folder / f"{number}.png"), make_image("red", number))
    file = table(folder / "t.csv", [[*row] for row in rows], ["path", "label", "text", "camera"])
    manifest = load_manifest(file, to_train=False)
    again = packed(manifest, folder / "pack", size=2)
    assert facts(again) == facts(manifest) and again.task == manifest.task
    assert [s.metadata["camera"] for s in again.samples] == [s.metadata["camera"] for s in manifest.samples]


def test_classes_without_a_sample_are_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "none").mkdir()
    manifest = load_manifest(folder)
    assert "none" in manifest.labels
    assert packed(manifest, tmp_path / "pack").labels == manifest.labels


def test_a_column_caption_that_is_not_the_text_is_kept(folder: Path, tmp_path: Path) -> None:
    rows = [["images/red/00.jpg", "a", "tall", "x"], ["images/red/01.jpg", "b", "wide", ""]]
    manifest = load_manifest(table(tmp_path / "t.csv", rows, ["path", "label", "Caption", "class"]), to_train=False)
    again = packed(manifest, tmp_path / "pack")
    assert facts(again) == facts(manifest) and not any(sample.text for sample in again.samples)
    for column in ("Caption", "class"):
        assert [s.metadata[column] for s in again.samples] == [s.metadata[column] for s in manifest.samples]


def test_larger_images_are_reduced_upright_and_others_keep_their_bytes(tmp_path: Path) -> None:
    root = tmp_path / "images"
    paint(root, range(2), ["blue", "red"])  # 16 pixels high
    upright = np.full((60, 90, 3), 200, np.uint8)
    upright[:30] = 20
    stored = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90°
    Image.fromarray(np.rot90(upright).copy()).save(stored, "JPEG", exif=exif, quality=95)
    (root / "blue" / "turned.jpg").write_bytes(stored.getvalue())
    (root / "blue" / "damaged.jpg").write_bytes(b"no image")
    manifest = packed(root, tmp_path / "pack", StoredImages(resize=20))
    images = {Path(s.metadata["path (original)"]).name: s.read() for s in manifest.samples}
    turned = decode(images["turned.jpg"])
    assert turned.shape == (20, 30, 3) and turned[:8].max() < 40 < 180 < turned[12:].min()
    assert Image.open(io.BytesIO(images["turned.jpg"])).mode == "L", "a grey image is stored with one channel"
    assert images["000.png"] in {path.read_bytes() for path in root.rglob("000.png")}
    assert images["damaged.jpg"] == b"no image"
    assert json.loads((tmp_path / "pack" / "pack.json").read_text())["shards"][0]["kept"] == 1
    raw = packed(root, tmp_path / "raw", StoredImages(resize=20, raw=True))
    by_name = {Path(s.metadata["path (original)"]).name: s.read() for s in raw.samples}
    original = decode((root / "red" / "000.png").read_bytes())
    assert any(np.array_equal(decode(data), original) for data in by_name.values() if data != b"no image")


def test_an_image_too_long_for_a_jpeg_keeps_its_bytes() -> None:
    _, png = cv2.imencode(".png", np.zeros((3, 98_253, 3), np.uint8))
    images = StoredImages(resize=2)  # 65,502 pixels long
    assert images(png.tobytes()) == (png.tobytes(), "")
    _, png = cv2.imencode(".png", np.zeros((3, 98_250, 3), np.uint8))
    assert decode(images(png.tobytes())[0]).shape == (2, 65_500, 3)


def test_a_file_that_changes_while_it_is_packed_ends_the_pack(folder: Path, tmp_path: Path) -> None:
    """Else `pack.json` would name the fingerprint of other images."""
    manifest = load_manifest(folder)

    class Changing(Stop):
        signal = property(
            lambda self: Path(manifest.samples[-1].path).write_bytes(b"new") and None, lambda self, value: None
        )

    with pytest.raises(
        DataError, match=r"images: files have changed while they were packed; delete .*out\.partial and pack"
    ):
        pack(manifest, AS_IS, tmp_path / "out", Changing("never"), shard_size=30)
    assert not (tmp_path / "out").exists()


def test_a_killed_pack_resumes_and_equals_one_that_was_not(folder: Path, warm: WarmProcess, tmp_path: Path) -> None:
    whole = packed(folder, tmp_path / "whole", StoredImages(resize=12), size=4)
    arguments = ["pack", str(folder), "out", "--resize", "12", "--shard-size", "4"]
    process = warm.start(arguments, cwd=tmp_path, env=dict(os.environ))
    with process.output:
        while not [*tmp_path.glob("out.partial/shard-*.tar")]:
            time.sleep(0.001)
        process.kill()
    process.wait(60)
    recorded = json.loads((tmp_path / "out.partial" / "pack.json").read_text())["shards"]
    before = {shard["file"]: (tmp_path / "out.partial" / shard["file"]).stat().st_mtime_ns for shard in recorded}
    (tmp_path / "out.partial" / ".shard-000009.tar.x").write_bytes(b"half")  # what a kill within a shard leaves
    done = warm.run(arguments, cwd=tmp_path, env=dict(os.environ), seconds=60)
    assert done.returncode == 0, done.stderr
    assert before == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before}
    assert not (tmp_path / "out.partial").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix == ".tar"} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert len(whole.samples) == 60


def test_a_stopped_pack_keeps_its_shards_and_a_lost_one_is_written_again(folder: Path, tmp_path: Path) -> None:
    manifest, stop = load_manifest(folder), Stop("now")
    stop.signal = 15
    out, unfinished = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Exception, match="stopped by SIGTERM"):
        pack(manifest, AS_IS, out, stop, shard_size=20)
    assert not out.exists()
    with pytest.raises(DataError, match="another process is packing into it"), locked(unfinished / ".lock"):
        pack(manifest, AS_IS, out, NEVER, shard_size=20)
    first = pack(manifest, AS_IS, tmp_path / "first", NEVER, shard_size=20).record
    shutil.copytree(tmp_path / "first", unfinished, dirs_exist_ok=True)
    (unfinished / first.shards[1].file).write_bytes(b"lost")
    assert pack(manifest, AS_IS, out, NEVER, shard_size=20).written == 2
    assert facts(load_manifest(out)) == facts(manifest)
    assert pack(manifest, AS_IS, out, NEVER, shard_size=20).written == 0


def test_a_folder_with_other_files_or_another_pack_is_refused(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "pack")
    with pytest.raises(DataError, match="pack: is a pack of other data or settings; name a new folder"):
        packed(folder, tmp_path / "pack", StoredImages(resize=8))
    with pytest.raises(DataError, match="images: exists and is not empty; name a new folder"):
        packed(folder, folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file: exists and is not empty; name a new folder"):
        packed(folder, tmp_path / "file")
    (folder / "red" / "new.jpg").write_bytes((folder / "red" / "00.jpg").read_bytes())
    with pytest.raises(DataError, match="is a pack of other data or settings"):
        packed(folder, tmp_path / "pack")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match=r"other\.partial: exists and is not a pack"):
        packed(folder, tmp_path / "other")


def test_a_folder_inside_the_data_a_mount_point_and_a_url_are_refused(folder: Path, refract: Run) -> None:
    """A pack inside a class folder would become a class of the data; one that cannot be renamed would fail after hours."""
    classes = sorted(path.name for path in folder.iterdir())
    (folder.parent / "link").symlink_to(folder)
    for inside in (folder / "packed", folder / "red" / "packed", folder.parent / "link" / "packed"):
        with pytest.raises(DataError, match="packed: is inside the data .*; name a folder outside of it"):
            packed(folder, inside)
    assert sorted(path.name for path in folder.iterdir()) == classes
    assert (
        "/: is a mount point, which a pack cannot replace; name a new folder in it: /pack"
        in refract("pack", folder, "/", code=2).stderr
    )
    assert (
        "FOLDER: s3://bucket/x is a URL; name a local folder" in refract("pack", folder, "s3://bucket/x", code=2).stderr
    )
    assert not Path("s3:").exists()


def test_a_link_to_an_empty_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    assert facts(packed(folder, tmp_path / "link")) == facts(load_manifest(folder))
    assert (tmp_path / "disk" / "empty" / "pack.json").is_file() and (tmp_path / "link").is_symlink()


def test_an_incomplete_or_damaged_pack_is_refused_with_the_shard(folder: Path, refract: Run, tmp_path: Path) -> None:
    packed(folder, tmp_path / "pack", size=20)
    shard = tmp_path / "pack" / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-5000])
    with pytest.raises(DataError, match=r"shard-000001\.tar: has [\d,]+ of [\d,]+ bytes, according to .*copy the pack"):
        load_manifest(tmp_path / "pack")
    shard.unlink()
    others = {path: path.read_bytes() for path in (tmp_path / "pack").glob("*.tar")}
    for path in others:
        path.unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: is missing"):
        load_manifest(tmp_path / "pack")
    for path, data in others.items():
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000001\.tar: is missing"):
        load_manifest(tmp_path / "pack")
    shard.write_bytes(content[:700] + bytes([content[700] ^ 255]) + content[701:])
    refused = refract("pack", folder, "pack", "--shard-size", "20", code=2)
    assert "shard-000001.tar: differs from what was written" in refused.stderr
    (tmp_path / "pack" / "pack.json").write_text("[]")
    with pytest.raises(DataError, match=r"pack\.json: is not a file of `refract pack`"):
        load_manifest(tmp_path / "pack")


def test_other_programs_read_the_tars(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "pack", size=60)
    with tarfile.open(tmp_path / "pack" / "shard-000000.tar") as tar:
        names = tar.getnames()
        fields = json.loads(tar.extractfile(names[1]).read())
    assert names[:2] == ["00000000.jpg", "00000000.json"] and len(names) == 120
    assert fields == {"label": "blue", "path": str(folder / "blue" / "00.jpg")}
    assert len(index_of_archive(str(tmp_path / "pack" / "shard-000000.tar")).names) == 120


def test_a_missing_image_ends_the_pack_with_its_path(folder: Path, refract: Run) -> None:
    file = table(folder.parent / "t.csv", [["images/red/00.jpg", "a"], ["images/red/no.jpg", "b"]], ["path", "label"])
    assert "images/red/no.jpg: No such file or directory" in refract("pack", file, "pack", code=1).stderr
    assert "--resize: 0 is not at least 1" in refract("pack", file, "p", "--resize", "0", code=2).stderr
    assert "--quality: 101 is not in 1 to 100" in refract("pack", file, "p", "--quality", "101", code=2).stderr
