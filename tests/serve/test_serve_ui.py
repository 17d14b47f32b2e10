"""The web page in a real browser."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import needs_chromium

from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys

pytestmark = needs_chromium


@pytest.fixture
def upload(make_image, tmp_path: Path) -> Path:
    (tmp_path / "x.jpg").write_bytes(make_image(4, size=(120, 90)))  # an image with a region that supports the label
    return tmp_path / "x.jpg"


def opened(browser, client, path: str = "", **options):
    """(a loaded page, its errors, the URLs that it requested)"""
    page = browser.new_page(**options)
    errors, requested = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{client.base_url}{path}")
    return page, errors, requested


def test_the_page_shows_the_prediction_of_the_api_and_its_heat_map(browser, bundle, serving, upload) -> None:
    with serving(create_app(bundle)) as client:
        page, errors, requested = opened(browser, client)
        page.wait_for_selector("#card dd")
        assert page.inner_text("h1") == "shapes" and "lenet5, 32 × 32 pixels" in page.inner_text("#card")
        page.set_input_files("#file", upload)
        page.wait_for_selector("#prediction li")
        wanted = client.post("/v1/predict", content=upload.read_bytes()).json()["predictions"][0]["top"]
        shown = [re.sub(r"\s+", " ", item.inner_text()) for item in page.query_selector_all("#prediction .name")]
        assert shown == [f"{row['label']} {100 * row['confidence']:.1f} %" for row in wanted]
        assert page.is_visible("#heat") and page.evaluate("document.getElementById('heat').naturalWidth") == 32
        assert "Heat map: occlusion" in page.inner_text("#prediction")
        # The network sees the centre crop: 0.875 of the shorter side.
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
        assert not errors and all(url.startswith((origin, "blob:" + origin, "data:")) for url in requested)
        page.close()


def test_the_page_shows_familiarity_and_similar_training_images(
    browser, make_bundle, serving, upload, tmp_path
) -> None:
    app = create_app(make_bundle(tmp_path / "familiar", training=True), min_familiarity=1.0, similar=True)
    with serving(app) as client:
        page, errors, _ = opened(browser, client)
        page.wait_for_selector("#card dd")
        page.set_input_files("#file", upload)
        page.wait_for_selector(".similar img")
        wanted = client.post("/v1/predict?similar=5", content=upload.read_bytes()).json()["predictions"][0]
        assert [item.inner_text() for item in page.query_selector_all(".similar span")] == [
            image["labels"][0] for image in wanted["similar"]
        ]
        page.wait_for_function(
            "[...document.querySelectorAll('.similar img')].every(image => image.naturalWidth === 32)"
        )
        text = page.inner_text("#prediction")
        assert f"Familiarity: {100 * wanted['familiarity']:.0f} %" in text
        assert ("too unlike the training images" in text) == wanted["abstain"]
        assert not errors


def test_the_page_shows_the_parent_of_a_prediction_that_backs_off(browser, bundle, serving, upload) -> None:
    parents = {
        **{label: "low" if i < 5 else "high" for i, label in enumerate(bundle.info.labels)},
        "low": None,
        "high": None,
    }
    with serving(create_app(bundle)) as client:
        top = client.post("/v1/predict?top=10", content=upload.read_bytes()).json()["predictions"][0]["top"]
    sums = dict.fromkeys(("low", "high"), 0.0)
    for row in top:
        sums[parents[row["label"]]] += row["confidence"]
    name = max(sums, key=lambda parent: sums[parent])
    between = (top[0]["confidence"] + sums[name]) / 2
    info = replace(bundle.info, hierarchy={"parents": parents, "threshold": between}, abstain_below=between)
    with serving(create_app(replace(bundle, info=info))) as client:
        page, errors, _ = opened(browser, client)
        page.wait_for_selector("#card dd")
        assert "2 parents" in page.inner_text("#card")
        page.set_input_files("#file", [upload, upload])
        page.wait_for_selector("#history li:nth-child(2)")
        shown = f"{name} {100 * sums[name]:.1f} %"
        assert page.inner_text("#prediction").startswith(f"{shown}: this parent is certain enough")
        assert "Abstains from the class: the confidence is too low" in page.inner_text("#prediction")
        label = f"{top[0]['label']} {100 * top[0]['confidence']:.1f} %, abstains; parent {shown}"
        assert label in re.sub(r"\s+", " ", page.inner_text("#history")) and not errors
        page.close()


def test_the_page_says_why_there_is_no_heat_map(browser, bundle, serving, make_image, tmp_path: Path) -> None:
    (tmp_path / "plain.jpg").write_bytes(make_image(5, size=(120, 90)))
    with serving(create_app(bundle)) as client:
        page, errors, _ = opened(browser, client)
        page.set_input_files("#file", tmp_path / "plain.jpg")
        page.wait_for_selector("#prediction li")
        assert "No heat map: no single region of the image supports this label." in page.inner_text("#prediction")
        assert not page.is_visible("#heat") and not page.is_visible("#overlay") and not errors
        page.close()


def test_the_page_fits_a_phone_and_works_by_keyboard(browser, bundle, serving, upload) -> None:
    with serving(create_app(bundle)) as client:
        page, errors, _ = opened(browser, client, viewport={"width": 360, "height": 740}, color_scheme="dark")
        page.set_input_files("#file", upload)
        page.wait_for_selector("#prediction li")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "camera"
        unnamed = "[...document.querySelectorAll('button, input, img')].filter(e => !(e.innerText || e.alt || e.labels?.length))"
        assert page.evaluate(f"{unnamed}.length") == 0 and not errors
        page.close()


def test_dropped_pasted_and_camera_images_and_other_files(browser, bundle, serving, upload) -> None:
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
            page.wait_for_selector("#prediction li")
            page.evaluate("document.getElementById('prediction').replaceChildren()")
        page.click("#camera")
        page.click("#take")
        page.wait_for_selector("#prediction li")
        page.evaluate(give, ["drop", list(b"no image")])
        page.wait_for_selector("#prediction .problem")
        assert "the image" in page.inner_text("#prediction")
        page.close()


def test_several_images_are_predicted_in_turn_and_listed(browser, bundle, serving, make_image, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(make_image(i) if i != 2 else b"no image")
    with serving(create_app(bundle)) as client:
        page, errors, _ = opened(browser, client)
        page.set_input_files("#file", files)
        page.wait_for_selector("#history li:nth-child(4)")
        shown = [re.sub(r"\s+", " ", item.inner_text()) for item in page.query_selector_all("#history li")][::-1]
        for i in (0, 1, 3):
            best = client.post("/v1/predict", content=make_image(i)).json()["predictions"][0]
            assert shown[i] == f"{i}.jpg {best['label']} {100 * best['confidence']:.1f} %"
        assert shown[2].startswith("2.jpg the image")
        assert [text for text in errors if "400" not in text] == []
        page.close()


def test_the_page_asks_for_an_api_key(browser, bundle, serving, upload, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("open-sesame\n")
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys"))) as client:
        page, _, _ = opened(browser, client)
        page.wait_for_selector("text=This server requires an API key: enter it above.")
        page.set_input_files("#file", upload)
        page.fill("#api-key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The server rejects this API key.")
        page.fill("#api-key", "open-sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#card dd", state="attached")
        page.wait_for_selector("#prediction li")  # the waiting image was sent again
        page.close()


@pytest.mark.slow
def test_the_api_documentation_needs_no_other_host(browser, bundle, serving) -> None:
    with serving(create_app(bundle)) as client:
        page, errors, requested = opened(browser, client, "/docs")
        page.wait_for_selector("text=Classify one or more images")
        assert not errors and all(url.startswith((str(client.base_url), "data:")) for url in requested)


def test_the_page_shows_the_live_accuracy_once_there_is_feedback(browser, bundle, serving, make_image) -> None:
    with serving(create_app(bundle)) as client:
        page, errors, _ = opened(browser, client)
        page.wait_for_selector("#card dd")
        assert not page.is_visible("#live")
        response = client.post("/v1/predict", content=make_image(1))
        label = response.json()["predictions"][0]["label"]
        client.post("/v1/feedback", json={"id": response.headers["x-request-id"], "labels": [label]})
        page.evaluate("refreshLive()")
        page.wait_for_selector("#live dd")
        text = page.inner_text("#live")
        assert f"{bundle.digest[:16]}, 1 judged predictions" in text and f"{label}\n" in text
        assert "100.0 % (95 % interval 20.7 to 100.0 %)" in text
        assert errors == []
        page.close()
