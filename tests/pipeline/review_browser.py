"""Fixtures of the tests that open the page of a review in Chromium, and what these tests read from it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from refract.api_keys import KeyFile
    from refract.pipeline.labels.decisions import Record


@pytest.fixture
def review(browser, tmp_path: Path) -> Iterator[Callable[..., SimpleNamespace]]:
    """Start a review of small images in tmp_path, whose default reviewer is ann, and open its page at a queue."""
    from small_review import serving, small_session

    from refract.pipeline.review.app import create_app

    with ExitStack() as stack:

        def start(
            queue: str = "label-errors", *, keys: "KeyFile | None" = None, wait: bool = True, window=None, **options
        ) -> SimpleNamespace:
            session = small_session(tmp_path, **options)
            client = stack.enter_context(serving(create_app(session, keys=keys, reviewer="ann")))
            origin = str(client.base_url).rstrip("/")
            context = stack.enter_context(closing(browser.new_context(**(window or {}))))
            page = context.new_page()
            page.set_default_timeout(60_000)
            errors: list[str] = []
            requested: list[str] = []
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: requested.append(request.url))
            page.goto(f"{origin}/#{queue}")
            if wait:
                ready(page)
            return SimpleNamespace(
                page=page, session=session, client=client, origin=origin, errors=errors, requested=requested
            )

        yield start


def ready(page) -> None:
    """Wait until the large image of the current item is decoded."""
    page.wait_for_function("() => document.querySelector('#frame img')?.naturalWidth > 0 && current()")


def saved(page, count: int, folder: Path) -> "list[Record]":
    """Wait until the page has saved everything; return the records, of which there are `count`."""
    from refract.pipeline.labels.history import LabelHistory

    page.wait_for_function("() => document.getElementById('saving').textContent === 'All decisions saved'")
    records = LabelHistory(folder / "labels.db").decisions()
    assert len(records) == count
    return records


def said(record: "Record") -> tuple[str, str, tuple[str, ...]]:
    return record.path, record.action, record.labels


def title(page) -> str:
    return page.inner_text("#item-title")


def text(page, selector: str) -> str:
    return " ".join(page.inner_text(selector).split())
