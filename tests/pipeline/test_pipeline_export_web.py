"""`refract export --to web`: the exported page in a real browser."""

import base64
import functools
import io
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from chromium import needs_chromium
from icc_profiles import icc
from PIL import Image
from small_export import make_bundle, needs_onnx, stored

from refract.augment.decoding.decode import decode
from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import probabilities
from refract.models.hierarchy import Hierarchy
from refract.pipeline.export.browser import runtime
from refract.pipeline.export.export import export
from refract.pipeline.export.int8 import Int8

pytestmark = [pytest.mark.slow, needs_onnx]

FROM_FILES, FROM_JPEG, FROM_INT8 = 1e-3, 0.02, 0.3
"""Largest differences of a probability: docs/export.md. JPEG: the browser's decoder, and none that reduces."""

SCRIPT = Path(runtime.__file__).parents[1] / "reference" / "preprocess.js"
FILES = {
    "LICENSE.onnxruntime-web.txt", "index.html", "model.onnx", "ort-wasm-simd-threaded.wasm", "ort.wasm.bundle.min.js", "preprocess.js",
    "preprocess.json", "preprocess.py",
}  # fmt: skip
IN_PAGE = "data => probabilitiesOf(new Blob([Uint8Array.from(atob(data), c => c.charCodeAt(0))]))"

PIXELS_IN_PAGE = """async data => {
  const blob = new Blob([Uint8Array.from(atob(data), c => c.charCodeAt(0))]);
  return Array.from(refractPreprocess(await decoded(blob), settings));
}"""
REQUEST_ELSEWHERE = """new Promise(resolve => {
  document.addEventListener("securitypolicyviolation", event => resolve(event.effectiveDirective));
  fetch("http://127.0.0.1:9/").catch(() => setTimeout(resolve, 1000, "allowed"));
})"""


def photo(side: int, form: str, **options: object) -> bytes:
    """A smooth scene without symmetries, twice as wide as high."""
    small = np.random.default_rng(3).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((2 * side, side), Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def rotated(side: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo(side, "JPEG", quality=92, exif=exif)


def predicted(bundle: Bundle, data: bytes) -> np.ndarray:
    """The bundle's probabilities for an encoded image."""
    images = torch.from_numpy(Preprocess.from_dict(bundle.info.preprocess)(data)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        logits = bundle.classifier()(images)
    return probabilities(logits, task=bundle.info.task, temperature=bundle.info.temperature)[0].numpy()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Golden samples in PNG and JPEG, one of them rotated by its EXIF orientation."""
    path = tmp_path_factory.mktemp("bundles")
    plain = make_bundle(path / "plain", "lenet5", goldens=4)
    goldens = [*plain.golden_samples]
    for name, data in {"photo.jpg": photo(45, "JPEG", quality=92), "rotated.jpg": rotated(50)}.items():
        goldens.append(GoldenSample(name, data, tuple(map(float, predicted(plain, data)))))
    return load_bundle(save_bundle(path / "bundle", plain.info, plain.classifier(), goldens))


@pytest.fixture(scope="module")
def exported(bundle: Bundle, npm_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "web"
    export(bundle, "web", folder, runtime=npm_archive)
    return folder


class Server(ThreadingHTTPServer):
    """A static server of one folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        self.origin = f"http://127.0.0.1:{self.server_port}"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        logging.getLogger(__name__).debug(format, *args)


@pytest.fixture
def serving() -> Iterator:
    """Serve a folder until the end of the test."""
    servers = []

    def serve(folder: Path) -> str:
        servers.append(Server(folder))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].origin

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def opened(browser, origin: str, **options):
    """(a page whose model is loaded, its errors, the URLs that it requested)"""
    page = browser.new_page(**options)
    errors, requested = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(origin)
    page.wait_for_selector("text=No image classified yet.")
    return page, errors, requested


def computed(page, data: bytes) -> np.ndarray:
    return np.array(page.evaluate(IN_PAGE, base64.b64encode(data).decode()))


def shown(page) -> list[str]:
    return [re.sub(r"\s+", " ", item.inner_text()) for item in page.query_selector_all("#prediction .name")]


def upload(name: str, data: bytes) -> dict:
    return {"name": name, "mimeType": "image/png", "buffer": data}


@needs_chromium
def test_the_page_returns_the_bundles_predictions_and_requests_nothing_else(
    browser, bundle: Bundle, exported: Path, serving
) -> None:
    assert {file.name for file in exported.iterdir()} == FILES
    origin = serving(exported)
    page, errors, requested = opened(browser, origin)
    assert page.inner_text("h1") == "colours" and page.title() == "colours – Refract"
    card = page.inner_text("#card")
    assert "lenet5, 32 × 40 pixels" in card and bundle.digest[:16] in card
    for golden, expected in zip(bundle.golden_samples, stored(bundle), strict=True):
        bound = FROM_JPEG if golden.name.endswith("jpg") else FROM_FILES
        np.testing.assert_allclose(computed(page, golden.data), expected, atol=bound, err_msg=golden.name)
    golden = bundle.golden_samples[0]
    page.set_input_files("#file", upload("a.png", golden.data))
    page.wait_for_selector("#prediction li")
    order = np.argsort(-np.array(golden.probabilities))
    assert shown(page) == [f"{bundle.info.labels[i]} {100 * golden.probabilities[i]:.1f} %" for i in order]
    assert page.evaluate("document.getElementById('image').naturalWidth") == 40
    assert not errors and all(url.startswith((origin, f"blob:{origin}")) for url in requested)
    assert page.evaluate(REQUEST_ELSEWHERE) == "connect-src"
    page.close()


@needs_chromium
def test_the_page_works_with_the_keyboard_and_reports_predictions_to_screen_readers(
    browser, bundle: Bundle, exported: Path, serving
) -> None:
    page, errors, _ = opened(browser, serving(exported), color_scheme="dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert page.evaluate("getComputedStyle(document.querySelector('label.button')).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert page.get_attribute("#prediction", "aria-live") == "polite"
    assert page.get_by_label("choose files").count() == 1
    chooser.value.set_files([upload("a.png", bundle.golden_samples[0].data), upload("b.png", b"not an image")])
    page.wait_for_selector("#history li:nth-child(2)")
    assert page.inner_text("#prediction") == "b.png is not an image that this browser can decode."
    assert not page.is_visible("#image")
    history = [re.sub(r"\s+", " ", item.inner_text()) for item in page.query_selector_all("#history li")]
    assert history[0] == "b.png not classified" and history[1].startswith("a.png ")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"
    assert not errors
    page.close()


PASTE = """data => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "pasted.png", {type: "image/png"}));
  EVENT
}"""
EVENTS = {
    "paste": "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: files}));",
    "drop": "document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: files, cancelable: true}));",
}


@needs_chromium
def test_dropped_and_pasted_images_are_classified(browser, bundle: Bundle, exported: Path, serving) -> None:
    page, errors, _ = opened(browser, serving(exported))
    for event, golden in zip(EVENTS, bundle.golden_samples, strict=False):
        page.evaluate(PASTE.replace("EVENT", EVENTS[event]), base64.b64encode(golden.data).decode())
        best = f"{bundle.info.labels[int(np.argmax(golden.probabilities))]} {100 * max(golden.probabilities):.1f} %"
        page.wait_for_function(
            "best => document.querySelector('#prediction .name')?.innerText.replace(/\\s+/g, ' ') === best", arg=best
        )
    assert not errors
    page.close()


@needs_chromium
def test_a_missing_file_and_a_page_without_a_server_are_explained(
    browser, exported: Path, serving, tmp_path: Path
) -> None:
    page = browser.new_page()
    page.goto((exported / "index.html").as_uri())
    page.wait_for_selector(".problem")
    assert "Run python -m http.server 8000 in its folder" in page.inner_text("#prediction")
    for name in ("preprocess.json", "model.onnx", "ort.wasm.bundle.min.js"):
        shutil.copytree(exported, tmp_path / name)
        (tmp_path / name / name).unlink()
        page.goto(serving(tmp_path / name))
        page.wait_for_selector(".problem")
        assert page.inner_text("#prediction").startswith(f"{name} cannot be loaded")
    page.close()


@needs_chromium
def test_multilabel_shows_each_label_that_reaches_its_threshold(
    browser, npm_archive: Path, serving, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", "lenet5", task="multilabel")
    export(bundle, "web", tmp_path / "out", runtime=npm_archive)
    page, errors, _ = opened(browser, serving(tmp_path / "out"))
    several = 0
    for golden in bundle.golden_samples:
        np.testing.assert_allclose(computed(page, golden.data), golden.probabilities, atol=FROM_FILES)
        reached = np.array(golden.probabilities) >= bundle.info.thresholds
        several += reached.sum() > 1
        page.evaluate("document.getElementById('prediction').replaceChildren()")
        page.set_input_files("#file", upload(golden.name, golden.data))
        page.wait_for_selector("#prediction li")
        labels = [label for label, yes in zip(bundle.info.labels, reached, strict=True) if yes]
        assert f"Labels: {', '.join(labels) or 'none'}" in page.inner_text("#prediction")
        marked = {item.inner_text().split()[0] for item in page.query_selector_all("#prediction .mark")}
        assert marked == set(labels)
    assert several, "the test needs an image with several labels"
    assert "threshold 40.0 %" in " ".join(shown(page)) and not errors
    page.close()


@needs_chromium
def test_the_page_backs_off_to_the_parents_that_refract_predicts(
    browser, bundle: Bundle, npm_archive: Path, serving, tmp_path: Path
) -> None:
    parents = {"blue": "cold", "green": "cold", "red": "warm", "cold": "all", "warm": "all", "all": None}
    info = replace(bundle.info, hierarchy={"parents": parents, "threshold": 0.8}, abstain_below=0.7)
    tree = load_bundle(save_bundle(tmp_path / "bundle", info, bundle.classifier(), bundle.golden_samples))
    export(tree, "web", tmp_path / "out", runtime=npm_archive)
    page, errors, _ = opened(browser, serving(tmp_path / "out"))
    rows = np.random.default_rng(0).dirichlet([0.6] * 3, 300)
    rows = np.concatenate([rows, [[0.4, 0.4, 0.2], [0.7, 0.1, 0.2], [0.1, 0.3, 0.6]]])
    expected = [each and (each.label, each.confidence) for each in info.back_offs(rows)]
    assert 30 < sum(each is not None for each in expected) < 270
    got = page.evaluate("rows => rows.map(backOff)", rows.tolist())
    assert [each and each["name"] for each in got] == [each and each[0] for each in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine is None or abs(mine["probability"] - theirs[1]) < 1e-9
    row = [0.45, 0.45, 0.1]
    text = page.evaluate("row => show(row)", row)
    assert text == "blue 45.0 %, abstains; parent cold 90.0 %"
    assert "cold 90.0 %: this parent is certain enough." in page.inner_text("#prediction")
    assert "Abstains" in page.evaluate("show([.4, .2, .4]), document.getElementById('prediction').textContent")
    for no_back_off in ({"abstain_below": 1}, {"abstain_below": None}, {"threshold": 1}):
        changed = replace(
            info,
            abstain_below=no_back_off.get("abstain_below", 0.7),
            hierarchy={"parents": parents, "threshold": no_back_off.get("threshold", 0.8)},
        )
        page.evaluate(
            "([limit, tree]) => { settings.abstain_below = limit; settings.hierarchy = tree; }",
            [changed.abstain_below, changed.hierarchy],
        )
        expected = [each and each.label for each in changed.back_offs(rows)]
        assert [each and each["name"] for each in page.evaluate("rows => rows.map(backOff)", rows.tolist())] == expected
    labels = ("a", "b", "c", "d")
    ties = {"z": None, "top": None, "deep": "top", "a": "z", "b": "z", "c": "deep", "d": "deep"}
    forest = Hierarchy(labels, ties)
    tied = {"labels": labels, "abstain_below": 0.7, "hierarchy": {"parents": ties, "threshold": 0.5}}
    page.evaluate("tied => Object.assign(settings, tied)", tied)
    for row in ([0.25, 0.25, 0.25, 0.25], [0.3, 0.2, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125]):
        (backed_off,) = forest.back_offs(np.array([row]), 0.7, 0.5)
        assert backed_off is not None
        assert page.evaluate("row => backOff(row).name", row) == backed_off.label
    assert not errors
    page.close()


@needs_chromium
def test_the_browser_computes_8_bit_integers(
    browser, bundle: Bundle, npm_archive: Path, serving, tmp_path: Path
) -> None:
    export(bundle, "web", tmp_path / "out", Int8(None, None, 100), runtime=npm_archive)
    page, errors, _ = opened(browser, serving(tmp_path / "out"))
    assert "8-bit integers" in page.inner_text("#card")
    for golden in bundle.golden_samples:
        np.testing.assert_allclose(computed(page, golden.data), golden.probabilities, atol=FROM_INT8)
    assert not errors
    page.close()


@needs_chromium
def test_the_browser_decodes_images_as_refract_does(browser, bundle: Bundle, exported: Path, serving) -> None:
    """Equal pixels but for a level; the page decodes a large JPEG as a whole, so it is compared with Refract's whole decoding."""
    page, _, _ = opened(browser, serving(exported))
    alpha, profile = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8), icc()
    files = {
        "JPEG": photo(400, "JPEG", quality=90),
        "rotated": rotated(90),
        "WebP": photo(90, "WEBP", lossless=True),
        "transparent": cv2.imencode(".png", alpha)[1].tobytes(),
        "grey": cv2.imencode(".png", alpha[:, :, 0])[1].tobytes(),
        "P3": photo(90, "PNG", icc_profile=profile),
        "P3 in JPEG": photo(90, "JPEG", quality=95, icc_profile=profile),
    }
    pixels = {}
    for profiles in ("ignore", "convert"):
        page.evaluate("profiles => { settings.preprocess.color_profile = profiles; }", profiles)
        preprocess = replace(Preprocess.from_dict(bundle.info.preprocess), color_profile=profiles)
        for name, data in files.items():
            got = np.reshape(page.evaluate(PIXELS_IN_PAGE, base64.b64encode(data).decode()), (32, 40, 3))
            expected = preprocess(decode(data, color_profile=profiles)).astype(int)
            assert np.abs(got - expected).max() <= 2, (name, profiles)
            pixels[name, profiles] = got
    assert np.abs(pixels["P3", "convert"] - pixels["P3", "ignore"]).max() > 10
    page.close()
