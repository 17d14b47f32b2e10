"""The web page of a review in a real browser: what it shows, and each kind of decision."""

from pathlib import Path

import cv2
import numpy as np
from chromium import needs_chromium
from review_browser import ready, said, saved, text, title
from small_review import LABELS

from refract.models.hierarchy import Hierarchy
from refract.pipeline.review.images import HeatMaps

pytestmark = needs_chromium


def test_the_page_shows_the_image_with_reason_predictions_and_neighbours(review) -> None:
    one = review()
    page = one.page
    entry = one.session.queues[0].entries[0]
    assert page.inner_text("h1") == "photos" and page.title() == "photos – label review"
    assert title(page) == one.session.items[entry.item].path and page.inner_text("#reason") == entry.reason
    assert text(page, "#label-row") == "Label: blue"
    assert [text(page, f"#choices li:nth-child({i})") for i in (1, 2, 3)] == [
        "1 green 90.0 %",
        "2 blue 20.0 %",
        "3 red 2.0 %",
    ]
    page.wait_for_selector("#thumbs figure:nth-child(5)")
    page.wait_for_function("() => [...document.querySelectorAll('#thumbs img')].every(image => image.naturalWidth > 0)")
    nearest = [one.session.items[index] for index, _ in one.session.neighbours(entry.item)]
    assert [figure.get_attribute("title") for figure in page.query_selector_all("#thumbs figure")] == [
        i.path for i in nearest
    ]
    assert (
        page.inner_text("#neighbours-text")
        == f"{sum(i.labels == ('blue',) for i in nearest)} of 5 have the label blue."
    )
    page.wait_for_selector("text=There is none: the review has no bundle")
    assert page.get_attribute("#frame img", "alt") == "003.png, label blue"
    assert text(page, "#queue-list li:nth-child(5)") == "Random audit 24 left"
    assert not one.errors and all(url.startswith((one.origin, "blob:" + one.origin, "data:")) for url in one.requested)


def test_keys_decide_and_the_decisions_are_recorded_in_order(review, tmp_path: Path) -> None:
    one = review("audit")
    page, first = one.page, [entry.item for entry in one.session.queues[4].entries]
    paths = [one.session.items[item].path for item in first]
    labels = [one.session.items[item].labels for item in first]
    shown = []
    for pressed in ("Enter", "2", "Space", "x", "s", "1"):
        shown.append(title(page))
        page.keyboard.press(pressed)
    assert shown == paths[:6] and title(page) == paths[6]
    records = saved(page, 6, tmp_path)
    second = one.session.items[first[1]].predictions[1].label
    assert [said(record) for record in records] == [
        (paths[0], "confirm", labels[0]), (paths[1], "relabel", (second,)), (paths[2], "confirm", labels[2]), (paths[3], "exclude", ()),
        (paths[4], "skip", ()), (paths[5], "confirm", labels[5]),
    ]  # fmt: skip
    assert {record.reviewer for record in records} == {"ann"} and {record.origin for record in records} == {
        "review/audit"
    }
    page.keyboard.press("u")
    page.keyboard.press("u")
    assert title(page) == paths[4] and "Undone: skipped" in page.inner_text("#status")
    undone = saved(page, 8, tmp_path)[6:]
    assert [(record.action, record.undoes) for record in undone] == [("undo", records[5].id), ("undo", records[4].id)]
    page.keyboard.press("2")  # the image that follows was undone too
    page.keyboard.press("Enter")
    assert [said(record)[:2] for record in saved(page, 10, tmp_path)[8:]] == [
        (paths[4], "relabel"),
        (paths[5], "confirm"),
    ]
    assert not one.errors


def test_moving_without_a_decision_returns_to_what_was_passed(review, tmp_path: Path) -> None:
    one = review()
    page = one.page
    page.keyboard.press("k")
    assert page.inner_text("#status") == "This is the first image."
    page.keyboard.press("j")
    assert title(page) == "007.png" and "007.png, label green" in page.inner_text("#status")
    page.keyboard.press("Enter")
    assert page.inner_text("#status").startswith("Confirmed green. Next: 011.png, label red. Models trained on other")
    page.keyboard.press("Enter")
    page.wait_for_function("() => current()?.path === '003.png'")  # passed before
    page.keyboard.press("ArrowRight")
    assert "you: confirmed green" in page.inner_text("#label-row")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("1")
    page.wait_for_selector("text=Nothing is left in “Likely label errors”.")
    assert not page.is_visible("#one")
    assert [said(one) for one in saved(page, 3, tmp_path)] == [
        ("007.png", "confirm", ("green",)), ("011.png", "confirm", ("red",)), ("003.png", "relabel", ("green",))
    ]  # fmt: skip
    page.wait_for_function("() => document.querySelector('#queue-list li').innerText.includes('0 left')")
    page.keyboard.press("u")
    page.wait_for_function("() => current()?.path === '003.png'")


def smooth_image(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".png", cv2.resize(small, (56, 40), interpolation=cv2.INTER_CUBIC))[1])


def test_the_parents_of_a_class_hierarchy_are_shown_and_list_their_classes(review) -> None:
    hierarchy = Hierarchy(LABELS, {"blue": "cold", "green": "cold", "red": "warm", "cold": None, "warm": None})
    page = review("audit", hierarchy=hierarchy).page
    assert "red ‹ warm" in page.inner_text("#choices").replace("\n", " ")
    page.keyboard.press("/")
    page.keyboard.type("cold")
    assert page.locator("[role=option]").all_inner_texts()[:2] == ["blue ‹ cold", "green ‹ cold"]


def test_a_label_is_found_by_typing_among_a_thousand(review, tmp_path: Path) -> None:
    names = (*LABELS, *(f"class {i:03}" for i in range(995)), "crème brûlée", "great white shark")
    one = review("audit", labels=names)
    page = one.page
    assert (
        page.get_attribute("#search", "role") == "combobox"
        and page.get_attribute("#search", "aria-controls") == "options"
    )
    for typed, best in (
        ("class 77", "class 770"),
        ("creme", "crème brûlée"),
        ("shark", "great white shark"),
        ("gws", "great white shark"),
    ):
        page.keyboard.press("/")
        page.keyboard.type(typed)
        active = page.get_attribute("#search", "aria-activedescendant")
        assert page.inner_text(f"#{active}") == best and page.get_attribute(f"#{active}", "aria-selected") == "true"
        assert page.get_attribute("#search", "aria-expanded") == "true"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "stage" and not page.is_visible("#options")
    assert [record.labels for record in saved(page, 4, tmp_path)] == [
        ("class 770",), ("crème brûlée",), ("great white shark",), ("great white shark",)
    ]  # fmt: skip
    page.keyboard.press("/")
    page.keyboard.type("class 00")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("[aria-selected=true][role=option]") == "class 001"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "stage" and page.input_value("#search") == ""
    saved(page, 4, tmp_path)


def test_a_new_class_must_be_chosen(review, tmp_path: Path) -> None:
    one = review("audit")
    page = one.page
    before = title(page)
    page.keyboard.press("/")
    page.keyboard.type("wolf;x")
    assert page.inner_text("#status") == "A label cannot have a semicolon." and not page.is_visible("#options")
    page.fill("#search", " wolf ")
    page.keyboard.press("Enter")
    assert title(page) == before and "The arrow keys choose the new class" in page.inner_text("#status"), (
        "a slip makes no class"
    )
    page.keyboard.press("ArrowDown")
    assert page.inner_text("[aria-selected=true][role=option]") == "New class “wolf”"
    page.keyboard.press("Enter")
    assert said(*saved(page, 1, tmp_path)) == (before, "relabel", ("wolf",))
    page.keyboard.press("/")
    page.keyboard.type("wo")
    assert page.inner_text("[aria-selected=true][role=option]") == "wolf"
    assert not one.errors


def test_multi_label_images_have_toggles(review, tmp_path: Path) -> None:
    one = review("audit", multilabel=True)
    page = one.page
    (label,) = one.session.items[one.session.queues[-2].entries[0].item].labels
    path, other = title(page), next(name for name in LABELS if name != label)
    pressed = lambda: {  # noqa: E731
        button.query_selector(".name").inner_text()
        for button in page.query_selector_all("#choices button[aria-pressed=true]")
    }
    assert pressed() == {label} and "Save" in page.inner_text("#confirm")
    number = page.evaluate(
        "name => [...document.querySelectorAll('#choices .name')].findIndex(n => n.textContent === name) + 1", other
    )
    page.keyboard.press(str(number))
    assert pressed() == {label, other} and page.inner_text("#status") == f"{other} chosen; Enter saves."
    page.keyboard.press("/")
    page.keyboard.type("snow")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert pressed() == {label, other, "snow"} and title(page) == path
    page.keyboard.press("Enter")  # the empty input saves
    page.keyboard.press("Enter")  # the next image keeps its label
    first, second = saved(page, 2, tmp_path)
    assert said(first) == (path, "relabel", (label, other, "snow")) and second.action == "confirm"
    page.keyboard.press("1")
    while pressed():
        page.click("#choices button[aria-pressed=true]")
    page.keyboard.press("Enter")
    assert said(saved(page, 3, tmp_path)[2])[1:] == ("relabel", ()), "an image may have no label"


def test_a_new_image_is_added_with_the_chosen_label(review, tmp_path: Path) -> None:
    one = review("served")
    page = one.page
    path = title(page)
    assert text(page, "#label-row") == "Label: none yet" and page.get_attribute("#confirm", "aria-disabled") == "true"
    page.keyboard.press("Enter")
    assert title(page) == path and "choose one with 1 to 9" in page.inner_text("#status")
    page.keyboard.press("1")
    (record,) = saved(page, 1, tmp_path)
    best = one.session.items[24].predictions[0].label
    assert (record.action, record.labels) == ("add", (best,)) and (tmp_path / record.path).is_file()


def test_a_near_duplicate_is_shown_next_to_the_image(review, tmp_path: Path) -> None:
    one = review("near-duplicates")
    page = one.page
    page.wait_for_function("() => document.querySelector('#related-frame img')?.naturalWidth > 0")
    assert text(page, "#shown-text") == "blue 000.png" and "green 001.png" in text(page, "#related-text")
    page.keyboard.press("r")
    page.wait_for_function("() => current().path === '001.png'")
    assert "blue 000.png" in text(page, "#related-text") and page.evaluate("document.activeElement.id") == "stage"
    page.keyboard.press("/")
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    assert said(*saved(page, 1, tmp_path)) == ("001.png", "relabel", ("blue",))
    assert title(page) == "000.png"


def test_the_explanation_of_a_bundle_is_shown(review, tmp_path: Path) -> None:
    import torch

    from refract.augment.preprocess import Preprocess
    from refract.models.bundle.bundle import BundleInfo, load_bundle, save_bundle
    from refract.models.classifier import Classifier
    from refract.models.registry import build

    torch.manual_seed(0)
    preprocess = Preprocess(height=32, width=32)
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=preprocess.mean, std=preprocess.std).eval()
    info = BundleInfo(
        name="colours", task="multiclass", labels=LABELS, network={"name": "lenet5", "image_size": [32, 32], "args": {}},
        preprocess=preprocess.to_dict(), temperature=0.02, thresholds=(), metrics={}, versions={}, created="2025-01-01T00:00:00+00:00",
    )  # fmt: skip
    bundle = load_bundle(save_bundle(tmp_path / "bundle", info, classifier, []))
    heat_maps = HeatMaps(bundle)
    image = next(data for data in map(smooth_image, range(50)) if heat_maps(data) is not None)
    one = review("audit", heat_maps=heat_maps, wait=False)
    page, first = one.page, one.session.items[one.session.queues[4].entries[0].item]
    (tmp_path / first.path).write_bytes(image)
    page.reload()
    ready(page)
    page.wait_for_selector("#small-heat")
    assert page.inner_text("#explanation-text") == "Regions that support the prediction, by occlusion."
    page.wait_for_function("() => document.getElementById('small-heat').naturalWidth === 32")
    page.keyboard.press("e")
    page.wait_for_function("() => document.querySelector('#frame .heat')?.naturalWidth === 32")
    assert page.get_attribute("#overlay", "aria-pressed") == "true"
    page.keyboard.press("e")
    assert page.query_selector("#frame .heat") is None and page.get_attribute("#frame img", "alt").startswith(
        title(page)
    )
    assert not one.errors


def test_the_measurements_are_shown_and_a_second_reviewer_is_independent(review, tmp_path: Path) -> None:
    one = review("audit")
    page = one.page
    path = title(page)
    item = one.session.items[one.session.queues[4].entries[0].item]
    said_by_bob = {"item": item.index, "action": "relabel", "labels": ["violet"], "queue": "audit", "reviewer": "bob"}
    one.client.post("/api/decisions", json=said_by_bob)
    page.reload()
    ready(page)
    assert title(page) == path, "ann has not decided yet"
    assert text(page, "#label-row") == f"Label: {item.labels[0]}", "the audit does not show what bob decided"
    page.wait_for_function("() => document.getElementById('audit').textContent.startsWith('100')")
    assert "1 of 1 audited image" in page.inner_text("#audit")
    page.keyboard.press("Enter")
    saved(page, 2, tmp_path)
    page.wait_for_selector("text=0 of 1 image")
    page.click("text=Conflicts")
    page.wait_for_function("() => queue.name === 'conflicts' && current()")
    assert "In conflict with bob: violet" in page.inner_text("#conflicts")
    page.keyboard.press("/")
    page.keyboard.type("violet")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    saved(page, 3, tmp_path)
    page.wait_for_function("() => !session.queues.find(one => one.name === 'conflicts').open")
    assert "0 of 1 image" in page.inner_text("#agreement"), "settling a conflict is no agreement"
    assert one.client.get("/api/queues/conflicts").json()["open"] == 0


def test_a_note_and_the_reviewers_name_are_recorded(review, tmp_path: Path) -> None:
    one = review()
    page = one.page
    page.fill("#reviewer", "dan")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You decide as dan.")
    ready(page)
    page.keyboard.press("n")
    page.keyboard.type("sunset, u and x are letters here")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    (record,) = saved(page, 1, tmp_path)
    assert (record.reviewer, record.reason) == ("dan", "sunset, u and x are letters here")
    assert page.input_value("#note") == ""


def test_an_unreadable_image_can_be_excluded(review, tmp_path: Path) -> None:
    one = review("audit", wait=False)
    page = one.page
    ready(page)
    later = one.session.items[one.session.queues[4].entries[20].item]
    (tmp_path / later.path).write_bytes(b"damaged")
    page.evaluate("() => { entries.unshift(...entries.splice(20, 1)); position = 0; show(); }")
    page.wait_for_selector(f"text={later.path}: the image cannot be read")
    page.keyboard.press("x")
    assert said(*saved(page, 1, tmp_path)) == (later.path, "exclude", ())
