"""Fixtures of the tests with a real browser."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser

from fakes.chromium import chromium
from fakes.fixtures import on_both_engines

ON_BOTH_ENGINES = {"test_crash", "test_one_consent", "test_renewal"}
"""The modules that are about what is in the store."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tmp_path" in metafunc.fixturenames and Path(metafunc.definition.path).stem in ON_BOTH_ENGINES:
        on_both_engines(metafunc)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started
