"""The effort of the robustness measurement, and the closing notes on it and on small test sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refract.pipeline.config.sections import EvaluationConfig
from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation.advice import closing_notes, notes_on
from refract.pipeline.evaluation.evaluate import Evaluation
from refract.pipeline.evaluation.measures import mean_interval
from refract.pipeline.evaluation.robustness import FULL, QUICK, spread_subset
from refract.pipeline.evaluation.robustness_cost import CORRUPTING, FEWEST, FLOPS, LOADING, MOST, affordable, flops_of


def test_passes_of_an_effort() -> None:
    assert (QUICK.passes, FULL.passes) == (1 + 19 * 3 + 5, 1 + 19 * 5 + 5)


@given(seen=st.integers(0, 10**7), available=st.integers(1, 10**5), side=st.integers(8, 512), flops=st.floats(0, 1e11))
def test_it_costs_at_most_a_third_and_uses_enough_images(seen: int, available: int, side: int, flops: float) -> None:
    effort = affordable(seen=seen, available=available, pixels=side * side, flops=flops)
    if effort is None:
        return
    assert effort.images is not None and min(FEWEST, available) <= effort.images <= min(MOST, available)
    training, measuring = (flops / FLOPS + a + b * side * side / 1000 for a, b in (LOADING, CORRUPTING))
    assert effort.images * effort.passes * measuring <= seen * training / 3


def test_a_short_training_affords_nothing_and_a_long_one_many_images() -> None:
    sizes = {"available": 400, "pixels": 224 * 224, "flops": 3.6e9}
    assert affordable(seen=200 * 10, **sizes) is None
    middle = affordable(seen=1000 * 10, **sizes)
    assert middle is not None and middle.severities == (1, 3, 5) and middle.images is not None
    assert FEWEST <= middle.images < MOST
    assert affordable(seen=10**6, **sizes) == affordable(seen=10**7, **sizes)
    heavier = affordable(seen=10_000, available=400, pixels=224 * 224, flops=1e11)
    assert heavier is not None and heavier.images is not None and heavier.images > middle.images


def test_the_operations_of_a_network_are_counted() -> None:
    import torch

    layer = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert flops_of(lambda: layer(torch.zeros(1, 3, 10, 10))) == 2 * 3 * 8 * 9 * 100


def test_the_subset_depends_on_the_seed_and_spreads_over_the_data() -> None:
    samples = [Sample(str(place), (place // 100,)) for place in range(400)]
    chosen = spread_subset(samples, 40, seed=1)
    assert chosen == spread_subset(samples, 40, seed=1) != spread_subset(samples, 40, seed=2)
    assert [sum(sample.labels == (label,) for sample in chosen) for label in range(4)] == [10] * 4
    assert len({sample.path for sample in chosen}) == 40 and spread_subset(samples, None, seed=0) == samples
    assert spread_subset(samples[:3], 50, seed=0) == samples[:3]


def evaluation(count: int, right: int) -> Evaluation:
    rights = np.arange(count) < right
    return Evaluation(
        {"accuracy": right / count}, {"accuracy": mean_interval(rights)}, [], None, np.zeros((count, 2), np.float32),
        np.zeros(count, int), rights, [Sample(str(i), (0,)) for i in range(count)],
    )  # fmt: skip


def test_a_small_test_set_gets_a_note() -> None:
    (note,) = notes_on(evaluation(49, 24), drawn=True)
    assert note.startswith("49 test images leave accuracy between 0.36 and 0.63 (95 % interval): too wide")
    assert "--trainer.seed 1, 2, 3" in note
    (note,) = notes_on(evaluation(10, 10), drawn=False)
    assert "between 0.72 and 1.00" in note and "--trainer.seed" not in note and "more labelled images" in note
    assert not notes_on(evaluation(1000, 900), drawn=True)


@pytest.mark.parametrize("measured", [True, False])
def test_the_closing_notes_name_the_command_that_measures_all_images(measured: bool, tmp_path: Path) -> None:
    source = {"source": "my images", "images": True}
    numbers = {"notes": ["a note"], **({"robustness": {"summary": "0.4 on 30 images"}} if measured else {})}
    (tmp_path / "report.json").write_text(json.dumps(numbers))
    note, robust = closing_notes(tmp_path, EvaluationConfig(), "bin/", **source)
    assert note == ("note", "a note")
    assert f"bin/refract evaluate {tmp_path}/bundle 'my images' --robustness full" in robust[1]
    assert ("0.4 on 30 images" in robust[1]) == measured == ("not measured" not in robust[1])
    without = EvaluationConfig(robustness="none")
    assert measured or closing_notes(tmp_path, without, "", **source) == [("note", "a note")]


@pytest.mark.parametrize(("threshold", "reported"), [(1.0, True), (0.98, False)])
def test_a_bundle_that_always_abstains_is_reported(threshold: float, reported: bool, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(
        json.dumps({"abstaining": {"abstain_below": threshold}, "robustness": {"summary": "x"}})
    )
    closing = closing_notes(tmp_path, EvaluationConfig(), "", source="digits", images=True)
    notes = [note for topic, note in closing if topic == "note"]
    assert bool(notes) == reported
    assert all(
        "no confidence reaches 95% precision" in note and "lower --evaluation.precision" in note for note in notes
    )
