"""The page in a real browser."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def upload(make_image, tmp_path: Path) -> Path:
    (tmp_path / "x.jpg").write_bytes(make_image(4, size=(120, 90)))  # a part of it speaks for the label
    return tmp_path / "x.jpg"


def opened(browser, client, path: str = "", **options):
    """(a page that was loaded, what went wrong in it, whom it asked)"""
    page = browser.new_page(**options)
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{client.base_url}{path}")
    return page, wrong, asked


def test_a_image_is_answered_as_over_http_with_its_heat_map(browser, bundle, serving, upload) -> None:
    with serving(create_app(bundle)) as client:
        page, wrong, asked = opened(browser, client)
        page.wait_for_selector("#card dd")
        assert page.inner_text("h1") == "shapes" and "lenet5, 32 × 32 pixels" in page.inner_text("#card")
        page.set_input_files("#file", upload)
        page.wait_for_selector("#answer li")
        wanted = client.post("/v1/predict", content=upload.read_bytes()).json()["predictions"][0]["top"]
        shown = [re.sub(r"\s+", " ", item.inner_text()) for item in page.query_selector_all("#answer .name")]
        assert shown == [f"{row['label']} {100 * row['confidence']:.1f} %" for row in wanted]
        assert page.is_visible("#heat") and page.evaluate("document.getElementById('heat').naturalWidth") == 32
        assert "Heat map: occlusion" in page.inner_text("#answer")
        # The network sees the centre of 0.875 of the shorter side.
        image, heat = (page.query_selector(name).bounding_box() for name in ("#image", "#heat"))
        side = 0.875 * min(image["width"], image["height"])
        assert abs(heat["width"] - side) < 1 and abs(heat["height"] - side) < 1
        assert abs(heat["x"] + heat["width"] / 2 - image["x"] - image["width"] / 2) < 1
        page.focus("#overlay")
        page.keyboard.press("Enter")
        assert not page.is_visible("#heat") and page.get_attribute("#overlay", "aria-pressed") == "false"
        assert "compute" in page.inner_text("#latency")
        page.wait_for_function("document.getElementById('queue').textContent.includes('requests')")
        origin = str(client.base_url).rstrip("/")
        assert not wrong and all(url.startswith((origin, "blob:" + origin, "data:")) for url in asked)
        page.close()


def test_the_page_says_why_there_is_no_heat_map(browser, bundle, serving, make_image, tmp_path: Path) -> None:
    (tmp_path / "plain.jpg").write_bytes(make_image(5, size=(120, 90)))
    with serving(create_app(bundle)) as client:
        page, wrong, _ = opened(browser, client)
        page.set_input_files("#file", tmp_path / "plain.jpg")
        page.wait_for_selector("#answer li")
        assert "No heat map: no single region of the image supports this label." in page.inner_text("#answer")
        assert not page.is_visible("#heat") and not page.is_visible("#overlay") and not wrong
        page.close()


def test_it_fits_a_phone_and_is_used_by_keyboard(browser, bundle, serving, upload) -> None:
    with serving(create_app(bundle)) as client:
        page, wrong, _ = opened(browser, client, viewport={"width": 360, "height": 740}, color_scheme="dark")
        page.set_input_files("#file", upload)
        page.wait_for_selector("#answer li")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "camera"
        unnamed = "[...document.querySelectorAll('button, input, img')].filter(e => !(e.innerText || e.alt || e.labels?.length))"
        assert page.evaluate(f"{unnamed}.length") == 0 and not wrong
        page.close()


def test_dropped_pasted_and_camera_images_and_what_is_none(browser, bundle, serving, upload) -> None:
    give = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "x.jpg", {type: "image/jpeg"}));
        if (kind === "paste") document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
        else document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
    }"""
    with serving(create_app(bundle)) as client:
        page, _, _ = opened(browser, client)
        for kind in ("drop", "paste"):
            page.evaluate(give, [kind, list(upload.read_bytes())])
            page.wait_for_selector("#answer li")
            page.evaluate("document.getElementById('answer').replaceChildren()")
        page.click("#camera")
        page.click("#take")
        page.wait_for_selector("#answer li")
        page.evaluate(give, ["drop", list(b"no image")])
        page.wait_for_selector("#answer .problem")
        assert "the image" in page.inner_text("#answer")
        page.close()


def test_several_images_are_answered_one_after_the_other_and_listed(
    browser, bundle, serving, make_image, tmp_path: Path
) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(make_image(i) if i != 2 else b"no image")
    with serving(create_app(bundle)) as client:
        page, wrong, _ = opened(browser, client)
        page.set_input_files("#file", files)
        page.wait_for_selector("#history li:nth-child(4)")
        shown = [re.sub(r"\s+", " ", item.inner_text()) for item in page.query_selector_all("#history li")][::-1]
        for i in (0, 1, 3):
            best = client.post("/v1/predict", content=make_image(i)).json()["predictions"][0]
            assert shown[i] == f"{i}.jpg {best['label']} {100 * best['confidence']:.1f} %"
        assert shown[2].startswith("2.jpg the image")
        assert [text for text in wrong if "400" not in text] == []
        page.close()


def test_a_key_is_asked_for(browser, bundle, serving, upload, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("open-sesame\n")
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys"))) as client:
        page, _, _ = opened(browser, client)
        page.wait_for_selector("text=This server asks for a key: type it above.")
        page.set_input_files("#file", upload)
        page.fill("#secret", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=This key is not known here.")
        page.fill("#secret", "open-sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#card dd", state="attached")
        page.wait_for_selector("#answer li")  # the image that waited
        page.close()


@pytest.mark.slow
def test_the_description_needs_no_other_server(browser, bundle, serving) -> None:
    with serving(create_app(bundle)) as client:
        page, wrong, asked = opened(browser, client, "/docs")
        page.wait_for_selector("text=Classify one or several images")
        assert not wrong and all(url.startswith((str(client.base_url), "data:")) for url in asked)
