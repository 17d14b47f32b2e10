"""The documentation site: it builds without a warning, loads nothing from elsewhere, and its search works from files."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"""<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="([^"]+)\"""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A broken link or anchor fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        addresses = [address for pair in LOADED.findall(page.read_text("utf-8")) for address in pair]
        assert [address for address in addresses if address.startswith(("http", "//"))] == [], page


def test_the_images_for_light_and_dark_are_in_the_site(site: Path) -> None:
    pictures = {
        (page.parent / image).resolve().relative_to(site.resolve()).as_posix()
        for page in site.rglob("*.html")
        for picture in re.findall(r"<picture>.*?</picture>", page.read_text("utf-8"), re.DOTALL)
        for image in re.findall(r'\b(?:src|srcset)="([^"]+)"', picture)
    }
    assert {"page.png", "page-dark.png", "report-dark.png", "mlflow-dark.png"} <= pictures
    assert [image for image in pictures if not (site / image).is_file()] == []


def test_the_search_works_from_files(site: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((site / "reference" / "exit-codes.html").as_uri())
        page.click("[data-md-component=search-query]")
        page.keyboard.type("temperature")
        page.wait_for_selector(".md-search-result__item a", timeout=30_000)
        hrefs = [link.get_attribute("href") for link in page.query_selector_all(".md-search-result__item a")]
        browser.close()
    assert any("evaluation.html" in str(link) or "bundle.html" in str(link) for link in hrefs)
