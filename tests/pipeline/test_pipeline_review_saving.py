"""The web page of a review in a real browser: it never waits for the server, and loses no decision."""

import sqlite3
from contextlib import closing
from pathlib import Path

from chromium import needs_chromium
from review_browser import ready, said, saved, title

from refract.api_keys import KeyFile

pytestmark = needs_chromium


STEP = """() => {
    const before = current().path;
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
    const image = document.querySelector("#frame img");
    return [before, document.getElementById("item-title").textContent, Boolean(image) && image.complete && image.naturalWidth > 0];
}"""
"""Press Enter, and read what is shown before any response can arrive."""


def test_the_next_images_appear_without_waiting_for_the_server(review, tmp_path: Path) -> None:
    one = review("audit")
    page = one.page
    page.wait_for_function("() => [...large.kept.values()].filter(image => image.ready).length >= 7")
    held: list | None = []
    page.route("**/api/**", lambda route: route.continue_() if held is None else held.append(route))
    steps = [page.evaluate(STEP) for _ in range(6)]
    assert all(is_shown for *_, is_shown in steps) and len({name for name, *_ in steps}) == 6
    assert [after for _, after, _ in steps[:-1]] == [before for before, *_ in steps[1:]]
    assert page.inner_text("#saving") == "6 not saved yet"
    waiting, held = held, None
    for route in waiting:
        route.continue_()
    assert [record.path for record in saved(page, 6, tmp_path)] == [before for before, *_ in steps]


def test_decisions_survive_a_server_that_does_not_respond(review, tmp_path: Path) -> None:
    one = review("audit")
    page = one.page
    page.wait_for_function("() => [...large.kept.values()].filter(image => image.ready).length >= 7")
    page.route("**/api/decisions", lambda route: route.abort())
    first = title(page)
    page.keyboard.press("Enter")
    page.keyboard.press("2")
    page.wait_for_selector("text=2 not saved yet: the review does not respond; trying again")
    assert "Keep this page open" in page.inner_text("#alert")
    third = title(page)
    page.keyboard.press("x")
    page.keyboard.press("u")
    assert title(page) == third and "2 not saved yet" in page.inner_text("#saving"), "what was not sent needs no undo"
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.type), dialog.dismiss()))
    page.close(run_before_unload=True)
    page.evaluate("document.title")  # the dialog was handled
    assert dialogs == ["beforeunload"], "leaving would lose the decisions"
    page.unroute_all()
    page.evaluate("dispatchEvent(new Event('online'))")
    records = saved(page, 2, tmp_path)
    assert records[0].path == first and [record.action for record in records] == ["confirm", "relabel"]
    assert page.inner_text("#alert") == ""


def test_a_decision_whose_response_is_lost_is_recorded_once(review, tmp_path: Path) -> None:
    one = review("audit")
    page, received = one.page, []

    def lose(route) -> None:
        received.append(route.fetch().status)
        route.abort()

    page.route("**/api/decisions", lose)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=1 not saved yet: the review does not respond")
    page.unroute_all(behavior="wait")
    page.evaluate("dispatchEvent(new Event('online'))")
    saved(page, 1, tmp_path)
    assert received and set(received) == {200}
    page.keyboard.press("u")
    saved(page, 2, tmp_path)
    assert one.client.get("/api/queues/audit?reviewer=ann").json()["open"] == 24


def test_a_failing_database_is_tried_again_and_a_rejected_decision_returns(review, tmp_path: Path) -> None:
    one = review("served")
    page = one.page
    with closing(sqlite3.connect(tmp_path / "labels.db")) as database:
        database.execute("ALTER TABLE label_decisions RENAME TO away")
        page.keyboard.press("s")
        page.wait_for_selector("text=1 not saved yet")
        page.wait_for_function("() => document.getElementById('saving').textContent.includes('trying again')")
        database.execute("ALTER TABLE away RENAME TO label_decisions")
    page.evaluate("dispatchEvent(new Event('online'))")
    saved(page, 1, tmp_path)
    path = title(page)
    (tmp_path / path).unlink()
    page.keyboard.press("1")
    page.wait_for_selector(f"text=The decision on {path} was not saved: {path}: the image cannot be copied")
    saved(page, 1, tmp_path)
    page.click("text=Show the image")
    assert title(page) == path and page.inner_text("#alert") == ""


def test_a_held_key_decides_once(review, tmp_path: Path) -> None:
    one = review("audit")
    page = one.page
    page.keyboard.down("Enter")
    for _ in range(5):
        page.keyboard.down("Enter")  # repeats
    page.keyboard.up("Enter")
    saved(page, 1, tmp_path)


def test_an_image_on_which_somebody_decided_is_not_shown_any_more(review, tmp_path: Path) -> None:
    one = review("unlabelled", new=24)
    page, entries = one.page, one.session.queues[3].entries
    paths = [one.session.items[entry.item].path for entry in entries]
    body = {"item": entries[6].item, "action": "add", "labels": ["red"], "queue": "unlabelled", "reviewer": "bob"}
    one.client.post("/api/decisions", json=body)
    shown = []
    for number in range(11):
        page.wait_for_function("path => current() && current().path !== path", arg=shown[-1] if shown else "")
        # The page learns it while the reviewer looks at the images before.
        page.wait_for_function("place => place < 4 || entries.length === 11", arg=number)
        shown.append(title(page))
        page.keyboard.press("1")
    assert shown == [path for path in paths if path != paths[6]]
    saved(page, 12, tmp_path)


def test_a_conflict_that_arises_while_deciding_is_reported(review, tmp_path: Path) -> None:
    one = review()
    page = one.page
    one.client.post("/api/decisions", json={"item": 3, "action": "exclude", "queue": "label-errors", "reviewer": "bob"})
    page.keyboard.press("Enter")
    page.wait_for_selector("text=003.png: bob excluded it while you decided. The image is in conflict.")
    page.click("text=Dismiss")
    assert page.inner_text("#alert") == "" and page.evaluate("document.activeElement.id") == "stage"


def test_the_last_decisions_can_be_undone_after_a_reload(review, tmp_path: Path) -> None:
    one = review()
    page = one.page
    page.keyboard.press("2")
    saved(page, 1, tmp_path)
    page.reload()
    ready(page)
    assert title(page) == "007.png" and page.evaluate("queue.name") == "label-errors", "the address names the queue"
    page.wait_for_function("() => past.length === 1")
    page.keyboard.press("u")
    page.wait_for_function("() => current()?.path === '003.png'")
    assert [record.action for record in saved(page, 2, tmp_path)] == ["confirm", "undo"]
    page.keyboard.press("1")
    assert said(saved(page, 3, tmp_path)[2]) == ("003.png", "relabel", ("green",))


def test_a_long_queue_is_loaded_while_it_is_reviewed(review, tmp_path: Path) -> None:
    one = review("audit", count=100)
    page = one.page
    for number in range(100):
        page.wait_for_function("number => current() && decidedHere === number", arg=number)
        page.keyboard.press("Enter")
    page.wait_for_selector("text=Nothing is left in “Random audit”.")
    assert len({record.content for record in saved(page, 100, tmp_path)}) == 100


def test_the_page_asks_for_an_api_key(review, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann-secret  # ann\n")
    now = [0.0]
    one = review(keys=KeyFile(tmp_path / "keys", clock=lambda: now[0]), wait=False)
    page = one.page
    page.wait_for_selector("text=This review needs an API key.")
    page.keyboard.type("wrong-secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The review rejects this key.")
    page.keyboard.type("ann-secret")
    page.keyboard.press("Enter")
    ready(page)
    assert page.input_value("#reviewer") == "ann" and page.get_attribute("#reviewer", "readonly") is not None
    page.wait_for_function("() => document.querySelector('#thumbs img')?.naturalWidth > 0")
    page.keyboard.press("Enter")
    saved(page, 1, tmp_path)
    page.reload()
    ready(page)  # the key is kept for this tab
    assert page.evaluate("Object.keys(localStorage).filter(name => localStorage[name].includes('secret'))") == []
    (tmp_path / "keys").write_text("ann-secret-2  # ann\n")
    now[0] = 2.0
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The review rejects this key.")
    page.keyboard.type("ann-secret-2")
    page.keyboard.press("Enter")
    saved(page, 2, tmp_path)
