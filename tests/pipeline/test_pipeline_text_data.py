"""Manifests of texts: valid content, splits, and the policy's draws for each epoch."""

from pathlib import Path

import numpy as np
import pytest
from small_data import rewritten, table

from benchmarks import captions
from refract.pipeline.config.config import ConfigError, config_from_dict
from refract.pipeline.data.manifest import DataError, load_manifest
from refract.pipeline.data.scan import scan
from refract.pipeline.data.splits import draw_splits
from refract.pipeline.data.validation import check_inputs


def test_rows_without_an_image_and_images_with_two_captions(tmp_path: Path) -> None:
    captions.write_images(tmp_path, count=30)
    rows = [
        ["images/00000.png", "a", "one caption"], ["images/00000.png", "b", "another caption"],
        ["", "a", "words alone"], ["", "b", "other words"], ["images/00001.png", "a", ""], ["images/00002.png", "b", "more"],
    ]  # fmt: skip
    manifest = load_manifest(table(tmp_path / "m.csv", rows, ["path", "label", "text"]))
    assert [sample.has_image for sample in manifest.samples] == [True, True, False, False, True, True]
    assert len({sample.key for sample in manifest.samples}) == 6 and manifest.samples[2].path == "m.csv#4"
    both, images = (scan(manifest.samples, reads=frozenset(inputs)) for inputs in ({"images", "texts"}, {"images"}))
    assert not both.bad and len(set(both.hashes.values())) == 6
    keys = [sample.key for sample in manifest.samples]
    assert both.groups[keys[0]] == both.groups[keys[1]] and len(set(both.groups.values())) == 5, (
        "by the image, so that it is in one split"
    )
    assert images.hashes[keys[0]] == images.hashes[keys[1]]
    split = draw_splits(
        manifest.with_samples(manifest.samples * 1), both.groups, val_fraction=0.2, test_fraction=0.2, seed=1
    )
    assert split.samples[0].split == split.samples[1].split
    check_inputs(manifest, frozenset({"images", "texts"}))
    with pytest.raises(
        DataError, match=r"2 samples have no image, such as m\.csv#4; to read texts, set text\.name: hashing"
    ):
        check_inputs(manifest, frozenset({"images"}))
    manifest = load_manifest(rewritten(tmp_path / "m.csv", "n.csv", lambda i, text: "\x07 " if i == 5 else text))
    with pytest.raises(DataError, match="2 samples have no text"):
        check_inputs(manifest, frozenset({"texts"}))


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([["a", ""], ["b", "x"]], ["label", "text"], "line 2: path '' is empty, and so is the text"),
        ([["a", "\x07\x00"], ["b", "x"]], ["label", "text"], "line 2: path '' is empty, and so is the text"),
        ([["a", "x"]], ["label", "caption"], "needed: path,label and/or text"),
    ],
)
def test_invalid_text_manifests_are_rejected(tmp_path: Path, rows, columns, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_manifest(table(tmp_path / "m.csv", rows, columns))


def test_a_manifests_cell_is_one_text(tmp_path: Path) -> None:
    import pandas as pd

    file = tmp_path / "m.parquet"
    pd.DataFrame({"label": ["a", "b"], "text": ["x", "y"], "tags": [["p", "q"], []]}).to_parquet(file)
    assert [sample.text for sample in load_manifest(file).samples] == ["x", "y"]
    pd.DataFrame({"label": ["a", "b"], "text": [None, ["x", "y"]]}).to_parquet(file)
    with pytest.raises(DataError, match=r"m\.parquet: cannot .* \(column 'text', row 2: got a list; expected one text"):
        load_manifest(file)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": {"name": "none"}}, "model.name and text.name are both none"),
        ({"text": {"name": "hashing", "drop_image": 0.6, "drop_text": 0.6}}, "drop_text is above 1"),
        ({"text": {"name": "hashing", "max_length": 0}}, "text.max_length: 0"),
        ({"text": {"fusion": "sum"}}, "text.fusion"),
    ],
)
def test_invalid_text_configs_are_rejected(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


def test_each_epoch_reads_a_new_draw_of_the_policy(tmp_path: Path) -> None:
    from refract.augment import Augmenter, Preprocess
    from refract.models.multimodal.tokens import HashedNgrams
    from refract.pipeline.data.datamodule import ImageDataModule

    rows = [
        [label, split, f"some words of {label} number {i}"]
        for split in ("train", "val", "test")
        for label in "ab"
        for i in range(6)
    ]
    manifest = load_manifest(table(tmp_path / "m.csv", rows, ["label", "split", "text"]))
    tokens = HashedNgrams()
    data = ImageDataModule(
        manifest, augmenter=Augmenter([{"WordDelete": {"p": 0.5}}], 3), preprocess=Preprocess(8, 8), batch_size=4,
        tokens=tokens, reads_images=False,
    )  # fmt: skip
    assert data.workers == 0
    seen = {data.train_set.augmented((epoch, 0, 0)) for epoch in range(20)}
    assert "some words of a number 0" in seen and len(seen) > 3
    item = data.train_set[5, 2, 0]
    assert set(item) == {"texts", "has_image", "targets", "indices", "repeats"}
    assert np.array_equal(item["texts"], tokens(data.train_set.augmented((5, 2, 0)))[0])
    batch = next(iter(data.val_dataloader()))
    assert batch["texts"].shape[0] == 4 and not batch["has_image"].any()
    assert np.array_equal(batch["texts"][0][batch["texts"][0] > 0], tokens("some words of a number 0")[0]), (
        "not augmented"
    )


def test_samples_without_an_image_do_not_affect_image_statistics_and_cost(tmp_path: Path) -> None:
    import os

    from refract.augment import Augmenter, Preprocess
    from refract.models.multimodal.tokens import HashedNgrams
    from refract.pipeline.data.datamodule import ImageDataModule, fits_memory
    from refract.pipeline.data.preprocessing import with_normalisation
    from refract.pipeline.training.initial_weights import _training_images

    captions.write_images(tmp_path, count=4)
    rows = [[f"images/{i:05}.png" if i in (1, 3) else "", "ab"[i % 2], "train", f"text {i}"] for i in range(4)]
    manifest = load_manifest(table(tmp_path / "m.csv", rows, ["path", "label", "split", "text"]))
    shown = manifest.with_samples([sample for sample in manifest.samples if sample.has_image])
    preprocess = Preprocess(16, 16)
    of_all, of_shown = (with_normalisation(preprocess, one, "data", "none")[0] for one in (manifest, shown))
    assert of_all == of_shown != preprocess
    assert len(_training_images(preprocess, manifest)) == 2
    assert fits_memory(manifest.samples) and not fits_memory([s for s in manifest.samples if not s.has_image])
    options = {
        "augmenter": Augmenter([], 3, size=16),
        "preprocess": preprocess,
        "batch_size": 2,
        "tokens": HashedNgrams(),
    }
    assert ImageDataModule(manifest, **options).workers == min(8, os.cpu_count() or 1)
    texts = manifest.with_samples([sample for sample in manifest.samples if not sample.has_image])
    assert ImageDataModule(texts, **options).workers == 0


def test_texts_of_a_split_exclude_other_splits(tmp_path: Path) -> None:
    from refract.pipeline.data.texts import texts_of

    rows = [
        ["a", "train", "one"],
        ["a", "val", "two"],
        ["b", " train ", "three"],
        ["b", "test", "four"],
        ["b", "train", "\x07"],
    ]
    data = table(tmp_path / "m.csv", rows, ["label", "split", "text"])
    assert texts_of(data, "train") == ["one", "three"] and texts_of(data, "val") == ["two"]
    assert texts_of(data, "all") == ["one", "two", "three", "four"]
    with pytest.raises(DataError, match="no texts in the split dev"):
        texts_of(data, "dev")
    plain = table(tmp_path / "n.csv", [["a", "one"], ["b", "two"]], ["label", "text"])
    assert texts_of(plain, "train") == ["one", "two"], "a manifest without splits is all for training"


def test_consistency_with_texts_is_rejected() -> None:
    from refract.augment import Augmenter
    from refract.pipeline.training.recipe import check_recipe

    policy = Augmenter([{"AugMix": {}}])
    check_recipe(config_from_dict({"loss": {"consistency": 12.0}}), policy, "32-true")
    with pytest.raises(
        ConfigError, match=r"loss\.consistency: compares views of images, so it cannot be combined with text\.name"
    ):
        check_recipe(config_from_dict({"loss": {"consistency": 12.0}, "text": {"name": "hashing"}}), policy, "32-true")
