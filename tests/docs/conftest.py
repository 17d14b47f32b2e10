"""The process that forks `refract …`, for the tests that follow a page."""

from collections.abc import Iterator

import pytest
from warm_process import WarmProcess


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmProcess]:
    process = WarmProcess()
    yield process
    process.close()
