"""The process that forks `refract …`, for the tests that follow a page."""

import pytest
from warm_process import WarmProcess, shared


@pytest.fixture(scope="session")
def warm() -> WarmProcess:
    return shared()
