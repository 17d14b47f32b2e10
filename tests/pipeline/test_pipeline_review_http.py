"""The HTTP interface of a review: who may use it, what it accepts, and how reviewers share it."""

import contextlib
import io
import json
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image
from small_review import LABELS, serving, small_session

from refract.api_keys import KeyFile
from refract.errors import InputError
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.review.app import create_app
from refract.pipeline.review.bodies import LONGEST_BODY
from refract.pipeline.review.server import listen, serve_review
from refract.pipeline.review.session import ReviewSession

ANN, BOB = {"Authorization": "Bearer ann-secret"}, {"Authorization": "Bearer bob-secret"}


@pytest.fixture
def session(tmp_path: Path) -> ReviewSession:
    return small_session(tmp_path)


@pytest.fixture
def client(session: ReviewSession) -> Iterator[httpx.Client]:
    with serving(create_app(session, reviewer="cleo")) as client:
        yield client


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    (tmp_path / "keys").write_text("ann-secret  # ann\nbob-secret  # bob\n")
    return KeyFile(tmp_path / "keys")


def decision(client: httpx.Client, item: int = 3, **members) -> dict:
    """The body of a decision that confirms an item of the queue label-errors."""
    return {"item": item, "action": "confirm", "queue": "label-errors", **members}


def refused(response: httpx.Response) -> tuple[int, str]:
    """(status, code) of problem details."""
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert problem.keys() == {"type", "title", "status", "detail", "code"} and problem["status"] == response.status_code
    return response.status_code, problem["code"]


def test_the_session_lists_the_queues_with_what_is_open(client) -> None:
    body = client.get("/api/session").json()
    assert (body["title"], body["labels"], body["multilabel"]) == ("photos", list(LABELS), False)
    assert body["reviewer"] == {"name": "cleo", "fixed": False}
    assert [(one["name"], one["total"], one["open"]) for one in body["queues"]] == [
        ("label-errors", 3, 3), ("near-duplicates", 1, 1), ("served", 2, 2), ("unlabelled", 2, 2), ("audit", 24, 24), ("conflicts", 0, 0)
    ]  # fmt: skip
    assert body["audit"] is None and body["agreement"] is None
    assert client.get("/api/session?reviewer=dan").json()["reviewer"]["name"] == "dan"


def test_a_queue_gives_items_with_reason_predictions_and_the_related_image(client, session) -> None:
    body = client.get("/api/queues/near-duplicates?start=0&count=5").json()
    (item,) = body["items"]
    assert body["open"] == 1 and item["reason"] == session.queues[1].entries[0].reason
    assert (item["index"], item["path"], item["labels"], item["split"]) == (0, "000.png", ["blue"], "train")
    assert item["related"] == {"index": 1, "path": "001.png", "labels": ["green"], "split": "train"}
    assert item["predictions"][0] == {"label": "blue", "probability": 0.9} and item["in_data"] is True
    assert item["state"] == {"applied": None, "seen": None, "conflicts": []}
    pages = [client.get(f"/api/queues/audit?start={start}&count=10").json()["items"] for start in (0, 10, 20)]
    assert [len(page) for page in pages] == [10, 10, 4]
    assert sorted(item["index"] for page in pages for item in page) == list(range(24))
    (new, _) = client.get("/api/queues/unlabelled").json()["items"]
    assert (new["labels"], new["in_data"], new["familiarity"]) == ([], False, 0.25)


def test_images_are_jpegs_of_a_bounded_size_that_browsers_check_again(client, session) -> None:
    response = client.get("/api/items/0/image?longest=256")
    assert response.headers["content-type"] == "image/jpeg" and response.headers["cache-control"] == "private, no-cache"
    pixels = np.asarray(Image.open(io.BytesIO(response.content)).convert("RGB"))
    original = np.asarray(Image.open(session.items[0].sample.path).convert("RGB"))
    assert pixels.shape == original.shape and np.abs(pixels.mean((0, 1)) - original.mean((0, 1))).max() < 5
    large = cv2.resize(np.uint8([[[250, 0, 0], [0, 0, 250]]]), (3000, 2000), interpolation=cv2.INTER_LINEAR)
    Path(session.items[2].sample.path).write_bytes(bytes(cv2.imencode(".jpg", large)[1]))
    for longest in (256, 1024):
        drawn = Image.open(io.BytesIO(client.get(f"/api/items/2/image?longest={longest}").content))
        assert drawn.size == (longest, round(longest * 2 / 3))
        left, right = (drawn.getpixel((x, longest // 3)) for x in (3, longest - 3))
        assert left[2] > 240 > 10 > left[0] and right[0] > 240 > 10 > right[2]
    again = client.get("/api/items/0/image?longest=256", headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/api/items/1/image?longest=256", headers={"If-None-Match": response.headers["etag"]})
    assert other.status_code == 200, "another image under another tag"
    Path(session.items[1].sample.path).write_bytes(b"damaged")
    assert refused(client.get("/api/items/1/image")) == (404, "unreadable_image")
    Path(session.items[1].sample.path).unlink()
    assert refused(client.get("/api/items/1/image")) == (404, "unreadable_image")
    assert client.get("/api/items/0/heat-map").status_code == 204, "the review has no bundle"


def test_a_decision_is_recorded_and_leaves_the_queue(client, session, tmp_path: Path) -> None:
    body = {
        "item": 3,
        "action": "relabel",
        "labels": ["green"],
        "queue": "label-errors",
        "reason": "a leaf",
        "reviewer": "ann",
    }
    response = client.post("/api/decisions", json=body).json()
    (record,) = LabelHistory(tmp_path / "labels.db").decisions()
    assert response == {"record": record.id, "conflicts": []}
    assert (record.action, record.labels, record.reviewer, record.reason) == ("relabel", ("green",), "ann", "a leaf")
    assert (record.content, record.path, record.origin) == (session.items[3].content, "003.png", "review/label-errors")
    queue = client.get("/api/queues/label-errors?reviewer=bob").json()
    assert queue["open"] == 2 and 3 not in [item["index"] for item in queue["items"]]
    applied = {"record": 1, "action": "relabel", "labels": ["green"], "reviewer": "ann"}
    assert client.get("/api/items/3").json()["state"] == {"applied": applied, "seen": 1, "conflicts": []}
    assert client.get("/api/decided?reviewer=bob").json() == {"decisions": []}
    (mine,) = client.get("/api/decided?reviewer=ann").json()["decisions"]
    assert mine == {"record": 1, "item": 3, "action": "relabel", "labels": ["green"], "queue": "label-errors"}
    assert client.post("/api/undo", json={"record": 1, "reviewer": "ann"}).json() == {"record": 1}
    assert client.get("/api/queues/label-errors").json()["open"] == 3
    for record in (1, 99):
        assert refused(client.post("/api/undo", json={"record": record, "reviewer": "ann"})) == (409, "not_undone")


def test_a_request_that_is_sent_again_is_carried_out_once(client, tmp_path: Path) -> None:
    first, again, other = (
        client.post("/api/decisions", json=decision(client, seen=seen), headers={"Idempotency-Key": key})
        for key, seen in (("a", None), ("a", None), ("b", 1))
    )
    assert first.json() == again.json() and other.json()["record"] != first.json()["record"]
    assert len(LabelHistory(tmp_path / "labels.db").decisions()) == 2
    wrong = [
        client.post("/api/decisions", json=decision(client, item=99), headers={"Idempotency-Key": "c"}) for _ in "12"
    ]
    assert [refused(one) for one in wrong] == [(404, "unknown_item")] * 2
    undone = [client.post("/api/undo", json={"record": 1}, headers={"Idempotency-Key": "a"}) for _ in "12"]
    assert [one.json() for one in undone] == [{"record": 1}] * 2, (
        "an undo with the key of a decision is another request"
    )


def test_two_reviewers_agree_disagree_and_measure_the_labels(client) -> None:
    for reviewer, action, labels in (("ann", "confirm", []), ("bob", "relabel", ["red"])):
        for item in (0, 1):
            body = decision(client, item, action=action, labels=labels, queue="audit", reviewer=reviewer)
            conflicts = client.post("/api/decisions", json=body).json()["conflicts"]
            assert [one["reviewer"] for one in conflicts] == (["ann"] if reviewer == "bob" else [])
    for reviewer in ("ann", "bob"):
        client.post("/api/decisions", json=decision(client, 2, queue="audit", reviewer=reviewer))
    body = client.get("/api/session?reviewer=ann").json()
    audit, agreement = body["audit"], body["agreement"]
    assert (audit["decided"], audit["wrong"], round(audit["rate"], 4)) == (3, 2, 0.6667)
    assert 0 < audit["low"] < audit["rate"] < audit["high"] < 1
    assert (agreement["images"], agreement["agreed"]) == (3, 1)
    queues = {one["name"]: (one["total"], one["open"]) for one in body["queues"]}
    assert queues["audit"] == (24, 21) and queues["conflicts"] == (2, 2)
    (first, _) = client.get("/api/queues/conflicts").json()["items"]
    assert first["reason"] == "ann: blue; bob: red."
    # A decision that has seen both settles the conflict.
    body = decision(client, first["index"], queue="conflicts", reviewer="cleo", seen=first["state"]["seen"])
    assert client.post("/api/decisions", json=body).json()["conflicts"] == []
    assert client.get("/api/queues/conflicts").json()["open"] == 1


def test_decisions_of_other_processes_appear(client, session, tmp_path: Path) -> None:
    from refract.pipeline.labels.decisions import Decision

    item = session.items[3]
    LabelHistory(tmp_path / "labels.db").append(
        Decision(content=item.content, path=item.path, action="exclude", reviewer="import")
    )
    assert client.get("/api/queues/label-errors").json()["open"] == 2


@pytest.mark.parametrize(
    ("change", "status", "code", "detail"),
    [
        ({"item": 28}, 404, "unknown_item", "the items 0 to 27"),
        ({"item": -1}, 422, "invalid_member", "item: is -1; expected an integer from 0"),
        ({"item": True}, 422, "invalid_member", "item: is true"),
        ({"seen": 2**63}, 422, "invalid_member", "seen: is 9223372036854775808"),
        ({"action": "undo"}, 422, "invalid_member", 'action: is "undo"; expected one of confirm, relabel, add, exclude, skip'),
        ({"action": None}, 422, "invalid_member", "action: is null"),
        ({"labels": "red"}, 422, "invalid_member", 'labels: is "red"; expected a list of texts'),
        ({"labels": [1]}, 422, "invalid_member", "labels: is [1]"),
        ({"queue": "none"}, 422, "invalid_member", 'queue: is "none"; expected one of label-errors'),
        ({"reason": 5}, 422, "invalid_member", "reason: is 5; expected a text"),
        ({"colour": 5}, 422, "unknown_member", "unknown member 'colour'; accepted: item, action, labels, queue"),
        ({"action": "relabel", "labels": ["a;b"]}, 422, "invalid_decision", "'a;b' is not a label"),
        ({"action": "relabel", "labels": ["red", "blue"]}, 422, "invalid_decision", "expected one label"),
        ({"action": "confirm", "item": 26}, 422, "invalid_decision", "choose a label"),
        ({"reviewer": "x" * 5000}, 422, "invalid_decision", "reviewer: has 5,000 characters"),
        ({"reviewer": "\ud800"}, 422, "invalid_decision", "is not UTF-8"),
        ({"content": "0" * 64}, 409, "restarted", "reload the page"),
    ],
)  # fmt: skip
def test_an_invalid_decision_names_the_member_and_what_is_accepted(
    client, change, status, code, detail, tmp_path
) -> None:
    body = json.dumps(decision(client, **{"item": 3, **change}))
    response = client.post("/api/decisions", content=body, headers={"Content-Type": "application/json"})
    assert refused(response) == (status, code)
    assert detail in response.json()["detail"]
    assert LabelHistory(tmp_path / "labels.db").decisions() == []


def test_malformed_bodies_and_addresses_are_rejected(client) -> None:
    for content, status, code in (
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe\x00", 400, "invalid_json"),
        (b"[" * 50_000, 400, "invalid_json"),
        (b"[]", 422, "invalid_body"),
        (b" " * (LONGEST_BODY + 1), 413, "body_too_large"),
    ):
        for path in ("/api/decisions", "/api/undo"):
            headers = {"Content-Type": "application/json; charset=utf-8"}
            assert refused(client.post(path, content=content, headers=headers)) == (status, code)
    assert refused(client.post("/api/undo", json={"record": "1"})) == (422, "invalid_member")
    for path, status, code in (
        ("/api/items/28", 404, "unknown_item"),
        ("/api/items/x/image", 404, "unknown_item"),
        ("/api/items/-1/heat-map", 404, "unknown_item"),
        ("/api/items/0/image?longest=512", 422, "invalid_parameter"),
        ("/api/queues/audit?count=0", 422, "invalid_parameter"),
        ("/api/queues/audit?start=-1", 422, "invalid_parameter"),
        ("/api/queues/none", 404, "unknown_queue"),
        ("/none", 404, "not_found"),
        ("/api/undo", 405, "method_not_allowed"),
    ):
        assert refused(client.get(path)) == (status, code)


def test_requests_of_other_pages_are_rejected(client, tmp_path: Path) -> None:
    body = json.dumps(decision(client))
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind} if kind else {}
        response = client.post("/api/decisions", content=body, headers=headers)
        assert refused(response) == (415, "unsupported_media_type"), "a form needs no permission of the browser"
    port = client.base_url.port
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": f"http://localhost:{port}"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert refused(client.post("/api/decisions", json=decision(client), headers=headers)) == (403, "other_origin")
        assert refused(client.get("/api/items/0/image", headers=headers)) == (403, "other_origin")
    assert LabelHistory(tmp_path / "labels.db").decisions() == []
    same_origin = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    response = client.post("/api/decisions", json=decision(client), headers=same_origin)
    assert response.status_code == 200 and "access-control-allow-origin" not in response.headers
    assert response.headers["cross-origin-resource-policy"] == "same-origin"


def test_a_request_to_another_host_name_is_rejected(client) -> None:
    """An attacker's name that resolves to 127.0.0.1 makes the browser see one origin."""
    port = client.base_url.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil",
        "[::2]",
        "a@localhost",
        "",
    ):
        for path in ("/", "/api/session"):
            assert refused(client.get(path, headers={"Host": host})) == (421, "unknown_host")
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.2:1", "[::1]:80", "localhost."):
        assert client.get("/api/session", headers={"Host": host}).status_code == 200
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 421")


def test_another_host_needs_keys(session, keys) -> None:
    for host in ("0.0.0.0", "192.0.2.7", "review.example"):
        with pytest.raises(InputError, match=f"--host {host}: .* add --keys FILE"):
            create_app(session, host=host)
    for host, names in (
        ("review.example", ("review.example:8100", "localhost")),
        ("0.0.0.0", ("a.example", "10.0.0.1:81")),
    ):
        with serving(create_app(session, host=host, keys=keys)) as client:
            for name in names:
                assert client.get("/api/session", headers={**ANN, "Host": name}).status_code == 200
            assert client.get("/api/session", headers={"Host": names[0]}).status_code == 401


def test_keys_name_the_reviewers(session, keys, tmp_path: Path) -> None:
    with serving(create_app(session, keys=keys)) as client:
        assert client.get("/").status_code == 200, "the page asks for the key"
        for path in ("/api/session", "/api/items/0/image", "/api/items/0/heat-map", "/api/queues/audit", "/api/none"):
            for headers in ({}, {"Authorization": "Bearer wrong-secret"}, {"Authorization": "Basic ann-secret"}):
                response = client.get(path, headers=headers)
                assert refused(response) == (401, "unauthorized") and response.headers["www-authenticate"] == "Bearer"
        assert refused(client.post("/api/decisions", json=decision(client))) == (401, "unauthorized")
        assert client.get("/api/session?reviewer=bob", headers=ANN).json()["reviewer"] == {"name": "ann", "fixed": True}
        client.post("/api/decisions", json=decision(client, reviewer="ann"), headers=BOB)
        (record,) = LabelHistory(tmp_path / "labels.db").decisions()
        assert record.reviewer == "bob"
        assert refused(client.post("/api/undo", json={"record": 1, "reviewer": "bob"}, headers=ANN)) == (
            409,
            "not_undone",
        )
        assert client.post("/api/undo", json={"record": 1}, headers=BOB).status_code == 200


def test_a_failing_database_is_reported_as_a_failure_that_may_pass(client, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "labels.db")) as database:
        database.execute("ALTER TABLE label_decisions RENAME TO away")
        response = client.post("/api/decisions", json=decision(client), headers={"Idempotency-Key": "a"})
        assert refused(response) == (503, "database_failed") and response.headers["retry-after"] == "2"
        database.execute("ALTER TABLE away RENAME TO label_decisions")
    again = client.post("/api/decisions", json=decision(client), headers={"Idempotency-Key": "a"})
    assert again.json()["record"] == 1, "a failure is not remembered"


def test_a_taken_port_and_wrong_keys_are_reported_before_the_images_are_read(tmp_path: Path) -> None:
    def start() -> tuple[ReviewSession, str]:
        raise AssertionError("started")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}: .* choose another --host or --port"):
            serve_review(start, host="127.0.0.1", port=port)
    with listen("127.0.0.1", 0) as ranking, pytest.raises(InputError, match="cannot listen"):
        serve_review(start, host="127.0.0.1", port=ranking.getsockname()[1])
    for port in (-1, 65536):
        with pytest.raises(InputError, match=f"--port {port}: expected 0 to 65535"):
            serve_review(start, host="127.0.0.1", port=port)
    with pytest.raises(InputError, match="--keys: .*missing: No such file"):
        serve_review(start, host="127.0.0.1", port=0, keys=tmp_path / "missing")
    (tmp_path / "keys").write_text("short\n")
    with pytest.raises(InputError, match="--keys: .*keys: line 1: an API key must have at least 8 characters"):
        serve_review(start, host="127.0.0.1", port=0, keys=tmp_path / "keys")
    with pytest.raises(InputError, match="--host 0.0.0.0"):
        serve_review(start, host="0.0.0.0", port=0)
