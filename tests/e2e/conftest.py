"""Fixtures of the tests with a real browser."""

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from fakes.chromium import chromium


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started
