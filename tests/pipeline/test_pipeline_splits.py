"""How many samples of each class the drawn splits get."""

from collections import Counter

import pytest

from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.splits import draw_splits


def manifest(*classes: int, split: str = "", task: str = "multiclass") -> Manifest:
    """A manifest with this many samples of each class, none alike."""
    samples = [Sample(f"{c}-{i}", (c,), split) for c, count in enumerate(classes) for i in range(count)]
    return Manifest("m", tuple(samples), tuple(f"c{c}" for c in range(len(classes))), task)


def counts(data: Manifest, *, val: float, test: float, seed: int = 0) -> list[dict[str, int]]:
    """Samples in each split, for each class."""
    drawn = draw_splits(data, {s.key: s.key for s in data.samples}, val_fraction=val, test_fraction=test, seed=seed)
    return [dict(Counter(s.split for s in drawn.samples if s.labels == (c,))) for c in range(len(data.labels))]


@pytest.mark.parametrize("seed", range(3))
def test_a_class_of_three_has_one_sample_in_each_split_and_a_class_of_two_only_trains(seed: int) -> None:
    drawn = counts(manifest(3, 2, 1, 4), val=0.01, test=0.01, seed=seed)
    assert drawn == [{"train": 1, "val": 1, "test": 1}, {"train": 2}, {"train": 1}, {"train": 2, "val": 1, "test": 1}]


def test_two_samples_suffice_where_one_split_is_drawn() -> None:
    data = manifest(2, 1, split="train")
    measured = tuple(Sample(f"t{c}", (c,), "test") for c in range(2))
    drawn = counts(data.with_samples((*data.samples, *measured)), val=0.01, test=0.5)
    assert drawn == [{"train": 1, "val": 1, "test": 1}, {"train": 1, "test": 1}]


def test_the_fractions_hold_within_each_class_to_whole_samples() -> None:
    assert counts(manifest(40, 14), val=0.1, test=0.25) == [
        {"train": 26, "val": 4, "test": 10},
        {"train": 9, "val": 1, "test": 4},
    ]


@pytest.mark.parametrize(("size", "separate"), [(10, True), (9, False)])
def test_a_label_set_of_ten_is_stratified_and_smaller_ones_together(size: int, separate: bool) -> None:
    """Smaller sets are pooled: two sets of nine give the test split five samples, which may come from either set."""
    drawn = [counts(manifest(size, size, task="multilabel"), val=0.1, test=0.3, seed=seed) for seed in range(8)]
    tests = {tuple(labels.get("test", 0) for labels in one) for one in drawn}
    assert tests == {(3, 3)} if separate else (len(tests) > 1 and {sum(one) for one in tests} == {5})
