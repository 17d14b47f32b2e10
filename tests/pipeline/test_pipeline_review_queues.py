"""The queues of a review, on data whose errors are known."""

import hashlib
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from refract.models.hierarchy import Hierarchy
from refract.pipeline.data.manifest import Sample
from refract.pipeline.review.data import Captured, Predictions, ReviewData
from refract.pipeline.review.items import Item, Prediction
from refract.pipeline.review.queues import QUEUES, ranked
from refract.pipeline.review.queues.audit import audit
from refract.pipeline.review.queues.confident_errors import confident_errors
from refract.pipeline.review.queues.disagreements import disagreements
from refract.pipeline.review.queues.label_errors import doubt, label_errors
from refract.pipeline.review.queues.near_duplicates import near_duplicates
from refract.pipeline.review.queues.served import familiarities, served
from refract.pipeline.review.queues.unlabelled import diverse, uncertainty_of, unlabelled

LABELS = ("ant", "bee", "cat")
NONE = Predictions(LABELS, (), np.zeros((0, 3), np.float32))


def photo(seed: int) -> np.ndarray:
    """Return a structured image that resembles no other seed's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return cv2.resize(coarse, (96, 96), interpolation=cv2.INTER_CUBIC)


def item(index: int, labels: tuple[str, ...], pixels: np.ndarray | None = None) -> Item:
    data = bytes(cv2.imencode(".png", photo(index) if pixels is None else pixels)[1])
    content = hashlib.sha256(str(index).encode()).hexdigest()
    sample = Sample(f"{index}.png", tuple(map(LABELS.index, labels)), data=data)
    return Item(index, content, sample, f"{index}.png", labels)


def review(names: list[tuple[str, ...]], probabilities: list[list[float]] | None = None, **more: Any) -> ReviewData:
    """Return a review of labelled items, with random embeddings unless `vectors` is given."""
    targets = np.array([[label in row for label in LABELS] for row in names])
    rows = np.array(probabilities, np.float32) if probabilities else targets.astype(np.float32)
    vectors = np.random.default_rng(0).standard_normal((len(names), 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = tuple(item(index, row) for index, row in enumerate(names))
    return replace(ReviewData(items, LABELS, len(names), vectors, targets, rows, NONE), **more)


def test_the_label_that_the_others_contradict_most_comes_first() -> None:
    names = [("ant",)] * 8 + [("bee",)] * 2
    rows = [[0.9, 0.1, 0.0]] * 8 + [[0.97, 0.02, 0.01], [0.5, 0.45, 0.05]]
    entries = label_errors(review(names, rows))
    assert [entry.item for entry in entries] == [8, 9]
    assert entries[0].reason == "Models trained on other images predict ant (97 %), not bee (2 %)."


def test_a_label_error_within_one_parent_names_the_parent() -> None:
    hierarchy = Hierarchy(
        LABELS,
        {"ant": "insect", "bee": "insect", "cat": "mammal", "insect": "animal", "mammal": "animal", "animal": None},
    )
    rows = [[0.1, 0.9, 0.0], [0.1, 0.0, 0.9], *[[0.9, 0.1, 0.0]] * 8]
    near, far = label_errors(review([("ant",)] * 10, rows, hierarchy=hierarchy))
    assert near.reason == "Models trained on other images predict bee (90 %), not ant (10 %); both are insect."
    assert far.reason.endswith("not ant (10 %); both are animal.")


def test_label_errors_are_at_most_a_fifth_of_the_data_and_never_labels_that_are_the_most_probable() -> None:
    names = [("ant",)] * 20
    rows = [[0.1, 0.9, 0.0]] * 20
    assert len(label_errors(review(names, rows))) == 4
    assert label_errors(review(names, [[0.4, 0.3, 0.3]] * 20)) == ()


def test_an_item_without_a_prediction_is_not_a_label_error() -> None:
    names = [("ant",)] * 9 + [("bee",)]
    rows = [[0.2, 0.8, 0.0]] * 9 + [[np.nan] * 3]
    assert 9 not in [entry.item for entry in label_errors(review(names, rows))]


def test_multilabel_doubt_names_the_decision_that_is_contradicted() -> None:
    data = review([("ant", "bee")] * 5, [[0.9, 0.03, 0.1], *[[0.9, 0.9, 0.1]] * 4], multilabel=True)
    (entry,) = label_errors(data)
    assert entry.item == 0
    assert entry.reason == "The image has the label bee, whose probability is 3 %."


def test_doubt_is_one_minus_the_probability_of_the_label() -> None:
    targets = np.array([[True, False], [False, True]])
    assert doubt(np.array([[0.7, 0.3], [0.9, 0.1]]), targets, multilabel=False) == pytest.approx([0.3, 0.9])


def test_near_duplicates_with_different_labels_are_paired_and_others_are_not() -> None:
    data = review([("ant",), ("bee",), ("cat",), ("cat",)])
    pixels = photo(0)[6:90, 4:88]  # a crop of item 0
    items = (data.items[0], item(1, ("bee",), pixels), data.items[2], item(3, ("cat",), photo(2)))
    vectors = np.eye(4, 32, dtype=np.float32)
    vectors[1], vectors[3] = vectors[0], vectors[2]  # 2 and 3 are alike too, but have the same label
    (entry,) = near_duplicates(review([one.labels for one in items], items=items, vectors=vectors))
    assert {entry.item, entry.related} == {0, 1}
    assert entry.reason == "This image, ant, is a near-duplicate of another one, bee."


def test_images_that_are_similar_but_not_the_same_photo_are_no_near_duplicates() -> None:
    vectors = np.ones((2, 32), np.float32) / np.sqrt(32)
    assert near_duplicates(review([("ant",), ("bee",)], vectors=vectors)) == ()


def test_contradictory_copies_come_before_near_duplicates() -> None:
    data = review([("ant",), ("bee",), ("cat",)], contradictory={2: "Copies differ."}, alike=[(0, 1), (1, 0)])
    assert [(entry.item, entry.related) for entry in near_duplicates(data)] == [(2, None), (0, 1)]


def test_confident_errors_are_ranked_by_the_confidence_and_need_a_bundle() -> None:
    data = review([("ant",)] * 4)
    assert confident_errors(data) is None
    rows = np.array([[0.3, 0.7, 0], [0.1, 0.9, 0], [0.9, 0.1, 0]], np.float32)
    entries = confident_errors(review([("ant",)] * 4, champion=Predictions(LABELS, (0, 1, 3), rows)))
    assert entries is not None
    assert [entry.item for entry in entries] == [1, 0]
    assert entries[0].reason == "The bundle predicts bee (90 %), the label is ant."


def test_disagreements_compare_labels_by_name_not_by_column() -> None:
    champion = Predictions(LABELS, (0, 1), np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], np.float32))
    challenger = Predictions(("bee", "ant"), (0, 1), np.array([[0.1, 0.9], [0.3, 0.7]], np.float32))
    entries = disagreements(review([("ant",), ("bee",)], champion=champion, challenger=challenger))
    assert entries is not None
    assert [entry.item for entry in entries] == [1]
    assert entries[0].reason == "The bundle predicts bee (80 %), the challenger ant (70 %)."


def captured_review(captured: dict[int, Captured], familiarity: dict[int, float]) -> ReviewData:
    items = (item(0, ("ant",)), item(1, ("bee",)), *(item(index, ()) for index in captured))
    items = tuple(
        Item(
            one.index,
            one.content,
            one.sample,
            one.path,
            one.labels,
            "",
            (Prediction("ant", 0.5),),
            familiarity.get(one.index),
        )
        for one in items
    )
    return review(
        [("ant",), ("bee",)], items=items, vectors=np.eye(len(items), 32, dtype=np.float32), captured=captured
    )


def test_served_images_contradicted_by_feedback_come_first_then_unfamiliar_and_uncertain_ones() -> None:
    captured = {
        2: Captured(0.55, ("ant",)),
        3: Captured(0.9, ("bee",), feedback=("cat",)),
        4: Captured(0.8, ("bee",)),
        5: Captured(0.9, ("ant",), feedback=("ant",)),
    }
    entries = served(captured_review(captured, {4: 0.01, 5: 0.8}))
    assert entries is not None
    assert [entry.item for entry in entries] == [3, 4, 2, 5]
    assert entries[0].reason.endswith("The client's feedback is cat.")
    assert "99 % of the data set's images are more familiar." in entries[1].reason


def test_familiarity_is_the_fraction_of_the_data_set_that_is_farther_away() -> None:
    reference = np.array([0.4, 0.1, 0.2, 0.3])
    assert familiarities(np.array([0.0, 0.25, 0.4, 0.9]), reference).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_the_audit_keeps_its_order_when_the_data_grows() -> None:
    few = [entry.item for entry in audit(review([("ant",)] * 30))]
    many = [entry.item for entry in audit(review([("ant",)] * 50)) if entry.item < 30]
    assert few == many
    assert few != sorted(few)


def test_a_diverse_batch_takes_one_image_of_each_kind() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(8, 32)
    vectors = np.repeat(centres, 40, axis=0) + 0.01 * rng.standard_normal((320, 32))
    order = rng.permutation(320)
    chosen = diverse(vectors[order].astype(np.float32), np.full(320, 0.5), 8)
    assert sorted((order[chosen] // 40).tolist()) == list(range(8))


def test_a_batch_of_more_than_all_images_takes_each_once() -> None:
    assert sorted(diverse(np.eye(3, dtype=np.float32), np.array([0.1, 0.9, 0.5]), 20).tolist()) == [0, 1, 2]


def test_uncertainty_is_one_minus_the_margin() -> None:
    rows = np.array([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]], np.float32)
    assert uncertainty_of(rows, multilabel=False) == pytest.approx([1.0, 0.2])
    assert uncertainty_of(rows, multilabel=True) == pytest.approx([1.0, 0.2])
    assert uncertainty_of(np.ones((2, 1), np.float32), multilabel=False).tolist() == [0, 0]


def test_the_unlabelled_queue_shows_each_new_image_once_and_no_captured_one() -> None:
    items = tuple(item(index, ("ant",) if index < 2 else ()) for index in range(40))
    rows = np.random.default_rng(1).dirichlet(np.ones(3), 38).astype(np.float32)
    predicted = Predictions(LABELS, tuple(range(2, 40)), rows)
    items = items[:2] + tuple(
        Item(one.index, one.content, one.sample, one.path, (), "", predicted.most_probable(one.index - 2, 5))
        for one in items[2:]
    )
    vectors = np.random.default_rng(2).standard_normal((40, 32)).astype(np.float32)
    data = review(
        [("ant",)] * 2, items=items, predicted=predicted, vectors=vectors, captured={5: Captured(0.4, ("ant",))}
    )
    entries = unlabelled(data)
    assert entries is not None
    assert sorted(entry.item for entry in entries) == [2, 3, 4, *range(6, 40)]
    assert "is unsure" in entries[0].reason


def test_only_queues_with_data_are_shown_and_each_shows_an_item_once() -> None:
    data = review([("ant",), ("bee",)] * 10)
    queues = {queue.name: queue for queue in ranked(data)}
    assert list(queues) == ["label-errors", "near-duplicates", "audit"]
    assert set(queues) < set(QUEUES)
    for queue in queues.values():
        shown = [entry.item for entry in queue.entries]
        assert len(set(shown)) == len(shown)
