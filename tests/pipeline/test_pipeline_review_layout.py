"""The web page of a review in a real browser: the grid, a phone, both colour schemes, and assistive technology."""

from pathlib import Path

import pytest
from chromium import needs_chromium
from review_browser import ready, said, saved, title

pytestmark = needs_chromium


def test_the_grid_decides_on_twenty_images(review, tmp_path: Path) -> None:
    one = review("audit", window={"viewport": {"width": 1280, "height": 900}})
    page = one.page
    paths = [one.session.items[entry.item].path for entry in one.session.queues[4].entries]
    page.keyboard.press("g")
    cells = page.query_selector_all("#cells [role=option]")
    assert [cell.get_attribute("title") for cell in cells] == paths[:20] and not page.is_visible("#one")
    page.wait_for_function("() => [...document.querySelectorAll('#cells img')].every(image => image.naturalWidth > 0)")
    focused = lambda: page.evaluate("document.activeElement.title")  # noqa: E731
    assert focused() == paths[0]
    columns = page.evaluate("columns()")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert columns > 1 and focused() == paths[1 + columns]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowRight")
    assert (
        page.evaluate("[...document.querySelectorAll('#cells [aria-selected=true]')].map(c => c.title)") == paths[1:3]
    )
    page.keyboard.press("Space")
    assert [said(record)[:2] for record in saved(page, 2, tmp_path)] == [(path, "confirm") for path in paths[1:3]]
    assert focused() == paths[3] and page.inner_text("#cells [role=option]:nth-child(2) .mark").startswith(
        "✓ confirmed"
    )
    page.keyboard.press("x")
    page.keyboard.press("2")
    assert [said(record)[:2] for record in saved(page, 4, tmp_path)[2:]] == [
        (paths[3], "exclude"),
        (paths[4], "relabel"),
    ]
    page.keyboard.press("a")
    records = saved(page, 20, tmp_path)
    assert {record.path for record in records} == set(paths[:20])
    page.wait_for_function("() => document.querySelectorAll('#cells [role=option]').length === 4")
    assert focused() == paths[20]
    page.keyboard.press("u")  # all that the last key confirmed
    assert len(saved(page, 36, tmp_path)) == 36
    assert page.evaluate("grid.filter(view => !view.op).length") == 16
    page.keyboard.press("Enter")
    page.wait_for_selector("#one")
    ready(page)
    assert title(page) == paths[0]
    page.keyboard.press("g")
    page.click("#to-grid")
    assert page.is_visible("#one") and not one.errors


def test_the_mouse_selects_in_the_grid_and_buttons_decide(review, tmp_path: Path) -> None:
    one = review("audit")
    page = one.page
    page.click("#to-grid")
    page.click("#cells [role=option]:nth-child(2)")
    page.click("#cells [role=option]:nth-child(4)", modifiers=["Shift"])
    page.click("#cells [role=option]:nth-child(3)", modifiers=["Control"])
    assert "2 selected" in page.inner_text("#grid-place")
    page.click("#skip-selected")
    records = saved(page, 2, tmp_path)
    assert [record.action for record in records] == ["skip", "skip"]
    page.dblclick("#cells [role=option]:nth-child(1)")
    ready(page)
    page.click("#exclude")
    assert page.evaluate("document.activeElement.id") == "stage"
    page.keyboard.press("Space")  # confirms; the button that was clicked is no longer focused
    assert [record.action for record in saved(page, 4, tmp_path)[2:]] == ["exclude", "confirm"]


CONTRAST = """() => {
    const parse = color => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return {rgb: [r, g, b], a}; };
    const linear = value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const luminance = rgb => rgb.map(value => linear(value / 255)).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    const background = node => {
        for (; node; node = node.parentElement) {
            const {rgb, a} = parse(getComputedStyle(node).backgroundColor);
            if (a === 1) return rgb;
        }
    };
    const low = [];
    for (const node of document.querySelectorAll("body *")) {
        const written = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
        if (!(written || node.matches("input")) || !node.checkVisibility() || node.matches("script, style")) continue;
        const both = [luminance(parse(getComputedStyle(node).color).rgb), luminance(background(node))];
        const ratio = (Math.max(...both) + .05) / (Math.min(...both) + .05);
        if (ratio < 4.5) low.push([node.tagName, node.id, node.textContent.slice(0, 30), ratio]);
    }
    return low;
}"""
"""Texts with less contrast than WCAG 2.2 asks for at AA (1.4.3)."""

UNNAMED = """() => [...document.querySelectorAll("button, input, dialog, nav, section, [role=option], [role=listbox]")]
    .filter(node => node.checkVisibility())
    .filter(node => !(node.innerText?.trim() || node.ariaLabel || node.labels?.length || node.getAttribute("aria-labelledby")))
    .map(node => node.outerHTML)"""

MOVING = """() => [...document.querySelectorAll("*")].map(node => getComputedStyle(node))
    .filter(style => style.animationName !== "none" || parseFloat(style.transitionDuration) > 0).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_phone_has_contrast_and_names(review, scheme: str, width: int) -> None:
    window = {"viewport": {"width": width, "height": 740}, "color_scheme": scheme, "reduced_motion": "reduce"}
    one = review("near-duplicates", window=window)
    page = one.page

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) == [] and page.evaluate(UNNAMED) == []

    check()
    page.keyboard.press("/")
    page.keyboard.type("re")
    check()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    check()
    page.keyboard.press("Escape")
    page.evaluate("openQueue('audit')")
    page.wait_for_function("() => queue.name === 'audit' && current()")
    page.keyboard.press("g")
    page.wait_for_function("() => [...document.querySelectorAll('#cells img')].every(image => image.naturalWidth > 0)")
    check()
    assert page.evaluate(MOVING) == 0 and not one.errors


def test_the_focus_follows_the_reading_order_and_letters_can_be_turned_off(review, tmp_path: Path) -> None:
    one = review()
    page = one.page
    order = []
    focused = "document.activeElement.id || document.activeElement.closest('li, ol')?.parentElement.id"
    for _ in range(30):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    names = ("skip-link", "reviewer", "to-grid", "queue-list", "choices", "search", "confirm", "undo", "note")
    places = [order.index(name) for name in names]
    assert places == sorted(places)
    page.keyboard.press("?")
    assert page.is_visible("#help") and page.evaluate(
        "document.getElementById('help').contains(document.activeElement)"
    )
    page.uncheck("#shortcuts")
    page.keyboard.press("Escape")
    page.evaluate("stage()")
    for letter in ("x", "s", "1", "u", "g"):
        page.keyboard.press(letter)
    assert title(page) == "003.png"
    page.keyboard.press("Enter")
    assert said(*saved(page, 1, tmp_path))[:2] == ("003.png", "confirm")
    page.reload()
    ready(page)
    assert not page.is_checked("#shortcuts")


def test_a_phone_shows_the_predictions_above_the_bar_of_actions(review) -> None:
    page = review("label-errors", window={"viewport": {"width": 360, "height": 740}}).page
    ready(page)
    bar = page.locator("#one .actions").bounding_box()
    for button in page.locator("#choices button").all():
        box = button.bounding_box()
        assert box["y"] + box["height"] <= bar["y"]
