"""Folds: how samples are divided, K runs with out-of-fold predictions and one report, and the average of runs."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_data import config_of, write_image

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.data.folds import draw_folds
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.data.prepare import prepare_data, prepare_folds


def drawn(samples: list[Sample], *, folds: int, seed: int = 0, labels: int = 3, task: str = "multiclass") -> list[int]:
    """The fold of each sample; the name of a sample's folder stands for its content."""
    data = Manifest("m", tuple(samples), tuple(f"c{c}" for c in range(labels)), task)
    fold_of = draw_folds(data, {s.key: s.path.split("/")[0] for s in samples}, {}, folds=folds, seed=seed)
    return [fold_of[sample.key] for sample in samples]


@pytest.mark.parametrize("seed", range(3))
def test_each_fold_has_the_same_number_of_samples_of_each_class(seed: int) -> None:
    samples = [
        Sample(f"{c}-{i}", (c,), "val" if i % 5 == 0 else "train") for c, n in enumerate((50, 23, 7)) for i in range(n)
    ]
    folds = drawn(samples, folds=5, seed=seed)
    by_class = Counter(zip(folds, (s.labels[0] for s in samples), strict=True))
    assert [by_class[fold, 0] for fold in range(1, 6)] == [10] * 5
    assert {by_class[fold, 1] for fold in range(1, 6)} == {4, 5} and {by_class[fold, 2] for fold in range(1, 6)} == {
        1,
        2,
    }
    assert set(Counter(folds).values()) == {16}


def test_the_folds_depend_on_seed_and_content_alone() -> None:
    samples = [Sample(f"{c}-{i}", (c,), "train") for c in range(3) for i in range(20)]
    folds, reversed_folds = drawn(samples, folds=4), drawn(samples[::-1], folds=4)
    assert folds == reversed_folds[::-1] != drawn(samples, folds=4, seed=1)


def test_copies_are_in_one_fold_and_the_folds_stay_equally_large() -> None:
    samples = [
        Sample(f"{c}-{i}/{copy}", (c,), "train") for c in range(3) for i in range(12) for copy in range(1 + i % 3)
    ]
    folds = drawn(samples, folds=3)
    by_content: dict[str, set[int]] = {}
    for sample, fold in zip(samples, folds, strict=True):
        by_content.setdefault(sample.path.split("/")[0], set()).add(fold)
    assert all(len(where) == 1 for where in by_content.values())
    by_class = Counter(zip(folds, (s.labels[0] for s in samples), strict=True))
    assert set(by_class.values()) == {8}


def test_rare_labels_of_a_multi_label_data_set_are_in_every_fold() -> None:
    rng = np.random.default_rng(0)
    sets = [tuple(np.flatnonzero(rng.random(6) < (0.5, 0.4, 0.3, 0.2, 0.1, 0.04)).tolist()) for _ in range(300)]
    samples = [Sample(f"{i}", labels, "train") for i, labels in enumerate(sets)]
    folds = drawn(samples, folds=5, labels=6, task="multilabel")
    for label in range(6):
        counts = [
            sum(fold == k and label in s.labels for s, fold in zip(samples, folds, strict=True)) for k in range(1, 6)
        ]
        assert max(counts) - min(counts) <= 2, counts
    assert max(Counter(folds).values()) - min(Counter(folds).values()) <= 3


def test_data_that_cannot_be_divided_are_refused_by_name() -> None:
    few = [Sample(f"{c}/{copy}", (c,), "train") for c in range(3) for copy in range(4)]
    with pytest.raises(
        DataError, match=r"trainer.folds: 4 needs as many groups of .* got 3; copies and near-duplicates are one group"
    ):
        drawn(few, folds=4)
    more = [*few, *(Sample(f"x{i}", (1,), "train") for i in range(9))]
    with pytest.raises(
        DataError, match=r"2 labels have all their .* samples in one fold, .*: c0, c2\. .*or set trainer.folds: 0"
    ):
        drawn(more, folds=4)


def test_near_duplicates_stay_together_and_the_test_set_is_that_of_a_training_without_folds(tmp_path: Path) -> None:
    import cv2

    for number in range(45):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (96, 96), interpolation=cv2.INTER_CUBIC)
        for again in range(3 if number % 3 == 0 else 1):
            name = tmp_path / "scenes" / "abc"[number % 3] / f"{number:02}-{again}.png"
            write_image(name, cv2.convertScaleAbs(pixels, alpha=1 - 0.05 * again, beta=6 * again))
    config = config_of(tmp_path / "scenes")
    plain, _ = prepare_data(config)
    data = prepare_folds(config.changed({"trainer.folds": 4}))
    where: dict[str, set[int]] = {}
    for sample in data.manifest.samples:
        if sample.split != "test":
            where.setdefault(Path(sample.path).name[:2], set()).add(data.fold_of[sample.key])
    assert all(len(folds) == 1 for folds in where.values())
    validated = []
    for fold in range(1, 5):
        manifest, identity = prepare_data(config.changed({"trainer.folds": 4, "trainer.fold": fold}))
        assert {s.key for s in manifest.of("test")} == {s.key for s in plain.of("test")}
        assert (manifest, identity) == data.of(fold) and not [
            p for p, _ in manifest.near if p in {s.path for s in manifest.of("val")}
        ]
        validated += [s.key for s in manifest.of("val")]
    assert sorted(validated) == sorted(s.key for s in plain.samples if s.split != "test")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"folds": 1}, "trainer.folds: 1 is not 0, or in 2…20"),
        ({"folds": 21}, "trainer.folds: 21 is not 0, or in 2…20"),
        ({"folds": 3, "fold": 4}, r"trainer.fold: 4 is not null, or in 1…trainer.folds \(trainer.folds: 3\)"),
        ({"fold": 1}, r"trainer.fold: 1 is not null, or in 1…trainer.folds \(trainer.folds: 0\)"),
    ],
)
def test_folds_out_of_range_are_refused(values: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_dict({"trainer": values})


def test_commands_that_train_one_model_refuse_folds() -> None:
    from refract.pipeline.training.run import train

    with pytest.raises(
        ConfigError, match=r"trainer.folds: 3 trains several models, .*; set trainer.folds: 0, or trainer.fold: 1"
    ):
        train(Config().changed({"trainer.folds": 3, "tracking.enabled": False}))
