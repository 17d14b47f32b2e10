"""A review: which items are open for whom, recording and undoing decisions, and gathering the images from a config or a run."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_data import make_image, paint, until, write_image
from test_pipeline_review_queues import item, review
from warm_process import WarmProcess

from refract.models.registry import build
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.data.manifest import DataError
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.labels.decisions import LabelDatabaseError, LabelError
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.retraining.stored_snapshots import RECORD, TABLE
from refract.pipeline.review.data import Captured
from refract.pipeline.review.decisions import Decisions
from refract.pipeline.review.session import ReviewSession
from refract.pipeline.review.start import ReviewOptions, start_review
from refract.pipeline.training.run import train


def opened(folder: Path, names: list[tuple[str, ...]] | None = None, **more: Any) -> ReviewSession:
    """Return a session whose label errors are the items 0 to 3, in this order."""
    names = names or [("ant",)] * 20
    rows = [[0.01 * (i + 1), 0.99 - 0.01 * i, 0.0] if i < 4 else [0.9, 0.1, 0.0] for i in range(len(names))]
    data = review(names, rows, **more)
    history = LabelHistory(folder / "labels.db", create=True)
    return ReviewSession("photos", data, Decisions(history), collected=folder / "collected")


def open_items(session: ReviewSession, queue: str, reviewer: str) -> list[int]:
    items = [entry.item for entry in session.open_entries(queue, reviewer, count=100)]
    assert session.open_count(queue, reviewer) == len(items)
    return items


def test_a_decision_closes_the_item_for_everyone_and_an_undo_opens_it(tmp_path: Path) -> None:
    session = opened(tmp_path)
    assert open_items(session, "label-errors", "ann") == [0, 1, 2, 3]
    record = session.decide(1, action="relabel", labels=["bee"], reviewer="ann", queue="label-errors")
    assert open_items(session, "label-errors", "bob") == [0, 2, 3]
    (decided,) = session.decided("ann")
    assert (decided.record, decided.item, decided.labels, decided.queue) == (record, 1, ("bee",), "label-errors")
    assert session.decided("bob") == []
    session.undo(record, reviewer="ann")
    assert open_items(session, "label-errors", "bob") == [0, 1, 2, 3]
    assert session.decided("ann") == []


def test_a_skip_closes_the_item_for_this_reviewer_alone(tmp_path: Path) -> None:
    session = opened(tmp_path)
    session.decide(0, action="skip", labels=[], reviewer="ann", queue="label-errors")
    assert open_items(session, "label-errors", "ann") == [1, 2, 3]
    assert open_items(session, "label-errors", "bob") == [0, 1, 2, 3]


def test_a_session_that_starts_again_shows_what_is_still_open(tmp_path: Path) -> None:
    opened(tmp_path).decide(2, action="confirm", labels=[], reviewer="ann", queue="label-errors")
    assert open_items(opened(tmp_path), "label-errors", "bob") == [0, 1, 3]


def test_decisions_of_another_process_are_seen_after_a_refresh(tmp_path: Path) -> None:
    session, other = opened(tmp_path), opened(tmp_path)
    other.decide(0, action="exclude", labels=[], reviewer="bob", queue="label-errors")
    session.refresh()
    assert open_items(session, "label-errors", "ann") == [1, 2, 3]
    assert session.state(0).applied is not None


def test_each_reviewer_audits_the_same_images_and_their_agreement_is_shown(tmp_path: Path) -> None:
    session = opened(tmp_path)
    first, second, third = open_items(session, "audit", "ann")[:3]
    assert session.audit() is None
    assert session.agreement() is None
    for audited in (first, second, third):
        session.decide(audited, action="confirm", labels=[], reviewer="ann", queue="audit")
    assert open_items(session, "audit", "bob")[:3] == [first, second, third]
    session.decide(first, action="confirm", labels=[], reviewer="bob", queue="audit", seen=session.state(first).seen)
    session.decide(second, action="relabel", labels=["cat"], reviewer="bob", queue="audit")
    estimate, agreement = session.audit(), session.agreement()
    assert estimate is not None
    assert (estimate.decided, estimate.wrong) == (3, 1)
    assert estimate.low < estimate.rate < estimate.high
    assert agreement is not None
    assert (agreement.images, agreement.agreed) == (2, 1)


def test_an_image_that_another_queue_settled_is_not_audited(tmp_path: Path) -> None:
    session = opened(tmp_path)
    session.decide(0, action="relabel", labels=["bee"], reviewer="ann", queue="label-errors")
    assert 0 not in open_items(session, "audit", "bob")
    assert session.audit() is None


def test_conflicts_are_a_queue_until_somebody_decides_who_saw_both(tmp_path: Path) -> None:
    session = opened(tmp_path)
    session.decide(0, action="confirm", labels=[], reviewer="ann", queue="audit")
    session.decide(0, action="relabel", labels=["bee"], reviewer="bob", queue="audit")  # without having seen ann's
    (entry,) = session.open_entries("conflicts", "cid")
    assert entry.reason == "ann: ant; bob: bee."
    session.decide(0, action="relabel", labels=["bee"], reviewer="cid", queue="conflicts", seen=session.state(0).seen)
    assert open_items(session, "conflicts", "cid") == []


@pytest.mark.parametrize(
    ("action", "labels", "text"),
    [
        ("relabel", [], "expected one label"),
        ("relabel", ["ant", "bee"], "expected one label"),
        ("relabel", ["a;b"], "is not a label"),
        ("confirm", ["bee"], "use relabel"),
        ("exclude", ["bee"], "exclude takes none"),
        ("undo", [], "ID of a record"),
        ("burn", [], "is not one of"),
    ],
)
def test_invalid_decisions_are_refused_and_not_recorded(
    tmp_path: Path, action: Any, labels: list[str], text: str
) -> None:
    session = opened(tmp_path)
    with pytest.raises(LabelError, match=text):
        session.decide(0, action=action, labels=labels, reviewer="ann", queue="audit")
    assert LabelHistory(tmp_path / "labels.db").decisions() == []


def test_a_reviewer_cannot_undo_what_another_decided(tmp_path: Path) -> None:
    session = opened(tmp_path)
    record = session.decide(0, action="confirm", labels=[], reviewer="ann", queue="audit")
    with pytest.raises(LabelError, match="not a decision of bob"):
        session.undo(record, reviewer="bob")


def test_a_new_class_is_offered_from_then_on(tmp_path: Path) -> None:
    session = opened(tmp_path)
    session.decide(0, action="relabel", labels=["wasp"], reviewer="ann", queue="label-errors")
    assert session.labels == ["ant", "bee", "cat", "wasp"]


def test_an_added_captured_image_is_copied_out_of_reach_of_the_quota(tmp_path: Path) -> None:
    write_image(tmp_path / "capture" / "images" / "1.png", make_image("red", 1))
    file = tmp_path / "capture" / "images" / "1.png"
    new = item(20, ())
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    new = type(new)(20, content, type(new.sample)(str(file), ()), str(file), ())
    items = (*(item(index, ("ant",)) for index in range(20)), new)
    session = opened(
        tmp_path, items=items, vectors=np.eye(21, 32, dtype=np.float32), captured={20: Captured(0.4, ("ant",))}
    )
    with pytest.raises(LabelError, match="choose a label"):
        session.decide(20, action="confirm", labels=[], reviewer="ann", queue="served")
    session.decide(20, action="relabel", labels=["bee"], reviewer="ann", queue="served")
    file.unlink()
    (decision,) = LabelHistory(tmp_path / "labels.db").decisions()
    assert (decision.action, decision.path) == ("add", f"collected/{content}.png")
    assert hashlib.sha256((tmp_path / decision.path).read_bytes()).hexdigest() == content


def test_neighbours_are_the_most_similar_other_items(tmp_path: Path) -> None:
    vectors = np.eye(20, 32, dtype=np.float32)
    vectors[7] = vectors[3] = (vectors[3] + vectors[0]) / np.sqrt(2)
    session = opened(tmp_path, vectors=vectors)
    assert session.neighbours(3, 2) == [(7, 1.0), (0, pytest.approx(0.7071, abs=1e-4))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on images in three colours, of which two red ones have since been moved to the blue ones."""
    root = tmp_path_factory.mktemp("review")
    paint(root / "images", range(20))
    (root / "parents.csv").write_text("label,parent\nred,warm\nblue,cold\ngreen,cold\n")
    values = {
        "data": {"source": str(root / "images"), "hierarchy": str(root / "parents.csv"), "image_size": 32, "batch_size": 16, "workers": 0},
        "model": {"name": "resnet20"}, "trainer": {"max_epochs": 3, "runs_dir": str(root / "runs"), "run_name": "run"},
        "tracking": {"enabled": False}, "evaluation": {"robustness": "none"},
    }  # fmt: skip
    train(config_from_dict(values))
    (root / "parents.csv").unlink()  # the bundle has it
    for number in (3, 11):
        (root / "images" / "red" / f"{number:03}.png").rename(root / "images" / "blue" / f"flip{number}.png")
    return root


def test_a_review_of_a_run_finds_flipped_labels_and_what_it_decides_is_trained_on(run: Path) -> None:
    root = run
    paint(root / "new", range(40, 43), ("green",))
    capture = root / "capture"
    write_image(capture / "images" / "a.png", make_image("red", 77))
    write_image(capture / "images" / "known.png", make_image("red", 77))
    row = {"image": "images/a.png", "confidence": 0.4, "answered": ["blue"]}
    (capture / "inputs-1.jsonl").write_text(
        f'{json.dumps(row)}\n{json.dumps({**row, "image": "images/gone.png"})}\n{{"ima'
    )
    (capture / "feedback-1.jsonl").write_text(json.dumps({"image": "images/a.png", "labels": ["red"]}) + "\n")
    options = ReviewOptions(
        str(root / "runs" / "run"), captured=capture, feedback=capture,
        unlabelled=str(root / "new"), challenger=str(root / "runs" / "run" / "bundle"),
    )  # fmt: skip
    session, address = start_review(options)
    assert address == str(root / "labels.db")
    assert session.labels == ["blue", "green", "red"]
    names = [queue.name for queue in session.queues]
    assert names == [
        "label-errors",
        "near-duplicates",
        "served",
        "disagreements",
        "confident-errors",
        "unlabelled",
        "audit",
        "conflicts",
    ]
    doubtful = [session.items[entry.item] for entry in session.open_entries("label-errors", "ann")]
    assert {Path(one.path).name for one in doubtful[:2]} == {"flip3.png", "flip11.png"}
    splits = {one.split for one in session.items}
    assert splits == {"train", "val", "test", ""}
    (served,) = session.open_entries("served", "ann")
    assert served.reason.endswith("The client's feedback is red.")
    assert {session.items[entry.item].sample.path for entry in session.open_entries("unlabelled", "ann")} == {
        str(root / "new" / "green" / f"{number:03}.png") for number in range(40, 43)
    }
    for one in doubtful[:2]:
        session.decide(one.index, action="relabel", labels=["red"], reviewer="ann", queue="label-errors")
    session.decide(served.item, action="relabel", labels=["red"], reviewer="ann", queue="served")
    jpeg, heat_map = session.image(served.item, 12), session.heat_map(served.item)
    assert jpeg.startswith(b"\xff\xd8")
    assert heat_map is None or heat_map[0].startswith(b"\x89PNG")
    config = config_from_dict({"data": {"source": str(root / "images"), "image_size": 32, "labels": address}})
    manifest, identity = prepare_data(config)
    assert manifest.counts() == {"blue": 20, "green": 20, "red": 21}
    assert identity["label_changes"].startswith("3 decisions: 2 corrected (blue → red 2), 1 added")


def test_a_review_of_a_config_needs_weights_and_then_no_training(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(build("resnet20", 3, image_size=(32, 32)).state_dict(), tmp_path / "weights.safetensors")
    text = f"data: {{source: {run / 'images'}, image_size: 32}}\nmodel: {{name: resnet20}}\n"
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(DataError, match="model.weights is none"):
        start_review(ReviewOptions("my.yaml", labels="labels.db"))
    with pytest.raises(DataError, match="--labels labels.db@3: .* without @3"):
        start_review(ReviewOptions("my.yaml", labels="labels.db@3"))
    (tmp_path / "my.yaml").write_text(text.replace("resnet20", "resnet20, weights: weights.safetensors"))
    session, _ = start_review(ReviewOptions("my.yaml", labels="labels.db"))
    assert [queue.name for queue in session.queues] == ["label-errors", "near-duplicates", "audit", "conflicts"]
    assert session.heat_map(0) is None
    assert len(session.neighbours(0)) == 5


def test_the_password_of_a_label_history_is_not_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ReviewOptions(str(run / "runs" / "run"), labels="postgresql://ann:hunter2@127.0.0.1:1/labels")
    with pytest.raises(LabelDatabaseError) as error:
        start_review(options)
    assert "hunter2" not in caplog.text + str(error.value)


@pytest.mark.parametrize("subject", ["nothing", "empty"])
def test_a_subject_that_is_neither_config_nor_run_is_named(tmp_path: Path, subject: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{subject}.*neither a config file nor the folder of a run or bundle"):
        start_review(ReviewOptions(subject))


def test_the_snapshot_of_a_retraining_run_needs_the_name_of_its_label_history(run: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / RECORD).write_text("{}")
    options = ReviewOptions(str(run / "runs" / "run"), data=str(snapshot / TABLE))
    with pytest.raises(DataError, match="snapshot of a retraining run.*--labels"):
        start_review(options)
    assert not (snapshot / "labels.db").exists()


@pytest.mark.slow
def test_a_killed_review_has_every_decision_that_it_acknowledged(run: Path, tmp_path: Path, warm: WarmProcess) -> None:
    command = ["review", str(run / "runs" / "run"), "--labels", "labels.db", "--port", "0"]
    process = warm.start(command, cwd=tmp_path, env=dict(os.environ))
    with process.output:
        address = re.findall(r"open (http://\S+);", until(process, "Review of"))[0]
        acknowledged = []
        with httpx.Client(base_url=address, trust_env=False) as client:
            items = client.get("/api/queues/audit?count=20").json()["items"]
            for item in items:
                body = {"item": item["index"], "action": "exclude", "labels": [], "queue": "audit", "reviewer": "ann"}
                acknowledged.append(client.post("/api/decisions", json=body).json()["record"])
                if len(acknowledged) == 12:
                    process.kill()
                    break
    process.wait(60)
    recorded = LabelHistory(tmp_path / "labels.db").decisions()
    assert [record.id for record in recorded] == acknowledged
    assert [record.content for record in recorded] == [item["content"] for item in items[:12]]
