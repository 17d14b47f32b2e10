"""The reference pages and the preview image follow the code: those that are generated, and the lists that are written by hand."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for package in ("augment", "models", "pipeline", "serve", "refract") for path in (ROOT / package).rglob("*.py")
]


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return program("make_reference")


@pytest.mark.parametrize("page", ["cli.md", "config.md", "ops.md", "http.md", "metrics.md"])
def test_a_generated_page_follows_the_code(page: str, generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "cli.md" and sys.version_info[:2] != (3, 11):
        pytest.skip("argparse prints options differently in each version; the page is written by Python 3.11")
    monkeypatch.setenv("COLUMNS", "100")
    stored = (ROOT / "docs" / "reference" / page).read_text("utf-8")
    assert generator.PAGES[page]() == stored, f"docs/reference/{page} differs from the code: run `make reference`"


def test_every_generated_page_is_tested(generator: ModuleType) -> None:
    assert set(generator.PAGES) == {"cli.md", "config.md", "ops.md", "http.md", "metrics.md"}


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "environment.md").read_text("utf-8")
    read = re.compile(r"""(?:environ(?:\.get|\.setdefault)?|getenv)[\[(]\s*"([A-Z][A-Z_]+)\"""")
    names = {name for path in SOURCES for name in read.findall(path.read_text("utf-8"))}
    assert len(names) > 15
    assert names - {"PYTHONPATH", "PYTHONSAFEPATH", "REQUEST_METHOD"} <= set(re.findall(r"`([A-Z_]+)`", page))


def test_every_problem_code_of_the_server_is_documented() -> None:
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    raised = re.compile(r"""(?:RequestError|Problem)\(\s*\d+,\s*"([a-z_]+)\"""")
    codes = {
        code
        for path in SOURCES
        if path.is_relative_to(ROOT / "serve")
        for code in raised.findall(path.read_text("utf-8"))
    }
    assert len(codes) > 20
    assert codes <= set(re.findall(r"`([a-z_0-9]+)`", page))


def test_the_preview_image_can_be_drawn_again() -> None:
    with Image.open(ROOT / "docs" / "preview.png") as stored:
        assert program("make_preview").draw().size == stored.size
