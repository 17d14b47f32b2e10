"""What a review keeps when it is restarted, when reviewers disagree, and when its images have unusable names or records."""

import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_data import make_image, write_image
from small_review import LABELS, serving, small_data, small_session
from test_pipeline_review_queues import NONE, item, review

from refract.models.hierarchy import Hierarchy
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.labels.decisions import LabelError
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.review.app import create_app
from refract.pipeline.review.captured import captured_images
from refract.pipeline.review.data import Predictions
from refract.pipeline.review.decisions import Decisions
from refract.pipeline.review.gather import Sources, _before_audit, _distinct, _new_images, _path
from refract.pipeline.review.queues.unlabelled import unlabelled
from refract.pipeline.review.session import ReviewSession


def audit(session: ReviewSession, index: int, label: str, reviewer: str, *, queue: str = "audit") -> int:
    """Decide that an item has the label. The client has seen the newest record, as the page sends it."""
    seen = session.state(index).seen
    return session.decide(index, action="relabel", labels=[label], reviewer=reviewer, queue=queue, seen=seen)


def measured(session: ReviewSession) -> tuple[int, int, int, int]:
    """(audited images, wrong ones, images with two reviewers, images on which these agree)."""
    estimate, agreement = session.audit(), session.agreement()
    assert estimate is not None
    return estimate.decided, estimate.wrong, agreement.images if agreement else 0, agreement.agreed if agreement else 0


def test_a_decision_that_is_sent_again_after_a_restart_is_recorded_once(tmp_path: Path) -> None:
    ids = [
        small_session(tmp_path).decide(3, action="relabel", labels=["red"], reviewer="ann", queue="label-errors")
        for _ in range(2)
    ]
    assert ids == [1, 1]
    session = small_session(tmp_path)
    session.undo(1, reviewer="ann")
    assert session.decide(3, action="relabel", labels=["red"], reviewer="ann", queue="label-errors") == 3


def test_the_decision_that_settles_a_conflict_counts_in_the_audit_and_not_as_agreement(tmp_path: Path) -> None:
    session = small_session(tmp_path)
    audit(session, 0, "green", "ann")
    audit(session, 0, "blue", "bob")  # its label; bob does not see what ann decided, so this is a conflict
    assert session.state(0).conflicts and measured(session) == (1, 0, 1, 0)
    audit(session, 0, "green", "ann", queue="conflicts")
    assert session.state(0).conflicts == () and measured(session) == (1, 1, 1, 0)


def test_a_label_that_is_chosen_again_is_confirmed(tmp_path: Path) -> None:
    session = small_session(tmp_path)
    audit(session, 0, "blue", "ann")
    (record,) = LabelHistory(tmp_path / "labels.db").decisions()
    assert record.action == "confirm" and measured(session) == (1, 0, 0, 0)


def test_a_restart_does_not_show_the_second_auditor_what_the_first_decided(tmp_path: Path) -> None:
    audit(small_session(tmp_path), 0, "green", "ann")
    history = LabelHistory(tmp_path / "labels.db")
    data = small_data(tmp_path, history)
    source = Manifest("photos", tuple(one.sample for one in data.items[:24]), data.labels, "multiclass")
    before = _before_audit(source, {one.sample.path: one.content for one in data.items}, history)
    assert before == {data.items[0].content: ("blue",)}
    corrected = replace(data.items[0], labels=("green",), before_audit=("blue",))
    session = ReviewSession("photos", replace(data, items=(corrected, *data.items[1:])), Decisions(history))
    with serving(create_app(session, reviewer="bob")) as client:
        (first,) = [one for one in client.get("/api/queues/audit?count=100").json()["items"] if one["index"] == 0]
        assert first["labels"] == ["blue"]
        body = {"item": 0, "action": "confirm", "queue": "audit", "seen": first["state"]["seen"]}
        (conflict,) = client.post("/api/decisions", json=body).json()["conflicts"]
        assert (conflict["reviewer"], conflict["labels"]) == ("ann", ["green"])
        # A confirmation of ann's label settles the conflict; the label before the audit was wrong.
        body = {"item": 0, "action": "confirm", "queue": "conflicts", "seen": session.state(0).seen}
        assert client.post("/api/decisions", json=body).json()["conflicts"] == []
    assert measured(session) == (1, 1, 1, 0)


def test_agreement_is_cohens_kappa(tmp_path: Path) -> None:
    """The example of two raters on 50 proposals: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no; kappa 0.4."""
    session = small_session(tmp_path, count=50, new=0)
    pairs = [("red", "red")] * 20 + [("red", "green")] * 5 + [("green", "red")] * 10 + [("green", "green")] * 15
    for index, (first, second) in enumerate(pairs):
        audit(session, index, first, "ann")
        audit(session, index, second, "bob")
    agreement = session.agreement()
    assert agreement is not None
    assert (agreement.images, agreement.agreed, agreement.kappa) == (50, 35, 0.4)


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a" * 5000}, {"image": "a\0.png"}, {"image": ""}, {"image": "../out.png"}, {"image": "link.png"}, {"answered": None},
        {"answered": [1]}, {"confidence": float("nan")}, {"confidence": -5}, {"confidence": True, "image": 3},
    ],
)  # fmt: skip
def test_captured_rows_that_no_server_wrote_are_skipped(tmp_path: Path, row: dict) -> None:
    folder = tmp_path / "capture"
    for file in (folder / "a.png", tmp_path / "out.png"):
        write_image(file, make_image("red", 1))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    good = {"image": "a.png", "confidence": 0.5, "answered": ["red \u2028 rose"]}
    lines = [json.dumps({**good, **row}), json.dumps(good, ensure_ascii=False), "[" * 100_000]
    (folder / "inputs-1.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    (one,) = captured_images(folder)
    assert one.file == folder / "a.png" and one.captured.predicted == ("red \u2028 rose",)


def test_images_whose_names_are_not_utf8_do_not_break_a_review(tmp_path: Path) -> None:
    history = LabelHistory(tmp_path / "labels.db", create=True)
    (tmp_path / "new").mkdir()
    name = os.fsdecode(b"new/\xff.png")
    (tmp_path / name).write_bytes(bytes(cv2.imencode(".png", make_image("red", 1))[1]))
    assert _path(history, Sample(str(tmp_path / name), ())) == "new/?.png"
    assert _new_images(Sources(unlabelled=str(tmp_path / "new")), set()) == []


def test_an_image_with_several_texts_and_labels_is_not_reviewed() -> None:
    samples = [Sample("a.png", (0,), text="a cat"), Sample("a.png", (1,), text="a dog"), Sample("b.png", (0,))]
    manifest = Manifest("photos", (*samples, Sample("c.png", (1,))), ("cat", "dog"), "multiclass")
    unique_samples, contradictory = _distinct(manifest, {"a.png": "1", "b.png": "2", "c.png": "2"})
    assert [sample.path for sample in unique_samples] == ["b.png"] and contradictory.keys() == {"b.png"}


def test_a_new_image_that_the_bundle_cannot_predict_is_in_the_queue_with_its_own_row_for_the_others() -> None:
    items = (item(0, ("ant",)), item(1, ("bee",)), *(item(index, ()) for index in (2, 3, 4)))
    predicted = Predictions(("ant", "bee", "cat"), (2, 4), np.array([[1, 0, 0], [0.5, 0.5, 0]], np.float32))
    for row, index in enumerate(predicted.items):
        items = (
            *items[:index],
            replace(items[index], predictions=predicted.most_probable(row, 3)),
            *items[index + 1 :],
        )
    vectors = np.eye(5, 32, dtype=np.float32)
    entries = unlabelled(review([("ant",), ("bee",)], items=items, predicted=predicted, vectors=vectors))
    assert entries is not None
    assert [(entry.item, entry.score) for entry in entries] == [(3, 1.0), (4, 1.0), (2, 0.0)]
    assert entries[0].reason == "The model has no prediction for this image."
    assert unlabelled(review([("ant",), ("bee",)], items=items, predicted=NONE, vectors=vectors)) is not None


def test_an_added_image_that_is_not_a_file_is_written_to_the_folder_of_added_images(tmp_path: Path) -> None:
    session = small_session(tmp_path)
    new = session.items[26]
    data = new.sample.read()
    session.items = (*session.items[:26], replace(new, sample=Sample("digits/1.png", (), data=data)))
    session.decide(26, action="add", labels=["red"], reviewer="ann", queue="unlabelled")
    (record,) = LabelHistory(tmp_path / "labels.db").decisions()
    assert (tmp_path / record.path).read_bytes() == data and record.path.startswith("collected/")


def test_a_parent_of_the_hierarchy_is_not_a_label_as_the_data_could_then_not_be_read(tmp_path: Path) -> None:
    tree = Hierarchy(LABELS, {"blue": "cold", "green": "cold", "red": None, "cold": None})
    session = small_session(tmp_path, hierarchy=tree)
    with pytest.raises(LabelError, match="'cold' is a parent in the class hierarchy; choose one of its classes"):
        audit(session, 0, "cold", "ann")
    audit(session, 0, "wolf", "ann")
